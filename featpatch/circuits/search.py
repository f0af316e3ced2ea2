"""Searches for the items of a circuit, by their scores, greedily, or by pruning from the output down (ACDC)."""

import heapq
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch.circuits.attribution import STEPPED, Scores
from featpatch.circuits.curve import ranking
from featpatch.circuits.graph import Graph
from featpatch.engine.journal import to_resume
from featpatch.errors import FeatpatchError, check_choices, check_fractions, check_numbers, is_finite
from featpatch.nodes import LOGITS, Edge, Node

Method = Literal["threshold", "greedy", "acdc"]
"""The name of a search method; see `find_circuit`."""

THRESHOLD = 0.01
"""The default threshold, a share of the behaviour."""

TARGET = 0.9
"""The default faithfulness at which a greedy search stops."""

ROUNDING = 1e-6
"""The tolerance with which a target counts as reached."""

AHEAD = 16
"""The largest number of pruning steps that are run together."""

Search = Iterator[list[int]]
"""A search, step by step: the indices of the items kept after each step, the most important first if the search ranks them."""


def check_threshold(threshold: object) -> None:
    """Raise a FeatpatchError unless the threshold of a search is a finite number above 0."""
    if not is_finite(threshold) or not threshold > 0:
        raise FeatpatchError(f"threshold={threshold!r}: expected a finite fraction of the behaviour above 0, such as 0.01")


def check_search(
    method: str,
    over: str,
    scores: str | None,
    steps: int | None,
    threshold: float | None,
    size: int | None,
    target: float | None,
) -> None:
    """Raise a FeatpatchError unless the options of a search are valid, and the search uses each option that is given."""
    check_choices(get_args(Method), method=method)
    check_choices(get_args(Scores), scores="exact" if scores is None else scores)
    check_numbers(1, steps=1 if steps is None else steps)
    if steps is not None and scores not in STEPPED:
        raise FeatpatchError(
            f"steps={steps} with scores={scores or 'exact'!r}: expected steps only with "
            f"scores={' or '.join(map(repr, STEPPED))}; leave steps out"
        )
    if threshold is not None:
        check_threshold(threshold)
    check_numbers(1, size=1 if size is None else size)
    if target is not None:
        check_fractions(target=target)
    used = {"threshold": ["threshold", "size"], "greedy": ["target", "size"], "acdc": ["threshold"]}[method]
    stops = {name: value for name, value in (("threshold", threshold), ("size", size), ("target", target)) if value is not None}
    said = f"{', '.join(f'{name}={value}' for name, value in stops.items())} with method={method!r}"
    if not stops.keys() <= set(used) or len(stops) > 1:
        raise FeatpatchError(f"{said}: expected {' or '.join(used)}{', not both' * (len(used) > 1)}; leave out what is unused")
    if scores is not None and (method == "acdc" or (method == "greedy" and over == "nodes")):
        raise FeatpatchError(
            f"scores={scores!r} with over={over!r} and method={method!r}: expected no scores, because this search ablates "
            "items step by step; leave scores out"
        )


def exact_scores(graph: Graph, journal: str | Path | None, *, progress: bool) -> NDArray[np.float64]:
    """Return the exact loss of faithfulness with only one item ablated, for each item, `[items]`.

    Raises:
        KeyboardInterrupt: after Ctrl-C, because a part of the scores gives no ranking.
    """
    try:
        whole = graph.faithfulness(graph.values([graph.items]))[0]
        result: NDArray[np.float64] = whole - graph.faithfulness(graph.alone(progress=progress))
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(f"the exact scores are not finished; {to_resume(journal)}") from interrupt
    return result


def estimated_scores(graph: Graph, scores: Scores, steps: int, *, progress: bool) -> NDArray[np.float64]:
    """Return the estimated loss of faithfulness with only one item ablated, for each item, `[items]`."""
    found = graph.estimates(scores, steps, progress=progress)
    return found / (graph.whole.mean() - graph.empty.mean())


def by_threshold(scores: NDArray[np.float64], threshold: float, size: int | None) -> list[int]:
    """Return the indices of the items with a |score| of at least the threshold, or of the first `size`, by falling |score|."""
    count = size if size is not None else int((np.abs(scores) >= threshold).sum())
    return ranking(scores, "absolute")[:count].tolist()


def greedily(graph: Graph, target: float, size: int | None, *, progress: bool = False) -> Search:
    """Add items, starting from none, that bring faithfulness closest to 1, until the target or size is reached.

    If no single item helps, for example because two are needed together, the item that does least harm is added. Every step
    measures each of the remaining items.
    """
    chosen: list[int] = []
    kept, now = np.zeros(len(graph.items), dtype=bool), 0.0
    while not kept.all() and (now < target - ROUNDING if size is None else len(chosen) < size):
        rest = np.flatnonzero(~kept)
        masks = np.tile(kept, (len(rest), 1))
        masks[np.arange(len(rest)), rest] = True
        found = graph.faithfulness(graph.of_masks(masks, progress=progress))
        best = int(np.argmin(np.abs(1 - found)))
        now = float(found[best])
        chosen.append(int(rest[best]))
        kept[rest[best]] = True
        yield chosen


def along_edges(graph: Graph, scores: NDArray[np.float64], target: float, size: int | None) -> Search:
    """Add edges, starting from the logits: the largest |score| among edges into nodes already reached, until the target is met.

    This is the greedy search of Hanna et al. 2024 (arXiv 2403.17806), with faithfulness measured after every edge.
    """
    into = defaultdict[Node, list[tuple[int, int]]](list)
    reached = {edge.receiver for edge in graph.items if isinstance(edge, Edge) and edge.receiver.site == LOGITS.site}
    for place, number in enumerate(ranking(scores, "absolute").tolist()):
        edge = graph.items[number]
        assert isinstance(edge, Edge)
        for user in graph.users(edge.receiver):
            into[user].append((place, number))
    chosen: list[int] = []
    kept, frontier = np.zeros((1, len(graph.items)), dtype=bool), sorted(edge for node in reached for edge in into[node])
    while frontier and (size is None or len(chosen) < size):
        _, number = heapq.heappop(frontier)
        if kept[0, number]:  # an edge into a shared key or value is found once per head
            continue
        edge = graph.items[number]
        assert isinstance(edge, Edge)
        if edge.sender not in reached:
            reached.add(edge.sender)
            for other in into[edge.sender]:
                heapq.heappush(frontier, other)
        kept[0, number] = True
        chosen.append(number)
        yield chosen
        if size is None and graph.faithfulness(graph.of_masks(kept))[0] >= target - ROUNDING:
            break


def acdc(graph: Graph, threshold: float, start: NDArray[np.bool_], *, progress: bool = False) -> Search:
    """Remove, one by one from the output down, items of `start` whose removal changes faithfulness by less than the threshold.

    This is algorithm 1 of Conmy et al. 2023 (arXiv 2304.14997), with the change of faithfulness instead of the divergence. Most
    items are removed, so several steps are run together on the assumption that all of their items are; the steps after an
    item that stays are run again.
    """
    order, kept = np.flatnonzero(start)[::-1], start.copy()
    now, done, ahead = float(graph.faithfulness(graph.of_masks(kept[None]))[0]), 0, 1
    with tqdm(total=len(order), desc="pruning", unit="item", disable=not progress) as bar:
        while done < len(order):
            some = order[done : done + ahead]
            masks = np.tile(kept, (len(some), 1))
            masks[:, some] = ~np.tri(len(some), dtype=bool)
            found = graph.faithfulness(graph.of_masks(masks))
            changes = np.abs(np.diff(found, prepend=now))
            gone = int(np.argmax(changes >= threshold)) if (changes >= threshold).any() else len(found)
            now = float(found[gone - 1]) if gone else now
            kept[some[:gone]] = False
            step = min(gone + 1, len(found))
            done, ahead = done + step, 1 if gone < len(found) else min(2 * ahead, AHEAD)
            bar.update(step)
            yield order[kept[order]].tolist()


def run(search: Search, journal: str | Path | None) -> tuple[list[int], bool]:
    """Run a search and return the indices of the items that it keeps; after Ctrl-C, those of its last full step.

    Returns:
        The indices, and whether the search ran to its end.

    Raises:
        KeyboardInterrupt: after Ctrl-C in the first step.
    """
    found: list[int] = []
    try:
        for step in search:
            found = step
    except KeyboardInterrupt as interrupt:
        if not found:
            raise KeyboardInterrupt(f"the first step of the search is not finished; {to_resume(journal)}") from interrupt
        return found, False
    return found, True
