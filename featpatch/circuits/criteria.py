"""The criteria by which a circuit is tested: completeness, minimality, stability, and agreement with a known circuit.

Completeness and minimality are those of Wang et al. 2022 (arXiv 2211.00593, section 4), as shares of the behaviour.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from featpatch.circuits.curve import Order
from featpatch.circuits.graph import Graph
from featpatch.errors import FeatpatchError, check_numbers, is_number
from featpatch.frame import Frame
from featpatch.nodes import Node
from featpatch.pairs.pairs import Pairs


def completeness(graph: Graph, items: Sequence[Node], subsets: int, share: float, seed: int) -> pd.DataFrame:
    """Return the table of `Circuit.completeness`, which documents the arguments."""
    check_numbers(1, subsets=subsets)
    check_numbers(0, seed=seed)
    if not is_number(share) or not 0 <= share <= 1:
        raise FeatpatchError(f"share={share!r}: expected a probability, 0 to 1")
    draws = np.random.default_rng(seed).random((subsets, len(items))) < share
    removed = np.zeros((subsets, len(graph.items)), dtype=bool)
    removed[:, graph.places(items)] = draws
    of_circuit, of_model = (graph.faithfulness(graph.of_masks(graph.mask(kept) & ~removed)) for kept in (items, graph.items))
    return Frame({"removed": draws.sum(1), "circuit": of_circuit, "model": of_model,
                         "incompleteness": np.abs(of_circuit - of_model)})  # fmt: skip


def minimality(graph: Graph, items: Sequence[Node], faithfulness: float) -> pd.DataFrame:
    """Return the table of `Circuit.minimality` for the items of a circuit with this faithfulness."""
    if not items:
        return Frame({"item": [], "loss": []})
    without = np.tile(graph.mask(items), (len(items), 1))
    without[np.arange(len(items)), graph.places(items)] = False
    loss = faithfulness - graph.faithfulness(graph.of_masks(without))
    order = np.argsort(loss, kind="stable")
    return Frame({"item": [str(items[n]) for n in order], "loss": loss[order]})


def stability(graph: Graph, items: Sequence[Node], again: Callable[[Pairs], Any], resamples: int, seed: int) -> pd.DataFrame:
    """Return the table of `Circuit.stability`, given the function that finds a circuit for other pairs."""
    check_numbers(1, resamples=resamples)
    check_numbers(0, seed=seed)
    generator, rows, times = np.random.default_rng(seed), [], np.zeros(len(items))
    for _ in range(resamples):
        other = again(_resampled(graph, generator))
        rows.append({"size": len(other), "jaccard": jaccard(items, other.items), "faithfulness": other.faithfulness})
        found = set(other.items)
        times += [item in found for item in items]
    table = Frame(rows)
    low, high = np.percentile(table["jaccard"], [2.5, 97.5])
    table.attrs["jaccard"] = (float(table["jaccard"].mean()), float(low), float(high))
    table.attrs["found"] = dict(zip(map(str, items), (times / resamples).tolist(), strict=True))
    return table


def _resampled(graph: Graph, generator: np.random.Generator) -> Pairs:
    """Draw pairs with replacement, within each prompt length.

    Of each length, at least two different pairs are drawn if ablation values come from other pairs.
    """
    different = graph.to in ("mean_by_position", "resample")

    def draw(group: Sequence[int]) -> list[int]:
        while True:
            drawn: list[int] = generator.choice(group, len(group)).tolist()
            if not different or len(set(drawn)) > 1 or len(group) < 2:
                return drawn

    return Pairs(tuple(graph.pairs[index] for group in graph.pairs.by_length().values() for index in draw(group)))


def jaccard(first: Iterable[Node], second: Iterable[Node]) -> float:
    """Return the number of shared nodes over that of all nodes; 1 for two empty circuits."""
    one, other = set(first), set(second)
    return len(one & other) / len(one | other) if one | other else 1.0


def roc_auc(scores: NDArray[np.float64], true: NDArray[np.bool_], order: Order) -> float:
    """Return the area under the ROC curve of scores as a classifier of the true items, see `Circuit.roc_auc`.

    Raises:
        FeatpatchError: none or all items are true.
    """
    if true.all() or not true.any():
        raise FeatpatchError(
            f"the known circuit has {true.sum()} of {len(true)} items: expected at least one item in it and one outside"
        )
    ranked = rankdata(np.abs(scores) if order == "absolute" else scores)
    count = int(true.sum())
    return float((ranked[true].mean() - (count + 1) / 2) / (len(true) - count))
