"""What a sweep will take, before it starts."""

from collections.abc import Sequence
from typing import Any

from featpatch.attribution import estimation_time
from featpatch.cost.plan import Plan
from featpatch.engine import Sweep
from featpatch.pairs import Pairs
from featpatch.pairs.spans import Positions
from featpatch.patch import DIRECTIONS, Direction, Node
from featpatch.patching import Asked, Metrics, feature_study, leading


def plan(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
) -> Plan:
    """What `rank_features` with the same arguments will take, in full and screened.

    One batch is run twice, and a few pairs are estimated twice; nothing is kept.

    Raises:
        FeatpatchError: unusable input.
    """
    study, _ = feature_study(model, saes, pairs, Asked(positions, directions, metric, batch_rows))
    sweep = Sweep(study.path, study.readout.measures, study.rows)
    patches, rows, flops, tried, seconds = 0, 0, 0, 0, 0.0
    nodes: set[Node] = set()
    for swaps, blocks in study.work():
        nodes.update(node for swap in swaps for node in swap.nodes if node.kind == "feature")
        cost = sweep.cost(blocks)
        patches, rows, flops = patches + cost[0], rows + cost[1], flops + cost[2]
        if not tried:
            tried, seconds = sweep.trial(blocks)
    return Plan(
        patches=patches,
        rows=rows,
        flops=flops,
        batch_rows=study.rows,
        memory=study.memory,
        seconds=seconds * flops / tried if tried else 0.0,
        fast=study.fast,
        features=len(nodes),
        estimate_seconds=estimation_time(model, saes, pairs, positions, study.directions, leading(metric)),
    )
