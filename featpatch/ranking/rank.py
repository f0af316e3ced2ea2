"""Rank features and paths exactly; if there are many, gradient estimates screen them first."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from featpatch.attribution.features import estimate_features
from featpatch.attribution.paths import estimate_paths
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError
from featpatch.nodes import DIRECTIONS, Direction, Edge, Node
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.positions import Positions
from featpatch.patching.features import feature_study
from featpatch.patching.paths import Nodes, path_study
from featpatch.patching.readings import Metrics, leading
from featpatch.patching.route import Route
from featpatch.patching.runs import Noise
from featpatch.patching.study import Asked, Study
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


BUDGET = 20_000
"""The largest number of paths that are all patched by default; more paths are screened."""

MANY, DRAWN = 2000, 500
"""When paths are screened, how many are patched because of their estimates, and how many of the others."""


def rank_paths(
    model: Any,
    pairs: Pairs,
    *,
    saes: Any = None,
    senders: Nodes,
    receivers: Nodes,
    route: Route = "direct",
    exact: Literal["auto", "all", "screened"] = "auto",
    k: int | None = None,
    audit: int | None = None,
    seed: int | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    journal: str | Path | None = None,
    executor: Any = None,
    progress: bool = True,
) -> Effects:
    """Measure the exact causal effect of paths from senders to receivers.

    This is path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023). In a first pass the sender takes its value from the
    source run while all other components keep their values from the base run, and the receiver's new value is recorded. In a
    second pass the receiver alone is set to that value in the base run, and everything downstream of it is recomputed. Norms
    are recomputed. The effect is that of the receiver's change alone, on the scale of `rank_features`.

    The cost grows with senders times receivers; the number of paths is printed before the start. More than 20,000 paths are
    screened by gradient estimates, unless `exact="all"`: see `rank_features`.

    Args:
        model: a TransformerBridge or a HookedTransformer, without hooks of your own.
        pairs: clean and corrupted prompts with their answers.
        saes: the SAEs whose features and errors are among the senders and receivers, if any.
        senders: features, errors, heads at `hook_z`, whole activations (`Node("blocks.1.hook_mlp_out", "activation")`); or a
            table of effects whose rows are the senders.
        receivers: features and errors of SAEs; heads at `hook_q`, `hook_k`, `hook_v`, or `hook_z` for the three together; whole
            activations; `"logits"`. A receiver's change is patched at the receiver's position; `"all"` is everywhere.
        route: `"direct"` freezes attention and MLPs between sender and receiver, `"through_mlps"` only attention.
        exact: `"all"` to patch all paths, or `"screened"` to patch the first `k` (2000) by |estimate| and `audit` (500) of the
            others, drawn with `seed` (0); `"auto"` screens if there are more than 20,000 paths.
        k, audit, seed: see `exact`.
        directions, metric, batch_rows, journal, executor, progress: as in `rank_features`.

    Returns:
        One row of kind `edge` per path whose sender differs in at least one pair.

    Raises:
        FeatpatchError: if the input is unusable; the message gives the value, what was expected and what to do next.
    """
    if exact not in ("auto", "all", "screened"):
        raise FeatpatchError(f"exact={exact!r}: expected 'auto', 'all' or 'screened'")
    asked = Asked(directions=directions, metric=metric, batch_rows=batch_rows)
    study, part = path_study(model, pairs, saes, senders, receivers, route, asked)
    count = sum(map(len, part.edges.values()))
    screen = exact == "screened" or (exact == "auto" and count > BUDGET)
    given: dict[str, Any] = {name: value for name, value in (("k", k), ("audit", audit), ("seed", seed)) if value is not None}
    if exact == "all" and given:
        raise FeatpatchError(f"exact='all', {given}: expected 'auto' or 'screened' with these")
    chosen = Screen(**{"k": MANY, "audit": DRAWN, **given})
    if progress:
        how = f"screened by gradients, {chosen.k} and {chosen.audit} of them run" if screen else "all run"
        tqdm.write(f"{count:,} paths in {len(pairs)} pairs and {len(study.directions)} directions: {how}", file=sys.stderr)
    if not screen:
        return study.run(journal, progress=progress, executor=executor)
    estimate = estimate_paths(
        model, pairs, saes=saes, senders=senders, receivers=receivers, route=route, directions=directions,
        metric=leading(metric), progress=progress,
    )  # fmt: skip

    def study_of(only: frozenset[Node]) -> Study:
        edges = frozenset(edge for edge in only if isinstance(edge, Edge))
        return path_study(model, pairs, saes, senders, receivers, route, asked, edges)[0]

    run = partial(Study.run, journal=journal, progress=progress, executor=executor)
    return screened(chosen, estimate, study_of, run)
