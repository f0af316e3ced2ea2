"""Rank SAE features by causal recovery: every feature that differs is patched alone, exactly, in both directions."""

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
    """Measure the exact causal effect of every SAE feature, of the error terms and of the whole activations.

    Each feature is patched from the clean run into the corrupted run (denoising) and the other way round (noising); the SAE's
    reconstruction error and all other features keep their values in the run that is patched. A feature with the same value in
    both runs has exactly no effect and needs no forward pass.

    Ctrl-C returns what is finished: the pairs that are done or, during the first pairs, the features that are done
    (`effects.finished` is False). With a journal, the next call resumes from there.

    With `exact="screened"`, all features are estimated from gradients and only some are patched: the first `k` by |estimate|,
    and `audit` of the others, drawn at random. Every value of the table is exact; `effects.audit()` bounds what was missed, and
    `effects.to_pandas()` also shows the estimates. `fp.plan` tells whether this is faster than the full sweep.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: a sae-lens SAE or transcoder, or several, which may share a hook point.
        pairs: clean and corrupted prompts with their answers.
        positions: `"all"`: one row per feature, patched at every position at once; `"each"`: one row per feature and
            token index; a list of labels and indices: one row per feature and entry. `"all"` and `"each"` leave out special
            tokens.
        directions: `"denoising"`, `"noising"` or both.
        metric: the name of a metric or a function of `(logits, correct, wrong)`, or several, all measured in the same patched
            runs; the table is for the first, and `effects.metric(name)` is the table for another. For answers of several tokens
            use `"sequence_log_prob"` or `"sequence_log_prob_diff"`, which are teacher-forced and take one forward pass per
            token.
        exact: `"all"` to patch all features, or `"screened"`. The next six arguments are only for `"screened"`.
        k: how many features are patched because of their estimates; 200 by default.
        audit: how many of the other features are patched, drawn at random; 100 by default.
        target: the share of the true `top` that should be among the patched features, with 95 % confidence: the sample is
            doubled until the bound reaches it.
        top: the length of the ranking that `target` refers to; 20 by default.
        method: the method of estimation, see `estimate_features`; `"atp"` by default.
        seed: the seed of the random sample; 0 by default.
        batch_rows: rows (patches x positions) of one forward pass; by default chosen from the model's size and the free memory.
        noise: noise on the clean prompts' embeddings, which replaces the corrupted prompts (causal tracing).
        journal: a file to which every finished batch is written, and from which an interrupted call resumes.
        executor: `"ray"` or `fp.Ray(...)` to run the forward passes on several processes or machines; by default they run in
            this process.
        progress: whether to show a progress bar.

    Returns:
        One row per feature (and position) that differs in at least one pair; for each position also rows for `all_features` and
        `error` of each dictionary, and for the whole `activation` at each hook point. With screening, the features that were
        patched because of their estimates come first, then those drawn at random.

    Raises:
        FeatpatchError: if the input is unusable; the message gives the value, what was expected and what to do next.
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
