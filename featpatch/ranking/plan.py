"""Estimate the cost of a sweep before it starts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from featpatch.attribution.features import estimation_time
from featpatch.engine.sweep import Sweep
from featpatch.errors import FeatpatchError
from featpatch.metrics import Metrics, leading
from featpatch.nodes import DIRECTIONS, RANKED, Direction, Node
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.patching.components import component_study
from featpatch.patching.features import feature_study
from featpatch.patching.paths import Nodes, path_study
from featpatch.patching.study import Options
from featpatch.sites import DEFAULT_COMPONENTS, Route


@dataclass(frozen=True, repr=False)
class Plan:
    """An estimate of the cost of a sweep.

    Attributes:
        patches: the number of exact runs in both directions; patches that change nothing cost nothing and are left out. It is
            an estimate if fewer pairs were counted than there are.
        rows: the number of positions to compute, over all patches; likewise an estimate.
        flops: the floating-point operations of the matrix products; likewise an estimate.
        batch_rows: the number of rows that share a forward pass.
        memory: the bytes that a forward pass takes at its peak, estimated from the model's sizes.
        seconds: the duration of the sweep, estimated from the time of one batch that was run on this machine.
        fast: whether featpatch's own, fast forward pass is used.
        nodes: the number of features, heads, neurons or paths, each at each position, that differ in some pair; likewise an
            estimate.
        estimate_seconds: the time to estimate all features by gradients, extrapolated from a few pairs that were run on this
            machine; None for a metric that has no gradient, for components and for paths.
        counted, pairs: the number of pairs that were counted, and of pairs that there are.
        screens: whether the sweep is over features, which gradient estimates can screen.

    Examples:
        >>> plan = fp.plan(model, saes, pairs, positions=["S2"])
        >>> plan.screened_seconds(k=20, audit=80) > plan.estimate_seconds
        True
    """

    patches: int
    rows: int
    flops: int
    batch_rows: int
    memory: int
    seconds: float
    fast: bool
    nodes: int
    estimate_seconds: float | None
    counted: int
    pairs: int
    screens: bool = True

    def __repr__(self) -> str:
        estimated = (
            "no gradient estimates" if self.estimate_seconds is None else f"gradient estimates {self.estimate_seconds:.1f} s"
        )
        return (
            f"plan of {self.patches:,} patches: {self.seconds:.1f} s, {self.flops:.3g} operations, "
            f"{self.memory / 2**20:,.0f} MiB, {'fast' if self.fast else 'slow'} forward pass; {self.nodes:,} nodes, "
            f"{estimated}"
        )

    def screened_seconds(self, k: int, audit: int) -> float | None:
        """Estimate the seconds that screening with these numbers of features takes; None without gradients."""
        if self.estimate_seconds is None:
            return None
        return self.estimate_seconds + self.seconds * min(1.0, (k + audit) / max(1, self.nodes))


COUNTED = 8
"""The largest number of pairs whose patches are counted, including the shortest and longest; sums are scaled to all pairs."""


def plan(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    sites: str | Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    senders: Nodes | None = None,
    receivers: Nodes | None = None,
    route: Route = "direct",
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
) -> Plan:
    """Estimate what a sweep will take: patches, operations, memory and time.

    The arguments are those of the function to plan, and determine which function that is: `rank_paths` if senders and receivers
    are given, otherwise `rank_components` if `saes` is None, otherwise `rank_features` (both in full and screened).

    One batch is run, gradient estimates on one pair are timed, and the patches of at most eight pairs are counted. With more
    than eight pairs, the counts are estimates, scaled up from eight pairs of different lengths.

    Args:
        model: a TransformerBridge or a HookedTransformer.
        saes: the SAEs whose features are planned for; None for components.
        pairs: clean and corrupted prompts with their answers.
        sites, layers: as in `rank_components`.
        senders, receivers, route: as in `rank_paths`.
        positions: as in the function to plan; not for paths, whose nodes have positions of their own.
        directions, metric, batch_rows: as in the function to plan.

    Returns:
        The plan, with numbers of patches and positions, floating-point operations, bytes and seconds.

    Raises:
        FeatpatchError: the input is unusable, or the arguments belong to different functions.

    Examples:
        >>> plan = fp.plan(model, saes, pairs, positions=["S2"])
        >>> plan.nodes == len(effects.where(kind="feature")), plan.fast
        (True, True)
    """
    some = _of_all_lengths(check_pairs(pairs))
    options = Options(positions=positions, directions=directions, metric=metric, batch_rows=batch_rows)
    _check_one_function(saes, sites, layers, senders, receivers, route, positions)
    if senders is not None and receivers is not None:
        study, _ = path_study(model, some, saes, senders, receivers, route, **options)
    elif saes is None:
        names = DEFAULT_COMPONENTS if sites is None else sites
        study = component_study(model, some, names, layers, **options)
    else:
        study, _ = feature_study(model, saes, some, **options)
    sweep = Sweep(study.path, study.measures, study.rows)
    counts, tried, seconds = np.zeros(3), 0, 0.0
    nodes: Counter[Node] = Counter()
    for of_pairs in study.work():
        for of_pair in of_pairs:
            nodes.update({node for block in of_pair for node in block.nodes if node.kind in RANKED})
        blocks = [*chain(*of_pairs)]
        counts += sweep.cost(blocks)
        if not tried:
            tried, seconds = sweep.trial(blocks)
    patches, rows, flops = (round(count * len(pairs) / len(some)) for count in counts)
    screens = saes is not None and senders is None
    return Plan(
        patches=patches,
        rows=rows,
        flops=flops,
        batch_rows=study.rows,
        memory=study.memory,
        seconds=seconds * flops / tried if tried else 0.0,
        fast=study.fast,
        nodes=_in_all(nodes, len(some), len(pairs)),
        estimate_seconds=estimation_time(model, saes, pairs, positions, study.directions, leading(metric)) if screens else None,
        counted=len(some),
        pairs=len(pairs),
        screens=screens,
    )


def _in_all(counted: "Counter[Node]", some: int, pairs: int) -> int:
    """Estimate how many nodes differ in any of all pairs, from the number of counted pairs in which each does.

    This is the estimate that ecologists use for the number of species in further samples, from the numbers of species seen in
    one and in two samples (Chao et al. 2014, Ecological Monographs 84:45, incidence data). Exact if all pairs were counted.
    """
    seen, once, twice = len(counted), *(sum(count == times for count in counted.values()) for times in (1, 2))
    if some == pairs or not once:
        return seen
    unseen = (some - 1) / some * (once**2 / (2 * twice) if twice else once * (once - 1) / 2)
    if not unseen:
        return seen
    return round(seen + unseen * (1 - (1 - once / (some * unseen + once)) ** (pairs - some)))


def _of_all_lengths(pairs: Pairs) -> Pairs:
    """Return the pairs to count, in their original order."""
    by_length = sorted(range(len(pairs)), key=lambda index: len(pairs[index]))
    chosen = {by_length[place] for place in np.linspace(0, len(pairs) - 1, min(COUNTED, len(pairs))).round().astype(int)}
    return Pairs(tuple(pairs[index] for index in sorted(chosen)))


def _check_one_function(
    saes: Any, sites: Any, layers: Any, senders: Nodes | None, receivers: Nodes | None, route: Route, positions: Positions
) -> None:
    """Raise a FeatpatchError if the arguments belong to different functions."""
    paths = senders is not None or receivers is not None
    given = {"sites": sites, "layers": layers, "senders": senders, "receivers": receivers}
    named = [name for name, value in given.items() if value is not None]
    named += ["saes"] if saes is not None and not paths else []
    named += ["route"] if route != "direct" and not paths else []
    named += ["positions"] if positions != "all" and paths else []
    allowed = {"senders", "receivers"} if paths else {"saes"} if saes is not None else {"sites", "layers"}
    if not set(named) <= allowed or (paths and len(allowed & set(named)) < 2):
        raise FeatpatchError(
            f"fp.plan got {', '.join(named)}: expected senders and receivers (and optionally route, but not positions) for "
            "paths, saes for features, or saes=None (and optionally sites and layers) for components; plan one ranking at a "
            "time"
        )
