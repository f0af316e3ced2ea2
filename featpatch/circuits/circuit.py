"""A circuit, with its faithfulness, completeness, minimality and stability, and how it compares with another one."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featpatch.circuits import criteria
from featpatch.circuits.curve import SHARES, FaithfulnessCurve, Order, curve_of
from featpatch.circuits.files import content_of, to_eap_ig, write_json
from featpatch.circuits.graph import Graph
from featpatch.circuits.search import acdc, check_threshold, run
from featpatch.diagram.draw import figure
from featpatch.diagram.graph import graph as graph_of
from featpatch.diagram.viewers import interactive
from featpatch.effects.statistics import interval
from featpatch.errors import FeatpatchError, check_choices, check_kinds, counted, decimal
from featpatch.frame import Frame
from featpatch.nodes import Edge, Node
from featpatch.page.page import Plotted, write
from featpatch.pairs.pairs import Pairs

NO_EDGES = (
    "A circuit of nodes has no edges: each node is kept or ablated at its hook point, and what it acts through is not "
    "measured. fp.find_circuit(..., over='edges') finds a circuit of edges, and fp.rank_paths(..., senders=circuit.items, "
    "receivers=circuit.items) measures the paths between the nodes of this one."
)
"""The note about edges on the graph and the page of a circuit of nodes."""


@dataclass(frozen=True)
class Circuit(Plotted):
    """A circuit: the items (nodes or edges) of a graph that are kept while all others are ablated.

    The criteria of faithfulness, completeness and minimality follow Wang et al. 2022 (arXiv 2211.00593, section 4); here they
    are shares of the behaviour.

    Attributes:
        graph: the graph, in which the complement can be ablated.
        items: the items of the circuit, the most important first if the search ranks them.
        scores: the scores by which all items of the graph were ranked, in the order of `graph.items`; empty if the
            search ranked nothing.
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
        """The exact share of the behaviour that the circuit keeps: (m(circuit) - m(nothing)) / (m(model) - m(nothing))."""
        return float(self.graph.faithfulness(self.graph.values([self.items]))[0])

    @property
    def faithfulness_interval(self) -> tuple[float, float]:
        """The 95 % bootstrap interval of faithfulness over pairs."""
        graph = self.graph
        low, high = interval(graph.values([self.items]) - graph.empty, graph.whole - graph.empty)[0]
        return float(low), float(high)

    def completeness(self, *, subsets: int = 20, share: float = 0.5, seed: int = 0) -> pd.DataFrame:
        """Test completeness: compare circuit and model after random subsets of the circuit are removed from both.

        A complete circuit loses as much faithfulness as the model. If its complement can do the same work, the model loses
        less. The difference is the incompleteness (Wang et al. 2022, section 4).

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
        return criteria.completeness(self.graph, self.items, subsets, share, seed)

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
        return criteria.minimality(self.graph, self.items, self.faithfulness)

    def refine(self, *, threshold: float = 0.01, journal: str | Path | None = None, progress: bool = True) -> "Circuit":
        """Remove, one by one from the output down, the items whose removal changes faithfulness by less than the threshold.

        This is ACDC (Conmy et al. 2023, arXiv 2304.14997), started from this circuit instead of the whole model. So a circuit
        found by estimates can be pruned exactly where ACDC over all edges would take days. The removal of every item is
        measured, with all earlier removals in place.

        Args:
            threshold: a share of the behaviour.
            journal: as in `find_circuit`.
            progress: whether to show a progress bar.

        Returns:
            The smaller circuit. After Ctrl-C it is the circuit of the last full step, and `finished` is False.

        Raises:
            FeatpatchError: the threshold is not a number above 0, or the journal is that of another graph.
            KeyboardInterrupt: after Ctrl-C in the first step.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> len(circuit.refine(threshold=0.05, progress=False)) <= len(circuit)
            True
        """
        check_threshold(threshold)
        threshold = float(threshold)
        with self.graph.journal(journal):
            numbers, finished = run(acdc(self.graph, threshold, self.graph.mask(self.items), progress=progress), journal)
        kept = {self.graph.items[number] for number in numbers}
        metadata = {
            **self.metadata,
            "refined": [*self.metadata.get("refined", []), threshold],
            "finished": self.finished and finished,
        }
        return replace(
            self,
            items=tuple(item for item in self.items if item in kept),
            metadata=metadata,
            again=lambda pairs: self.again(pairs).refine(threshold=threshold, progress=False),
        )

    def curve(self, shares: Sequence[float] | NDArray[Any] = SHARES, *, order: Order = "signed") -> FaithfulnessCurve:
        """Measure the faithfulness of the first items by score, for growing shares of all items, with CPR and CMD.

        This is what the evaluator of the MIB benchmark does (`evaluate_area_under_curve`; Mueller et al. 2025, arXiv
        2504.13151). For each share, the first `floor(share * n)` of the n items are kept. Edges whose sender is not reached
        from the embedding, or whose receiver does not lead to the logits, are then removed. Faithfulness is
        (m(circuit) - m(nothing)) / (m(model) - m(nothing)), with means over pairs. CPR is the area under faithfulness, and CMD
        that under |1 - faithfulness|, over the share, by the trapezoidal rule on a linear scale.

        A score is the loss of faithfulness without an item, so items with negative scores work against the behaviour. In
        signed order they are added last. In absolute order they are added as early as items that help as much, which keeps the
        circuit closer to the model and often gives it less faithfulness. Both orders are measured and shown, because they can
        differ a lot; MIB's evaluator can use either.

        Args:
            shares: ascending shares of all items, between 0 and 1; with a single one CPR and CMD are NaN.
            order: the order of the curve that is returned; the curve in the other order is its attribute `other`.

        Raises:
            FeatpatchError: the search ranked nothing, or the shares are not ascending numbers from 0 to 1.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> curve = circuit.curve([0.0, 0.4, 1.0])
            >>> curve.sizes, curve.other.order
            ((0, 2, 5), 'absolute')
        """
        self._check_ranked("draw a curve")
        return curve_of(self.graph, self.scores, shares, order)

    def roc_auc(self, known: "Circuit | Iterable[Node]", *, order: Order = "signed") -> float:
        """Return the area under the ROC curve of the scores as a classifier of the items of a known circuit.

        It is the probability that an item of the known circuit has a larger score than another item, where equal scores count
        half: 1 if all true items come first, 0.5 for chance. It covers the whole ranking, whereas MIB's
        `evaluate_area_under_roc` returns the rates at ten circuit sizes and no area.

        Args:
            known: the true circuit of the same graph, or its items.
            order: whether items are ranked by their scores or by their |scores|.

        Raises:
            FeatpatchError: the search ranked nothing, a known item is not in the graph, or none or all items are known.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, scores="estimate", size=40, progress=False)
            >>> circuit.roc_auc(circuit.items, order="absolute")
            1.0
        """
        check_choices(get_args(Order), order=order)
        self._check_ranked("compare their order with a known circuit")
        true = self.graph.mask(known.items if isinstance(known, Circuit) else known)
        return criteria.roc_auc(self.scores, true, order)

    def stability(self, *, resamples: int = 5, seed: int = 0) -> pd.DataFrame:
        """Test stability by bootstrap: find the circuit again for pairs drawn with replacement, within each prompt length.

        Args:
            resamples: the number of bootstrap samples; the interval needs some tens of them.
            seed: the seed for the samples.

        Returns:
            One row per sample: `size`, `jaccard` (items shared with this circuit over the items of either), and `faithfulness`
            on the sampled pairs. `table.attrs["jaccard"]` has the mean and the ends of the 95 % percentile interval of that
            column, and `table.attrs["found"]` the share of samples in which each item of this circuit was found again.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> stable = circuit.stability(resamples=2)
            >>> stable["size"].tolist(), len(stable.attrs["found"])
            ([3, 3], 3)
        """
        return criteria.stability(self.graph, self.items, self.again, resamples, seed)

    def to_networkx(self) -> Any:
        """Return a `networkx.MultiDiGraph` with the score of each item as attribute `effect`.

        If the search ranked nothing, the effect of every item is 1.

        A circuit of edges gives one edge per item. Edges into the query, key and value of a head lead to the node of the head
        and have the keys `"q"`, `"k"` and `"v"`. An edge into a key or value that several heads share appears once per head,
        and one into a key or value at a position once per position of the head. A circuit of nodes gives nodes without edges,
        and `graph.graph["note"]` says which calls measure edges.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> graph = circuit.to_networkx()
            >>> graph.number_of_nodes()
            3
        """
        scores = self._score_of() or dict.fromkeys(self.items, 1.0)
        senders = {item.sender for item in self.items if isinstance(item, Edge)}

        def users(receiver: Node) -> list[Node]:
            """Return the heads that use a key or value in the circuit or, if there are none, those at its own position."""
            found = self.graph.users(receiver)
            return [user for user in found if user in senders] or [user for user in found if user.position == receiver.position]

        made = graph_of(self.items, [scores[item] for item in self.items], users)
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
            FeatpatchError: the path can't be written to, or EAP-IG's format can't hold the items.

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
            over that of all. `table.attrs["nodes"]` lists the shared nodes (of a circuit of edges, the nodes that they
            connect), and `table.attrs["node_jaccard"]` is their number over that of all nodes.

        Raises:
            FeatpatchError: `other` is not a circuit.

        Examples:
            >>> options = {"scores": "estimate", "progress": False}
            >>> small, large = (fp.find_circuit(model, pairs, size=size, **options) for size in (20, 40))
            >>> table = small.compare(large)
            >>> len(table), int(table["first"].sum()), table.attrs["jaccard"]
            (40, 20, 0.5)
            >>> table.attrs["node_jaccard"] >= table.attrs["jaccard"]
            True
        """
        if not isinstance(other, Circuit):
            raise FeatpatchError(f"other is a {type(other).__name__}: expected a circuit, as fp.find_circuit returns it")
        items = list(dict.fromkeys([*self.items, *other.items]))
        table = Frame({"item": list(map(str, items))})
        for name, circuit in (("first", self), ("second", other)):
            kept = set(circuit.items)
            table[name] = [item in kept for item in items]
        if len(self.scores) and len(other.scores):
            for name, circuit in (("first_score", self), ("second_score", other)):
                scores = circuit._score_of()
                table[name] = [scores.get(item, np.nan) for item in items]
        table.attrs["jaccard"] = criteria.jaccard(self.items, other.items)
        mine, others = (list(circuit.to_networkx()) for circuit in (self, other))
        table.attrs["nodes"] = [str(node) for node in mine if node in others]
        table.attrs["node_jaccard"] = criteria.jaccard(mine, others)
        return table

    def report(self, path: str | Path, *, title: str = "") -> Path:
        """Write the circuit as a single HTML file in which a click on a node shows its numbers, as in `fp.report`.

        Args:
            path: the HTML file.
            title: the title of the page; by default how many items the circuit has.

        Returns:
            The path.

        Raises:
            FeatpatchError: the path is a folder or can't be written to, or the title is not a string.

        Examples:
            >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
            >>> circuit.report(folder / "circuit.html", title="Indirect objects").name
            'circuit.html'
        """
        check_kinds(str, title=title)
        name = title or f"A circuit of {len(self.items)} {self.metadata['over']}"
        return write(path, interactive(self.to_networkx(), name, answer=self._answer()))

    def _answer(self) -> str:
        """Return what the circuit does, in a sentence or two."""
        low, high = self.faithfulness_interval
        between = "" if np.isnan(low) else f" [{decimal(low, '.0%')}, {decimal(high, '.0%')}]"
        single = " A single pair gives no interval." if np.isnan(low) else ""
        return (
            f"These {len(self.items):,} of {len(self.graph.items):,} {self.metadata['over']} alone keep "
            f"{decimal(self.faithfulness, '.0%')}{between} of the behaviour, exactly measured over "
            f"{counted(len(self.graph.pairs), 'pair')}, while all others are ablated to {self.graph.to} values.{single}"
        )

    def __repr__(self) -> str:
        low, high = self.faithfulness_interval
        between = " (a single pair gives no interval)" if np.isnan(low) else f" [{decimal(low)}, {decimal(high)}]"
        others = "complement" if len(self.items) < len(self.graph.items) else "everything else at these hook points"
        return (
            f"circuit of {len(self.items)} of {len(self.graph.items)} {self.metadata['over']} ({self._search()}), "
            f"{others} ablated to {self.graph.to} values: faithfulness {decimal(self.faithfulness)}{between}, exact, over "
            f"{counted(len(self.graph.pairs), 'pair')}"
        )

    def _search(self) -> str:
        """Return the method of the search, its scores, the threshold of `refine`, and whether it was interrupted."""
        scores = self.metadata.get("scores")
        refined = [f"refined at {threshold:.3g}" for threshold in self.metadata.get("refined", [])]
        interrupted = "" if self.finished else "interrupted"
        none = "" if self.items else "nothing reached its threshold or target: pass size="
        return ", ".join(filter(None, (self.metadata["method"], scores and f"scores={scores!r}", *refined, none, interrupted)))

    @property
    def finished(self) -> bool:
        """Whether the search ran to its end; False if a greedy search, ACDC or `refine` was interrupted."""
        return bool(self.metadata.get("finished", True))

    def _score_of(self) -> dict[Node, float]:
        """Return the score of each item of the graph; empty if the search ranked nothing."""
        return dict(zip(self.graph.items, self.scores.tolist(), strict=True)) if len(self.scores) else {}

    def _check_ranked(self, purpose: str) -> None:
        """Raise a FeatpatchError unless the search scored all items."""
        if not len(self.scores):
            raise FeatpatchError(
                "this circuit's search method ranked no items: expected a circuit found by method='threshold'; call "
                f"find_circuit again with it to {purpose}"
            )

    def _figure(self) -> Any:
        return figure(self.to_networkx())

    def _frame(self) -> pd.DataFrame:
        columns: dict[str, list[Any]] = {"item": [str(item) for item in self.items]}
        if scores := self._score_of():
            columns["score"] = [scores[item] for item in self.items]
        return Frame(columns)
