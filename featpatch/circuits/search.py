"""Three methods of circuit search: by threshold, greedily, and by pruning from the output down (ACDC)."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch.circuits.graph import Graph
from featpatch.errors import FeatpatchError, check_numbers
from featpatch.patch import LOGITS, Edge, Node

METHODS = ("threshold", "greedy", "acdc")
"""The names of the search methods."""

ROUNDING = 1e-6
"""The tolerance with which a target counts as reached."""

AHEAD = 16
"""The largest number of pruning steps that are run together."""


def alone(graph: Graph, *, progress: bool = False) -> NDArray[np.float64]:
    """Return the exact loss of the whole model's faithfulness with only one item ablated, for each item, `[items]`."""
    everything = graph.items
    without = [[other for other in everything if other != item] for item in everything]
    whole = graph.faithfulness(graph.values([everything]))[0]
    result: NDArray[np.float64] = whole - graph.faithfulness(graph.values(without, progress=progress))
    return result


def by_threshold(graph: Graph, scores: NDArray[np.float64], threshold: float | None, size: int | None) -> list[Node]:
    """Return the items with a |score| of at least the threshold, or the first `size` items, in descending order of |score|."""
    order = np.argsort(-np.abs(scores), kind="stable")
    count = size if size is not None else int((np.abs(scores) >= (threshold or 0.0)).sum())
    return [graph.items[number] for number in order[:count]]


def greedily(graph: Graph, target: float, size: int | None, *, progress: bool = False) -> list[Node]:
    """Add items, starting from none, that bring faithfulness closest to 1, until the target is reached; return them in order.

    If no single item helps, for example because two are needed together, the item that does least harm is added. Every step
    runs each of the remaining items.
    """
    chosen: list[Node] = []
    rest = list(graph.items)
    now = 0.0
    while rest and now < target - ROUNDING and (size is None or len(chosen) < size):
        found = graph.faithfulness(graph.values([[*chosen, item] for item in rest], progress=progress))
        best = int(np.argmin(np.abs(1 - found)))
        now = float(found[best])
        chosen.append(rest.pop(best))
    return chosen


def along_edges(graph: Graph, scores: NDArray[np.float64], target: float, size: int | None) -> list[Node]:
    """Add edges, starting from the logits: the largest |score| among edges into nodes already reached, until the target is met.

    This is the greedy search of Hanna et al. 2024 (arXiv 2403.17806), with faithfulness measured after every edge.
    """
    edges = [item for item in graph.items if isinstance(item, Edge)]
    rest = [edges[number] for number in np.argsort(-np.abs(scores), kind="stable")]
    reached, chosen = {LOGITS}, list[Node]()
    while size is None or len(chosen) < size:
        following = next((edge for edge in rest if reached.intersection(graph.users(edge.receiver))), None)
        if following is None:
            break
        rest.remove(following)
        chosen.append(following)
        reached.add(following.sender)
        if size is None and graph.faithfulness(graph.values([chosen]))[0] >= target - ROUNDING:
            break
    return chosen


def acdc(graph: Graph, threshold: float, order: Sequence[Node], *, progress: bool = False) -> list[Node]:
    """Remove, one by one from the output down, the items whose removal changes faithfulness by less than the threshold.

    This is algorithm 1 of Conmy et al. 2023 (arXiv 2304.14997), with the change of faithfulness instead of the divergence. Most
    items are removed, so several steps are run together as if all of their items were; the steps after an item that stays are
    run again.
    """
    stays, rest, ahead = list[Node](), list(order), 1
    now = float(graph.faithfulness(graph.values([rest]))[0])
    with tqdm(total=len(rest), desc="pruning", unit="item", disable=not progress) as bar:
        while rest:
            found = graph.faithfulness(graph.values([stays + rest[gone:] for gone in range(1, min(ahead, len(rest)) + 1)]))
            changes = np.abs(np.diff(found, prepend=now))
            gone = int(np.argmax(changes >= threshold)) if (changes >= threshold).any() else len(found)
            now = float(found[gone - 1]) if gone else now
            stays += rest[gone : gone + 1] if gone < len(found) else []
            done = min(gone + 1, len(found))
            rest, ahead = rest[done:], 1 if gone < len(found) else min(2 * ahead, AHEAD)
            bar.update(done)
    return stays


def check_search(method: str, over: str, scores: str, threshold: float | None, size: int | None, target: float) -> None:
    """Check that the options of a search are valid and fit together.

    Raises:
        FeatpatchError: if they are not.
    """
    if method not in METHODS:
        raise FeatpatchError(f"method={method!r}: expected one of {', '.join(METHODS)}")
    if threshold is not None and (type(threshold) not in (int, float) or not threshold > 0):
        raise FeatpatchError(f"threshold={threshold!r}: expected a share of the behaviour above 0, such as 0.01")
    check_numbers(1, size=1 if size is None else size)
    if type(target) not in (int, float) or not 0 < target <= 1:
        raise FeatpatchError(f"target={target!r}: expected a faithfulness above 0, up to 1")
    if size is not None and (method == "acdc" or threshold is not None):
        raise FeatpatchError(
            f"size={size} with method={method!r}, threshold={threshold}: expected a size or a threshold, not both"
        )
    if scores == "estimate" and (over == "nodes" or method == "acdc"):
        raise FeatpatchError(
            f"scores='estimate' over {over} with method={method!r}: expected edges and 'threshold' or 'greedy'; nodes are "
            "estimated by estimate_features and estimate_components"
        )
