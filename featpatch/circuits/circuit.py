"""A circuit, and what can be said of it: is it faithful, complete, minimal, and the same for other pairs?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featpatch.circuits.curve import SHARES, FaithfulnessCurve, sizes_of
from featpatch.circuits.graph import Graph
from featpatch.diagram import graph as graph_of
from featpatch.diagram import interactive
from featpatch.effects import interval
from featpatch.errors import FeatpatchError, check_numbers
from featpatch.page import write
from featpatch.pairs import Pairs
from featpatch.patch import Node


@dataclass(frozen=True)
class Circuit:
    """Some items of a graph.

    Attributes:
        graph: in which everything else can be ablated.
        items: what is kept, the most important first where the search ranks.
        scores: of every item of the graph, by which it was ranked: exact or estimated, see `metadata`; empty if there are none.
        metadata: how it was found, and where it comes from.
        again: finds a circuit in the same way for other pairs.
    """

    graph: Graph
    items: tuple[Node, ...]
    scores: NDArray[np.float64]
    metadata: Mapping[str, Any]
    again: "Callable[[Pairs], Circuit]" = field(repr=False)

    def __len__(self) -> int:
        return len(self.items)

    @cached_property
    def faithfulness(self) -> float:
        """(m(circuit) - m(nothing)) / (m(model) - m(nothing)): the share of the behaviour that the circuit alone has, exact."""
        return float(self.graph.faithfulness(self.graph.values([self.items]))[0])

    @property
    def faithfulness_interval(self) -> tuple[float, float]:
        """95 % bootstrap interval over pairs."""
        low, high = self._interval(self.graph.values([self.items]))[0]
        return float(low), float(high)

    def completeness(self, *, subsets: int = 20, share: float = 0.5, seed: int = 0) -> pd.DataFrame:
        """Is anything outside doing the same? Faithfulness of circuit and of model without the same random part of the circuit.

        A complete circuit and the model lose the same (Wang et al. 2022, section 4: incompleteness is the difference).

        Args:
            subsets: how many; each item is in one with probability `share`.

        Returns:
            One row per subset: `removed` (how many), `circuit`, `model` (faithfulness without them), `incompleteness`.
        """
        check_numbers(1, subsets=subsets)
        check_numbers(0, seed=seed)
        if type(share) not in (int, float) or not 0 <= share <= 1:
            raise FeatpatchError(f"share={share!r}: expected a probability, 0 to 1")
        draws = np.random.default_rng(seed).random((subsets, len(self.items))) < share
        removed = [{item for item, out in zip(self.items, draw, strict=True) if out} for draw in draws]
        of_circuit, of_model = (
            self.graph.faithfulness(self.graph.values([[i for i in items if i not in out] for out in removed]))
            for items in (self.items, self.graph.items)
        )
        return pd.DataFrame({"removed": [len(out) for out in removed], "circuit": of_circuit, "model": of_model,
                             "incompleteness": np.abs(of_circuit - of_model)})  # fmt: skip

    def minimality(self) -> pd.DataFrame:
        """Is everything inside needed? What faithfulness loses when one item leaves the circuit, exact, the least first."""
        if not self.items:
            return pd.DataFrame({"item": [], "loss": []})
        without = self.graph.values([[other for other in self.items if other != item] for item in self.items])
        loss = self.faithfulness - self.graph.faithfulness(without)
        order = np.argsort(loss, kind="stable")
        return pd.DataFrame({"item": [str(self.items[n]) for n in order], "loss": loss[order]})

    def curve(self, shares: Sequence[float] = SHARES) -> FaithfulnessCurve:
        """Faithfulness of the items with the largest |score|, over how many of all they are, with its integrals CPR and CMD.

        Raises:
            FeatpatchError: the search ranked nothing, or a share outside of 0 to 1.
        """
        if not len(self.scores):
            raise FeatpatchError("this search ranked no items: expected a circuit found by method='threshold' for a curve")
        plain = isinstance(shares, Sequence) and all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares)
        if not plain or not shares or list(shares) != sorted(set(shares)):
            raise FeatpatchError(f"shares={shares!r}: expected ascending shares of all items, between 0 and 1")
        order = np.argsort(-np.abs(self.scores), kind="stable")
        sizes = sizes_of(len(order), shares)
        values = self.graph.values([[self.graph.items[number] for number in order[:size]] for size in sizes])
        low, high = self._interval(values).T
        return FaithfulnessCurve(tuple(shares), sizes, self.graph.faithfulness(values), low, high)

    def stability(self, *, resamples: int = 5, seed: int = 0) -> pd.DataFrame:
        """Is it the same circuit for other pairs? Found again for pairs drawn with replacement, among those of each length.

        Returns:
            One row per drawing: `size`, `jaccard` (shared items over all items of both), `faithfulness`, on the pairs drawn.
        """
        check_numbers(1, resamples=resamples)
        check_numbers(0, seed=seed)
        generator, rows = np.random.default_rng(seed), []
        for _ in range(resamples):
            drawn = np.concatenate([self._drawn(group, generator) for group in self.graph.pairs.by_length().values()])
            other = self.again(Pairs(tuple(self.graph.pairs[int(index)] for index in drawn)))
            both, either = set(self.items) & set(other.items), set(self.items) | set(other.items)
            shared = len(both) / len(either) if either else 1.0
            rows.append({"size": len(other), "jaccard": shared, "faithfulness": other.faithfulness})
        return pd.DataFrame(rows)

    def to_networkx(self) -> Any:
        """A `networkx.DiGraph` with the attribute `effect`: the score of each item, 1 where the search ranked nothing."""
        scores = dict(zip(self.graph.items, self.scores, strict=True)) if len(self.scores) else dict.fromkeys(self.items, 1.0)
        return graph_of(self.items, [float(scores[item]) for item in self.items], self.graph.users)

    def report(self, path: str | Path, *, title: str = "") -> Path:
        """Writes the graph as one HTML file, in which a click on a node shows its numbers, as `Effects.report` does."""
        return write(path, interactive(self.to_networkx(), title or repr(self)))

    def __repr__(self) -> str:
        low, high = self.faithfulness_interval
        between = " (a single pair gives no interval)" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        return (
            f"circuit of {len(self.items)} of {len(self.graph.items)} {self.metadata['over']} ({self.metadata['method']}), "
            f"outside {self.graph.to}: faithfulness {self.faithfulness:.2f}{between}, exact, over "
            f"{len(self.graph.pairs)} pairs"
        )

    def _drawn(self, group: Sequence[int], generator: np.random.Generator) -> NDArray[np.int64]:
        """Pairs of one length, with replacement; not all the same where values come from other pairs."""
        while True:
            drawn = generator.choice(group, len(group))
            if self.graph.to == "corrupted" or len(set(drawn.tolist())) > 1:
                return drawn

    def _interval(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return interval(values - self.graph.empty, self.graph.whole - self.graph.empty)
