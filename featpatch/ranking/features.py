"""Rank SAE features by causal recovery: every feature that differs is swapped alone, exactly, in both directions."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from featpatch.attribution import estimate_features
from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.pairs import Pairs
from featpatch.pairs.spans import Positions
from featpatch.patch import DIRECTIONS, Direction, Node
from featpatch.patching import Asked, Metrics, Noise, Study, feature_study, leading
from featpatch.ranking.screen import Screen, screened


def rank_features(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    exact: str = "all",
    k: int | None = None,
    audit: int | None = None,
    target: float | None = None,
    top: int | None = None,
    method: str | None = None,
    seed: int | None = None,
    batch_rows: int | None = None,
    noise: Noise | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Exact causal effect of every SAE feature, of the error terms and of the whole sites.

    A feature's value is taken from the clean run into the corrupted one (denoising) and the other way round (noising);
    the SAE's reconstruction error and all other features stay as they are in the run that is patched. A feature with the
    same value in both runs has exactly no effect and costs no forward pass.

    Ctrl-C returns what is finished: the pairs that are done, or, within the first ones, NaN where nothing is known
    (`effects.finished` is False). With a journal the next call goes on from there.

    With `exact="screened"` all features are estimated from gradients and only some are run: the first `k` by |estimate|, and
    `audit` of the others, drawn at random. Every value of the table is exact; `effects.audit()` bounds what was missed, and
    `effects.to_pandas()` shows the estimates beside. `fp.plan` says whether that is quicker than the full sweep.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: a sae-lens SAE or transcoder, or several, also at the same hook.
        pairs: clean and corrupted prompts with their answers.
        positions: `"all"`: one row per feature, swapped at every position at once; `"each"`: one row per feature and
            token index; a list of labels and indices: one row per feature and entry. Special tokens are never swapped by
            `"all"` and `"each"`.
        directions: `"denoising"`, `"noising"` or both.
        metric: name of a metric or a function of `(logits, correct, wrong)`, or several, all from the same patched runs;
            the table is that of the first, `effects.metric(name)` that of another. For answers of several tokens
            `"sequence_log_prob"` or `"sequence_log_prob_diff"`, teacher-forced, at one forward pass for each token.
        exact: `"all"` features, or those `"screened"`; what follows is for these.
        k: how many are run for their estimates; 200 by default.
        audit: how many of the others are run, drawn at random; 100 by default.
        target: share of the true `top` that is to be among those run, with 95 % confidence: the sample is doubled until the
            bound says so.
        top: length of the ranking that the target is about; 20 by default.
        method: how the estimates are taken, see `estimate_features`; `"atp"` by default.
        seed: draws the sample; 0 by default.
        batch_rows: rows (patches x positions) of one forward pass; by default from the model's size and the free memory.
        noise: corrupts the clean prompts' embeddings, in the place of the corrupted prompts (causal tracing).
        journal: a file in which every finished batch is written down, and from which an interrupted call goes on.
        executor: `"ray"` or `fp.Ray(...)` runs the forward passes on several processes or machines; here by default.
        progress: show a bar.

    Returns:
        One row per feature (and position) that differs in at least one pair, and three rows per site and position:
        `all_features`, `error` and `activation`. Where features were screened, first those that were run for their estimates,
        then the random ones.

    Raises:
        FeatpatchError: unusable input; the message says which value, what was expected and what to do next.
    """
    options: dict[str, Any] = {"k": k, "audit": audit, "target": target, "top": top, "method": method, "seed": seed}
    given = {name: value for name, value in options.items() if value is not None}
    if exact not in ("all", "screened") or (exact == "all" and given):
        raise FeatpatchError(f"exact={exact!r}, {given}: expected 'all' without any of these, or 'screened'")
    asked = Asked(positions, directions, metric, batch_rows, noise)
    if exact == "all":
        study, _ = feature_study(model, saes, pairs, asked)
        return study.run(journal, progress=progress, executor=executor)
    if noise is not None:
        raise FeatpatchError(
            "exact='screened' with noise: expected corrupted prompts, whose gradients are what estimates are of"
        )
    screen = Screen(**given)
    taken: dict[str, Any] = {"positions": positions, "directions": directions, "metric": leading(metric), "progress": progress}
    estimate = estimate_features(model, saes, pairs, method=screen.method, **taken)

    def study_of(only: frozenset[Node]) -> Study:
        return feature_study(model, saes, pairs, asked, only)[0]

    return screened(screen, estimate, study_of, partial(Study.run, journal=journal, progress=progress, executor=executor))
