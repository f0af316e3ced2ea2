"""Rank paths by the exact effect of a sender through a receiver; if there are many paths, gradients screen them first."""

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
