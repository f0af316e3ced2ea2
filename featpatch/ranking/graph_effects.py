"""An attribution graph beside the model: the exact effects of its nodes, and of its strongest edges, by ablation."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import rankdata

from featpatch import sites
from featpatch.effects.audit import Array
from featpatch.effects.statistics import spearman
from featpatch.engine.journal import beside
from featpatch.errors import FeatpatchError, check_kinds, check_numbers, counted, decimal
from featpatch.frame import Frame
from featpatch.model.lens import Lens
from featpatch.model.projections import rounding
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Node
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs
from featpatch.ranking.nodes import complete, rank_nodes
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.tracing.prompt import prompt_of
from featpatch.tracing.result import AttributionGraph
from featpatch.untrusted import in_figure, visible

NAMED = 8
"""The number of nodes with the largest exact effects that are named in a figure."""

ROWS = 64
"""The largest number of sources that are ablated in one forward pass."""


@dataclass(frozen=True)
class EdgeEffect:
    """An edge of a graph and the exact change of its target, all as what is lost when the source is ablated.

    Attributes:
        source, target: the nodes.
        graph: the edge in the graph, with everything frozen.
        frozen: the exact change of the target's pre-activation with attention patterns frozen, and the scales of norms live.
        live: that with patterns and scales live. MLPs keep their outputs in both, as they do in an edge.
    """

    source: str
    target: str
    graph: float
    frozen: float
    live: float


@dataclass(frozen=True, eq=False, repr=False)
class GraphEffects:
    """The nodes of an attribution graph with their exact effects on its logits.

    The effects are on the sum of the target logits, each minus the mean logit and weighted by its probability, and positive
    where the node supports them.

    Attributes:
        nodes: the features and errors of the graph.
        names: their names.
        influence: the influence of each.
        predicted: the effect of ablating each that the complete graph predicts along all paths, see `AttributionGraph.totals`.
        exact: the effect of ablating each in the model, with everything live.
        edges: the strongest edges between features.
        swapped: the effect of giving each its value in the corrupted prompt instead; None without a pair.

    Examples:
        >>> graph = fp.attribution_graph(model, demo.transcoders, pairs[0], progress=False).prune(nodes=0.5)
        >>> found = fp.graph_effects(model, demo.transcoders, graph, edges=3, progress=False)
        >>> found.to_pandas(2).columns.tolist()
        ['node', 'influence', 'predicted', 'exact', 'overrated']
        >>> len(found.edges)
        3
    """

    nodes: tuple[Node, ...]
    names: tuple[str, ...]
    influence: Array
    predicted: Array
    exact: Array
    edges: tuple[EdgeEffect, ...]
    swapped: Array | None = None

    @property
    def spearman(self) -> float:
        """The rank correlation of influence with the size of the exact effects."""
        return spearman(self.influence, abs(self.exact))

    @property
    def spearman_predicted(self) -> float:
        """The rank correlation of the predicted with the exact effects, with their signs."""
        return spearman(self.predicted, self.exact)

    @property
    def overrated(self) -> Array:
        """The number of ranks that each node is higher by influence than by the size of its exact effect; negative if lower."""
        found: Array = rankdata(-abs(self.exact)) - rankdata(-self.influence)
        return found

    def to_pandas(self, n: int | None = None) -> Any:
        """Return a table of the nodes, the largest exact effect first.

        Args:
            n: the number of rows; all by default.
        """
        check_numbers(0, n=0 if n is None else n)
        order = np.argsort(-abs(self.exact), kind="stable")[:n]
        columns = {"influence": self.influence, "predicted": self.predicted, "exact": self.exact}
        columns |= {} if self.swapped is None else {"swapped": self.swapped}
        columns["overrated"] = self.overrated
        return Frame({"node": [self.names[row] for row in order], **{name: of[order] for name, of in columns.items()}})

    def plot(self, *, title: str = "") -> Any:
        """Return a `plotly.graph_objects.Figure` of exact effects against influence, with the nodes' names.

        Args:
            title: the title of the figure.
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        axes = {"xaxis_title": "influence in the graph", "yaxis_title": "exact effect of ablating the node"}
        figure = go.Figure(layout={"title": in_figure(title), "xaxis_type": "log", **axes})
        largest = np.argsort(-abs(self.exact), kind="stable")[:NAMED].tolist()
        texts = [in_figure(name) if row in largest else "" for row, name in enumerate(self.names)]
        hover = {"hovertext": [in_figure(name) for name in self.names], "hoverinfo": "text+x+y"}
        return figure.add_scatter(
            x=self.influence, y=self.exact, mode="markers+text", text=texts, textposition="top center", **hover
        )

    def edges_to_pandas(self) -> Any:
        """Return a table of the strongest edges with the exact changes of their targets."""
        return Frame([(each.source, each.target, each.graph, each.frozen, each.live) for each in self.edges],
                     columns=["source", "target", "graph", "frozen", "live"])  # fmt: skip

    def __repr__(self) -> str:
        return visible(
            f"exact effects of {counted(len(self.nodes), 'node')} of a graph: Spearman {decimal(self.spearman)} of influence "
            f"with their size, {decimal(self.spearman_predicted)} of the predicted with the exact effects\n{self.to_pandas(10)}"
        )


@torch.no_grad()
def graph_effects(
    model: Any,
    transcoders: Any,
    graph: AttributionGraph,
    *,
    pair: Pair | None = None,
    edges: int = 20,
    journal: str | Path | None = None,
    progress: bool = True,
) -> GraphEffects:
    """Measure by ablation what the nodes and the strongest edges of an attribution graph do in the model itself.

    Each feature and error is set to zero at its position in one run of the model, with attention, norms and MLPs live. For
    edges, the source is ablated while the MLPs keep their outputs, once with attention patterns frozen and once live, so that
    the difference is what the edge does through patterns, which a graph does not see.

    Args:
        model, transcoders: those that the graph is of.
        graph: an attribution graph, pruned first because every node is a run.
        pair: a pair whose clean prompt is that of the graph; each node is then also given its value in the corrupted prompt.
        edges: the number of edges between features, the largest first.
        journal: a file to which finished ablations are written, and from which an interrupted call resumes; the values of the
            corrupted prompt are written to a second file, with `.swapped` at the end of its name.
        progress: whether to show a progress bar.

    Returns:
        Influence, predicted and exact effects by node, their rank correlations, and a table of edges.

    Raises:
        FeatpatchError: the graph has no features and errors, is of another model or other transcoders, or the pair has
            another prompt or a corrupted one of another length.
        KeyboardInterrupt: after Ctrl-C; with a journal, the same call resumes.

    Examples:
        >>> graph = fp.attribution_graph(model, demo.transcoders, pairs[0], progress=False).prune(nodes=0.5)
        >>> found = fp.graph_effects(model, demo.transcoders, graph, progress=False)
        >>> -1 <= found.spearman <= 1
        True
    """
    check_kinds(AttributionGraph, graph=graph)
    check_kinds((Pair, NoneType), pair=pair)
    check_numbers(0, edges=edges)
    if pair is not None and (pair.clean != graph.prompt or len(pair.corrupted) != len(pair.clean)):
        raise FeatpatchError(
            f"pair has a clean prompt of {len(pair.clean)} and a corrupted one of {len(pair.corrupted)} tokens: expected the "
            "graph's prompt, and a corrupted one of the same length; make the graph with fp.attribution_graph(..., pair)"
        )
    lens = wrap(model)
    known = {each.name: each for each in dictionaries(lens, transcoders)}
    kept = [n for n, node in enumerate(graph.nodes) if node.kind != "logit" and node.site != sites.EMBEDDING]
    nodes = tuple(graph.nodes[n] for n in kept)
    unknown = next((node for node in nodes if node.sae and node.sae not in known), None)
    if not nodes or unknown is not None:
        had = "no features and errors" if unknown is None else f"nodes of {unknown.sae!r}"
        raise FeatpatchError(
            f"the graph has {had}: expected nodes of {', '.join(map(repr, known))}; pass the graph's transcoders"
        )
    runs = _Runs(lens, known, graph)
    runs.check()
    tokens = [node.index for node in graph.nodes if node.kind == "logit" and node.index is not None]
    weights = torch.from_numpy(graph.probabilities)

    def supported(logits: torch.Tensor, correct: Sequence[int], wrong: Sequence[int]) -> torch.Tensor:
        del correct, wrong
        return (logits[:, tokens] - logits.mean(-1, keepdim=True)) @ weights.to(logits)

    prompt = Pairs((Pair(graph.prompt, graph.prompt, tuple(tokens), ()),))
    options: dict[str, Any] = {"saes": transcoders, "metric": supported, "together": False, "progress": progress}
    effects = complete(rank_nodes(model, prompt, list(nodes), to="zero", journal=journal, **options), journal)
    exact, swapped = effects.pooled("degradation"), None
    if pair is not None:
        both = Pairs((Pair(graph.prompt, pair.corrupted, tuple(tokens), ()),))
        second = beside(journal, ".swapped")
        patched = complete(rank_nodes(model, both, list(nodes), directions=["noising"], journal=second, **options), journal)
        swapped = patched.changes("degradation").toarray()[:, 0]
    names = tuple(graph.name(n) for n in kept)
    found = _edges(runs, edges)
    return GraphEffects(
        nodes, names, graph.influence[kept].astype(float), graph.totals[kept].astype(float), exact.astype(float), found, swapped
    )


def _edges(runs: "_Runs", count: int) -> tuple[EdgeEffect, ...]:
    """Measure the strongest edges between features."""
    graph = runs.graph
    inside = np.array([node.kind == "feature" for node in graph.nodes])
    size = abs(graph.adjacency) * inside[:, None] * inside
    order = np.argsort(-size, axis=None, kind="stable")[:count]
    ends = [divmod(int(place), len(graph.nodes)) for place in order if size.flat[place]]
    if not ends:
        return ()
    sources = list(dict.fromkeys(source for _, source in ends))
    changed = {frozen: runs.changes(sources, sorted({target for target, _ in ends}), frozen) for frozen in (True, False)}
    return tuple(
        EdgeEffect(
            graph.name(source), graph.name(target), float(graph.adjacency[target, source]),
            changed[True][source, target], changed[False][source, target],
        )
        for target, source in ends
    )  # fmt: skip


class _Runs:
    """Runs of a graph's prompt in which a source is ablated and MLPs keep their outputs."""

    def __init__(self, lens: Lens, known: dict[str, Dictionary], graph: AttributionGraph) -> None:
        self.lens, self.known, self.graph = lens, known, graph
        self.tokens = torch.tensor([prompt_of(lens, graph.prompt)[0]])
        layers = range(lens.n_layers)
        self.mlps = {hook for each in known.values() for hook in each.outputs}
        covered = {sites.layer_of(hook) for hook in self.mlps}
        self.mlps |= {sites.component(layer, "mlp_out") for layer in layers if lens.has_mlp(layer) and layer not in covered}
        self.patterns = [sites.component(layer, "pattern") for layer in layers]
        reads = {hook for each in known.values() for hook in each.inputs}
        self.clean = lens.read(self.tokens, sorted({*self.mlps, *self.patterns, *reads}))
        self.features = {name: each.split(self.clean).features[0] for name, each in known.items()}

    def check(self) -> None:
        """Raise a FeatpatchError unless features have the values that they have in the graph."""
        numbers = [n for n, node in enumerate(self.graph.nodes) if node.kind == "feature"]
        values = self.graph.values[numbers]
        for number, value in zip(numbers, values, strict=True):
            now = self._value(number)
            if not abs(now - value) <= rounding(self.lens) * abs(values).max():
                raise FeatpatchError(
                    f"{self.graph.name(number)} is {now:.3g}, and {value:.3g} in the graph: expected equal values; pass the "
                    "model and the transcoders of the graph"
                )

    def _value(self, number: int) -> float:
        """Return the value of a feature of the graph; NaN if the transcoder has no such feature."""
        node = self.graph.nodes[number]
        owner = self.known[node.sae]
        assert node.index is not None
        known = node.index < owner.per_group
        return float(self.features[node.sae][int(node.position), owner.number(node)]) if known else float("nan")

    def changes(self, sources: Sequence[int], targets: Sequence[int], frozen: bool) -> dict[tuple[int, int], float]:
        """Return what each target's pre-activation loses when each source is ablated."""
        found: dict[tuple[int, int], float] = {}
        encoders = {target: self._encoder(target) for target in targets}
        hooks = sorted({hook for hook, _ in encoders.values()})
        for start in range(0, len(sources), ROWS):
            some = sources[start : start + ROWS]
            put = {hook: self.clean[hook].repeat(len(some), *[1] * (self.clean[hook].ndim - 1)) for hook in self.mlps}
            if frozen:
                put |= {hook: self.clean[hook].expand(len(some), -1, -1, -1) for hook in self.patterns}
            for row, source in enumerate(some):
                for hook, change in self._written(source).items():
                    put[hook][row, int(self.graph.nodes[source].position)] -= change.to(put[hook])
            with self.lens.put(put):
                read = self.lens.read(self.tokens.expand(len(some), -1), hooks)
            for target, (hook, encoder) in encoders.items():
                at = int(self.graph.nodes[target].position)
                lost = (self.clean[hook][0, at] - read[hook][:, at]).to(encoder) @ encoder
                found |= {(source, target): float(value) for source, value in zip(some, lost, strict=True)}
        return found

    def _written(self, number: int) -> dict[str, Float[torch.Tensor, " d_model"]]:
        """Return what a feature writes, by hook point."""
        node = self.graph.nodes[number]
        owner = self.known[node.sae]
        directions = owner.by_output(owner.directions(torch.tensor([owner.number(node)])))
        return {hook: vector[0] * self._value(number) for hook, vector in directions.items()}

    def _encoder(self, number: int) -> tuple[str, Float[torch.Tensor, " d_in"]]:
        """Return the hook point that a feature reads, and its encoder."""
        node = self.graph.nodes[number]
        owner = self.known[node.sae]
        index = owner.number(node)
        found = owner.codec.encoders(torch.tensor([index]))
        assert found is not None
        return owner.inputs[index // owner.per_group if len(owner.inputs) > 1 else 0], found[0][0]
