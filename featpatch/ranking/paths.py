"""Rank paths: what a sender does through a receiver, exactly; many of them are screened by gradients first."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm.auto import tqdm

from featpatch.attribution import estimate_paths
from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.pairs import Pairs
from featpatch.patch import DIRECTIONS, Direction, Edge, Node
from featpatch.patching import Asked, Metrics, Nodes, Route, Study, leading, path_study
from featpatch.ranking.screen import Screen, screened

BUDGET = 20_000
"""So many paths are run unless something else is asked for; more are screened."""

MANY, DRAWN = 2000, 500
"""So many are then run for their estimates, and so many others."""


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
    """Exact causal effect of paths from senders to receivers, by path patching (Wang et al. 2022; Goldowsky-Dill et al. 2023).

    The sender takes its value from the source run while all other components keep theirs from the base run; what the receiver
    then takes on is recorded; then the receiver alone is set to that in the base run, and everything above it is recomputed.
    Norms are recomputed. The effect is that of the receiver's change alone, on the scale of `rank_features`.

    The cost grows with senders times receivers, and is said before the start. Above 20,000 paths gradient estimates screen,
    unless `exact="all"`: see `rank_features`.

    Args:
        model: a TransformerBridge or a HookedTransformer, without hooks of yours.
        saes: whose features and errors senders and receivers are, if any are.
        senders: features, errors, heads at `hook_z`, whole activations (`Node("blocks.1.hook_mlp_out", "activation")`); or a
            table of effects whose rows they are.
        receivers: features and errors of SAEs; heads at `hook_q`, `hook_k`, `hook_v`, or `hook_z` for the three together; whole
            activations; `"logits"`. A receiver's position says where its change is patched; `"all"` is everywhere.
        route: `"direct"` freezes attention and MLPs between sender and receiver, `"through_mlps"` attention alone.
        exact: run `"all"`, or those `"screened"`: the first `k` (2000) by |estimate| and `audit` (500) of the others, drawn by
            `seed` (0); `"auto"` screens above 20,000 paths.
        directions, metric, batch_rows, journal, executor, progress: as in `rank_features`.

    Returns:
        One row per path whose sender differs in at least one pair, of kind `edge`.

    Raises:
        FeatpatchError: unusable input; the message says which value, what was expected and what to do next.
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
