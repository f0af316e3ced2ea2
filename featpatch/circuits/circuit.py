"""A circuit, with its faithfulness, completeness, minimality and stability, and the integrals CPR and CMD over its size."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featpatch.circuits.files import content_of, to_eap_ig, write_json
from featpatch.circuits.graph import Graph
from featpatch.diagram.draw import figure
from featpatch.diagram.graph import graph as graph_of
from featpatch.diagram.viewers import interactive
from featpatch.effects.statistics import interval
from featpatch.errors import FeatpatchError, check_choices, check_numbers, is_number
from featpatch.nodes import Edge, Node
from featpatch.page.page import Plotted, write
from featpatch.pairs.pairs import Pairs
from featpatch.untrusted import in_figure

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The default shares of all items, as in the MIB benchmark (Mueller et al. 2025, arXiv 2504.13151)."""


NO_EDGES = (
    "A circuit of nodes has no edges: each node is kept or ablated at its hook point, and what it acts through is not "
    "measured. fp.find_circuit(..., over='edges') finds a circuit of edges, and fp.rank_paths(..., senders=circuit.items, "
    "receivers=circuit.items) measures the paths between the nodes of this one."
)
"""What the graph and the page of a circuit of nodes say about edges."""


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve(Plotted):
    """The faithfulness of circuits of growing size, made of the first items of a ranking.

    Attributes:
        shares: the shares of all items.
        sizes: the numbers of items.
        faithfulness: the exact faithfulness of the circuit of each size.
        low, high: the 95 % bootstrap interval over pairs; NaN with a single pair.

    Examples:
        >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
        >>> curve = circuit.curve([0.0, 0.4, 1.0])
        >>> curve.table()["size"].tolist()
        [0, 2, 5]
        >>> 0 <= curve.cpr <= 1
        True
    """

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    faithfulness: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def cpr(self) -> float:
        """The integrated circuit performance ratio: the area under faithfulness over shares; higher is better."""
        return float(np.trapezoid(self.faithfulness, self.shares))

    @property
    def cmd(self) -> float:
        """The integrated circuit-model distance: the area between faithfulness and 1; 0 is best."""
        return float(np.trapezoid(np.abs(1 - self.faithfulness), self.shares))

    def table(self) -> pd.DataFrame:
        """Return a table with one row per size."""
        return pd.DataFrame(
            {"share": self.shares, "size": self.sizes, "faithfulness": self.faithfulness, "low": self.low, "high": self.high}
        )

    def __repr__(self) -> str:
        known = self.table().to_string(index=False, float_format="{:.3g}".format, na_rep="")
        single = "" if np.isfinite(self.low).any() else "; a single pair gives no interval"
        return f"faithfulness by size, CPR {self.cpr:.3g}, CMD {self.cmd:.3g}{single}\n{known}"

    def plot(self, *, title: str = "") -> Any:
        """Return a `plotly.graph_objects.Figure` of faithfulness against the share of items.

        Args:
            title: the title of the figure.
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        axes = {"xaxis_title": "fraction of all items", "yaxis_title": "faithfulness", "xaxis_type": "log"}
        figure = go.Figure(layout={"title": in_figure(title), **axes})
        bars = {
            "type": "data",
            "symmetric": False,
            "array": self.high - self.faithfulness,
            "arrayminus": self.faithfulness - self.low,
        }
        figure.add_scatter(x=list(self.shares), y=self.faithfulness, error_y=bars, mode="lines+markers", text=list(self.sizes))
        figure.add_hline(1.0, line={"dash": "dot", "width": 1})
        return figure

    _figure, _frame = plot, table


def sizes_of(total: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return the number of items that each share of all items is."""
    return tuple(round(share * total) for share in shares)


@dataclass(frozen=True)
class Circuit(Plotted):
    """A circuit: the items (nodes or edges) of a graph that are kept while all others are ablated.

    The criteria of faithfulness, completeness and minimality follow Wang et al. 2022 (arXiv 2211.00593, section 4); here they
    are shares of the behaviour.

    Attributes:
        graph: the graph, in which the complement can be ablated.
        items: the items of the circuit, the most important first if the search ranks.
        scores: the scores of all items of the graph by which they were ranked, exact or estimated (see `metadata`); empty if
            the search ranks nothing.
        metadata: how the circuit was found, and its provenance.
        again: a function that finds a circuit in the same way for other pairs.

    Examples:
        >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
        >>> low, high = circuit.faithfulness_interval
        >>> len(circuit), low <= circuit.faithfulness <= high
        (3, True)
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
        """The exact share of the behaviour that the circuit alone has: (m(circuit) - m(nothing)) / (m(model) - m(nothing))."""
        return float(self.graph.faithfulness(self.graph.values([self.items]))[0])

    @property
    def faithfulness_interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of faithfulness over pairs."""
        low, high = self._interval(self.graph.values([self.items]))[0]
        return float(low), float(high)

    def completeness(self, *, subsets: int = 20, share: float = 0.5, seed: int = 0) -> pd.DataFrame:
        """Test completeness: compare the faithfulness of circuit and model without the same random subsets of the circuit.

        If the circuit is complete, it loses as much as the model; if its complement does the same work, the model loses less
        (Wang et al. 2022, section 4: incompleteness is the difference).

        Args:
            subsets: the number of random subsets.
            share: the probability with which each item is in a subset.
            seed: the seed for the subsets.

        Returns:
            One row per subset: `removed` (the number of items), `circuit` and `model` (faithfulness without them), and
            `incompleteness`.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> circuit.completeness(subsets=2).columns.tolist()
            ['removed', 'circuit', 'model', 'incompleteness']
        """
        check_numbers(1, subsets=subsets)
        check_numbers(0, seed=seed)
        if not is_number(share) or not 0 <= share <= 1:
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
        """Test minimality: return the exact loss of faithfulness without each single item of the circuit, the least first.

        This is the criterion of Wang et al. 2022, section 4, in the case in which no other item is removed.

        Returns:
            One row per item of the circuit: `item` and `loss`, as a share of the behaviour.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> loss = circuit.minimality()["loss"]
            >>> len(loss), loss.is_monotonic_increasing
            (3, True)
        """
        if not self.items:
            return pd.DataFrame({"item": [], "loss": []})
        without = self.graph.values([[other for other in self.items if other != item] for item in self.items])
        loss = self.faithfulness - self.graph.faithfulness(without)
        order = np.argsort(loss, kind="stable")
        return pd.DataFrame({"item": [str(self.items[n]) for n in order], "loss": loss[order]})

    def curve(self, shares: Sequence[float] = SHARES) -> FaithfulnessCurve:
        """Measure the faithfulness of the items with the largest |score|, for growing shares of all items, with CPR and CMD.

        CPR and CMD are the areas of the MIB benchmark (Mueller et al. 2025, arXiv 2504.13151).

        Args:
            shares: ascending shares of all items, between 0 and 1.

        Raises:
            FeatpatchError: if the search ranked nothing, or the shares are not ascending numbers from 0 to 1.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> circuit.curve([0.0, 0.4, 1.0]).sizes
            (0, 2, 5)
        """
        if not len(self.scores):
            raise FeatpatchError(
                "this circuit's search method ranked no items: expected a circuit found by method='threshold'; call "
                "find_circuit again with it to draw a curve"
            )
        plain = isinstance(shares, Sequence) and all(isinstance(share, (int, float)) and 0 <= share <= 1 for share in shares)
        if not plain or not shares or list(shares) != sorted(set(shares)):
            raise FeatpatchError(f"shares={shares!r}: expected fractions of all items in ascending order, between 0 and 1")
        order = np.argsort(-np.abs(self.scores), kind="stable")
        sizes = sizes_of(len(order), shares)
        values = self.graph.values([[self.graph.items[number] for number in order[:size]] for size in sizes])
        low, high = self._interval(values).T
        return FaithfulnessCurve(tuple(shares), sizes, self.graph.faithfulness(values), low, high)

    def stability(self, *, resamples: int = 5, seed: int = 0) -> pd.DataFrame:
        """Test stability: find the circuit again for pairs drawn with replacement, within each length.

        Args:
            resamples: the number of drawings.
            seed: the seed for the drawings.

        Returns:
            One row per drawing: `size`, `jaccard` (items shared with this circuit over the items of either), and `faithfulness`
            on the pairs drawn.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> circuit.stability(resamples=1)["size"].tolist()
            [3]
        """
        check_numbers(1, resamples=resamples)
        check_numbers(0, seed=seed)
        generator, rows = np.random.default_rng(seed), []
        for _ in range(resamples):
            drawn = np.concatenate([self._drawn(group, generator) for group in self.graph.pairs.by_length().values()])
            other = self.again(Pairs(tuple(self.graph.pairs[int(index)] for index in drawn)))
            rows.append({"size": len(other), "jaccard": self._jaccard(other), "faithfulness": other.faithfulness})
        return pd.DataFrame(rows)

    def to_networkx(self) -> Any:
        """Return a `networkx.MultiDiGraph` with the score of each item as attribute `effect`.

        If the search ranked nothing, the effect of every item is 1.

        A circuit of edges gives one edge per item; edges into the query, key and value of a head lead to the node of the head
        and differ in their keys, `"q"`, `"k"` and `"v"`. Where several heads share keys and values, an edge into a shared one
        is there once per head; an edge into a key or value at a position is there once per position of the head. A circuit
        of nodes gives nodes without edges, and `graph.graph["note"]` says which calls measure edges.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> graph = circuit.to_networkx()
            >>> graph.number_of_nodes()
            3
        """
        scores = dict(zip(self.graph.items, self.scores, strict=True)) if len(self.scores) else dict.fromkeys(self.items, 1.0)
        senders = {item.sender for item in self.items if isinstance(item, Edge)}

        def users(receiver: Node) -> list[Node]:
            """The heads that use a key or value in the circuit, or, if there are none, those at its own position."""
            found = self.graph.users(receiver)
            return [user for user in found if user in senders] or [user for user in found if user.position == receiver.position]

        made = graph_of(self.items, [float(scores[item]) for item in self.items], users)
        if self.metadata["over"] == "nodes":
            made.graph["note"] = NO_EDGES
        return made

    def save(self, path: str | Path, *, form: Literal["featpatch", "eap_ig"] = "featpatch") -> Path:
        """Write the circuit, with the scores of all items, to a JSON file, which `fp.load_circuit` reads.

        Args:
            path: the file.
            form: `"featpatch"`, or `"eap_ig"` for the JSON of EAP-IG (`Graph.from_json`), which has edges between embedding,
                heads, MLPs and logits only.

        Returns:
            The path.

        Raises:
            FeatpatchError: the path can't be written to, or EAP-IG's graphs have no such items.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, scores="estimate", size=40, progress=False)
            >>> circuit.save(folder / "edges.json").name
            'edges.json'
        """
        check_choices(("featpatch", "eap_ig"), form=form)
        parts = self.graph, self.items, self.scores
        return write_json(path, to_eap_ig(*parts) if form == "eap_ig" else content_of(*parts, self.metadata))

    def compare(self, other: "Circuit") -> pd.DataFrame:
        """Compare the items of this circuit with those of another one.

        Args:
            other: the other circuit, of the same or of another model.

        Returns:
            One row per item of either circuit: `item`, `first` and `second` (whether this circuit and the other have it), and
            `first_score` and `second_score` if both ranked their items. `table.attrs["jaccard"]` is the number of shared items
            over the number of items of either.

        Raises:
            FeatpatchError: `other` is not a circuit.

        Examples:
            >>> options = {"scores": "estimate", "progress": False}
            >>> small, large = (fp.find_circuit(model, pairs, size=size, **options) for size in (20, 40))
            >>> table = small.compare(large)
            >>> len(table), int(table["first"].sum()), table.attrs["jaccard"]
            (40, 20, 0.5)
        """
        if not isinstance(other, Circuit):
            raise FeatpatchError(f"other is a {type(other).__name__}: expected a circuit, as fp.find_circuit returns it")
        items = list(dict.fromkeys([*self.items, *other.items]))
        table = pd.DataFrame({"item": list(map(str, items))})
        for name, circuit in (("first", self), ("second", other)):
            table[name] = [item in set_of for set_of in [set(circuit.items)] for item in items]
        if len(self.scores) and len(other.scores):
            for name, circuit in (("first_score", self), ("second_score", other)):
                scores = dict(zip(circuit.graph.items, circuit.scores.tolist(), strict=True))
                table[name] = [scores.get(item, np.nan) for item in items]
        table.attrs["jaccard"] = self._jaccard(other)
        return table

    def report(self, path: str | Path, *, title: str = "") -> Path:
        """Write the circuit as one HTML file in which a click on a node shows its numbers, as in `fp.report`.

        Args:
            path: the HTML file.
            title: the title of the page; by default how many items the circuit has.

        Returns:
            The path.

        Raises:
            FeatpatchError: the path is a folder or can't be written to.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> circuit.report(folder / "circuit.html", title="Indirect objects").name
            'circuit.html'
        """
        name = title or f"A circuit of {len(self.items)} {self.metadata['over']}"
        return write(path, interactive(self.to_networkx(), name, answer=self._answer()))

    def _answer(self) -> str:
        """Return what the circuit does, in two sentences."""
        low, high = self.faithfulness_interval
        between = "" if np.isnan(low) else f" [{low:.0%}, {high:.0%}]"
        single = " A single pair gives no interval." if np.isnan(low) else ""
        return (
            f"These {len(self.items):,} of {len(self.graph.items):,} {self.metadata['over']} alone keep "
            f"{self.faithfulness:.0%}{between} of the behaviour, exactly measured over {len(self.graph.pairs)} pairs, while "
            f"all others are ablated to {self.graph.to} values.{single}"
        )

    def __repr__(self) -> str:
        low, high = self.faithfulness_interval
        between = " (a single pair gives no interval)" if np.isnan(low) else f" [{low:.2f}, {high:.2f}]"
        return (
            f"circuit of {len(self.items)} of {len(self.graph.items)} {self.metadata['over']} ({self.metadata['method']}), "
            f"complement ablated to {self.graph.to} values: faithfulness {self.faithfulness:.2f}{between}, exact, over "
            f"{len(self.graph.pairs)} pairs"
        )

    def _jaccard(self, other: "Circuit") -> float:
        both, either = set(self.items) & set(other.items), set(self.items) | set(other.items)
        return len(both) / len(either) if either else 1.0

    def _figure(self) -> Any:
        return figure(self.to_networkx())

    def _frame(self) -> pd.DataFrame:
        scores = dict(zip(self.graph.items, self.scores, strict=True)) if len(self.scores) else {}
        columns: dict[str, list[Any]] = {"item": [str(item) for item in self.items]}
        if scores:
            columns["score"] = [scores[item] for item in self.items]
        return pd.DataFrame(columns)

    def _drawn(self, group: Sequence[int], generator: np.random.Generator) -> NDArray[np.int64]:
        """Draw pairs of one length with replacement; at least two different ones if ablation values come from other pairs."""
        while True:
            drawn = generator.choice(group, len(group))
            if self.graph.to not in ("mean_by_position", "resample") or len(set(drawn.tolist())) > 1 or len(group) < 2:
                return drawn

    def _interval(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        return interval(values - self.graph.empty, self.graph.whole - self.graph.empty)
