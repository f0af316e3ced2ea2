"""The graph of nodes, whose scores are estimated from gradients where dictionaries and other hook points write."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from featpatch import sites
from featpatch.circuits.attribution import ESTIMATED_AT_ONCE, Point
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.node_runs import NodeRuns, of_sae
from featpatch.errors import FeatpatchError
from featpatch.model.backward import modified
from featpatch.model.lens import Edit
from featpatch.nodes import Edge, Node
from featpatch.sae.codec import Split


@dataclass(eq=False, repr=False)
class NodeGraph(NodeRuns):
    """The graph of candidate nodes, whose scores can be estimated."""

    def edge_counts(self, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the number of the model's edges between the nodes that each circuit keeps, the embedding and the logits.

        This is the MIB benchmark's weighted edge count for circuits of whole nodes, where components that are not candidates
        are kept. It is defined if all candidates are heads or MLP outputs at all positions, and NaN otherwise, because
        features, errors and single positions are only parts of such nodes.
        """
        if any(not _is_component(node) for node in self.items):
            return np.full(len(masks), np.nan)
        graph = EdgeGraph(self.lens, self.pairs, self.to, self.measures)
        senders = [edge.sender for edge in graph.items if isinstance(edge, Edge)]
        ablated = [{self.items[number] for number in np.flatnonzero(~mask)} for mask in masks]
        return graph.edge_counts(graph.pruned(np.array([[sender not in out for sender in senders] for out in ablated])))

    def components(self) -> list[tuple[Node, ...]]:
        """Return the candidates of each dictionary and of each other hook point."""
        return list(self._by_component().values())

    def _by_component(self) -> dict[str, tuple[Node, ...]]:
        """Return the candidates by the names of dictionaries and of other hook points."""
        found: dict[str, list[Node]] = {}
        for _, node in self.members:
            found.setdefault(node.sae or node.site, []).append(node)
        return {name: tuple(nodes) for name, nodes in found.items()}

    def slopes(
        self, some: Sequence[int], points: Sequence[Point], weights: torch.Tensor, done: Callable[[int], object]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Estimate from gradients where dictionaries and other hook points write, in runs where all candidates are kept."""
        total, values = self._zeros(len(self.items)), self._zeros(len(points), len(some))
        entry, size = self._entry(some), max(1, ESTIMATED_AT_ONCE // len(self.runs[some[0]]))
        for part in (slice(start, start + size) for start in range(0, len(some), size)):
            others = {name: _rows(other, part) for name, other in self._ablation_values(some).items()}
            base = _Gradients(self, some[part], others, entry[part])
            for number, point in enumerate(points):
                values[number, part] = base.add(point, weights[number, part])
                done(len(some[part]))
            total += base.slopes()
        return total, values

    def _entry(self, some: Sequence[int]) -> torch.Tensor:
        """Return the ablation value of the input of the first layer; the positions outside `_ablatable` keep their values."""
        first, others = sites.resid_pre(0), self.others(some)
        if others is not None:
            return self.lens.read(others, [first])[first]
        clean = self.lens.read(self.prompts(some)[0], [first])[first]
        (fixed,) = self.everywhere(first, (clean[0],), clean.shape[1])
        return torch.where(self._ablatable(some)[0].to(clean.device), fixed, clean)


@dataclass(eq=False, repr=False)
class _Gradients:
    """Gradients where dictionaries and other hook points write, in runs of equally long prompts with all candidates kept.

    Attributes:
        graph: the graph.
        some: the indices of the runs.
        others: the ablation values, by the names of dictionaries and of other hook points.
        entry: the ablation value of what enters the first layer.
        whole, gone: the activations with all candidates kept, and with all candidates of the same name ablated.
        splits: features and errors before the edit, by dictionary.
        found: the gradients by name, one for each point that counts for it.
    """

    graph: NodeGraph
    some: Sequence[int]
    others: Mapping[str, Any]
    entry: torch.Tensor
    whole: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    gone: dict[str, torch.Tensor] = field(default_factory=dict, init=False)
    splits: dict[str, Split] = field(default_factory=dict, init=False)
    found: dict[str, list[torch.Tensor]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        graph = self.graph
        self.kept = torch.ones(1, len(graph.items), dtype=torch.bool)
        self.tokens, self.answers = graph.prompts(self.some)
        self.used = {dictionary.name: dictionary for dictionary in graph._used()}
        self.live: dict[str, torch.Tensor] = {}
        self.edits, ablating = (graph._edits(kept, self.some, self.others, self.live) for kept in (self.kept, ~self.kept))
        self.places = graph._by_component()

        def recording(name: str) -> Edit:
            def change(activation: torch.Tensor) -> torch.Tensor:
                self.whole[name], self.gone[name] = self.edits[name](activation), ablating[name](activation)
                if name in self.used:
                    self.splits[name] = self.used[name].split({**self.live, self.used[name].writes: activation})
                return self.whole[name]

            return change

        with graph._editing({name: recording(name) for name in self.edits}, self.live):
            graph.lens.answer(self.tokens, self.answers)

    def add(self, point: Point, weights: torch.Tensor) -> torch.Tensor:
        """Take the gradients of the weighted sum of the metrics at a point, and return the metrics."""
        graph = self.graph
        leaves: dict[str, torch.Tensor] = {}

        def perturbed(name: str) -> Edit:
            def change(activation: torch.Tensor) -> torch.Tensor:
                moved = point.local and point.place == self.places[name]
                value = point.between(self.gone[name], self.whole[name]) if moved else self.edits[name](activation)
                leaves[name] = torch.zeros_like(value, requires_grad=True)
                return value + leaves[name]

            return change

        def entering(activation: torch.Tensor) -> torch.Tensor:
            value = point.between(self.entry.to(activation.device), activation.detach())
            return activation + (value - activation.detach())  # what is written below still has its gradient

        with torch.enable_grad(), ExitStack() as stack:
            stack.enter_context(modified(graph.lens, point.rules))
            if point.place and not point.local:
                stack.enter_context(graph.lens.edit(sites.resid_pre(0), entering))
            stack.enter_context(graph._editing({name: perturbed(name) for name in self.edits}, self.live))
            logits = graph.lens.differentiable_answer(self.tokens, self.answers)
            values = graph._differentiable(graph.metric_of(logits[None], self.some)[0])
            found = torch.autograd.grad((values * weights.to(values)).sum(), list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if not point.local or point.place == self.places[name]:
                self.found.setdefault(name, []).append(torch.zeros_like(self.whole[name]) if gradient is None else gradient)
        return values.detach().cpu()

    def slopes(self) -> torch.Tensor:
        """Return the change of the metric if each item is ablated, `[items]`, to first order with the mean gradient."""
        numbers = {node: number for number, node in self.graph.members}
        total = self.graph._zeros(len(self.graph.items))
        for name, nodes in self.places.items():
            gradient = torch.stack(self.found[name]).double().mean(0)
            for entries, of_kind in self._entries(name, nodes, gradient):
                total.index_add_(0, torch.tensor([numbers[node] for node in of_kind]), self._sums(entries, of_kind))
        return total

    def _entries(
        self, name: str, nodes: Sequence[Node], gradient: torch.Tensor
    ) -> Iterator[tuple[Float[torch.Tensor, "runs pos _"], list[Node]]]:
        """Yield the slopes of features, errors, heads or activations at each position, with the nodes that consist of them."""
        if name not in self.used:
            slopes = (self.others[name].to(self.whole[name]) - self.whole[name]) * gradient
            slopes = slopes.sum(-1) if sites.is_component(name, "z") else slopes.flatten(2).sum(-1, keepdim=True)
            yield slopes, list(nodes)
            return
        dictionary, now, other, gradient = self.used[name], self.splits[name], self.others[name], gradient.flatten(2)
        ablated = self.graph._ablated(self.kept, self.some, of_sae(name), dictionary.d_sae)[0].to(now.features.device)
        rest = self.graph._errors(self.kept, self.some, dictionary)[0].to(now.features.device)
        state = {part: torch.where(rest, other.state.get(part, value), value) for part, value in now.state.items()}
        with torch.enable_grad():
            features = torch.where(ablated, other.features, now.features).requires_grad_()
            decoded = dictionary.codec.decode(features, state)
            if not decoded.requires_grad:
                raise FeatpatchError(
                    f"{name} ({dictionary.codec.kind}) has a decoder without a gradient: expected an SAE from sae-lens; or "
                    "pass scores='exact'"
                )
            (along,) = torch.autograd.grad(decoded, features, gradient.to(decoded))
        yield (other.features - now.features) * along, [node for node in nodes if node.kind == "feature"]
        errors = [node for node in nodes if node.kind == "error"]
        if errors:
            source = other if other.state else replace(other, state=now.state)
            change = dictionary.change(Split(features.detach(), state, now.error), source, error=True)
            yield (change * gradient.to(change)).sum(-1, keepdim=True), errors

    def _sums(self, entries: Float[torch.Tensor, "runs pos n"], nodes: Sequence[Node]) -> Float[torch.Tensor, " nodes"]:
        """Return the sum of each node's entries, without entries that belong to several nodes and so stay kept by another."""
        where = [
            (slot, self.graph.tokens_at(index, node.position), slice(None) if node.index is None else node.index)
            for node in nodes
            for slot, index in enumerate(self.some)
        ]
        owners = torch.zeros(entries.shape, dtype=torch.long)
        for slot, at, index in where:
            owners[slot, at, index] += 1
        own = entries.double().cpu() * (owners == 1) * self.graph._ablatable(self.some)[0]
        sums = torch.stack([own[slot, at, index].sum() for slot, at, index in where])
        return sums.unflatten(0, (len(nodes), len(self.some))).sum(1)


def _rows(other: Any, rows: slice) -> Any:
    """Return some rows of ablation values."""
    return other.map(lambda values: values[rows]) if isinstance(other, Split) else other[rows]


def _is_component(node: Node) -> bool:
    """Return whether a node is a head or the output of an MLP, at all positions."""
    whole = sites.is_component(node.site, "z") if node.kind == "head" else sites.is_component(node.site, "mlp_out")
    return whole and node.kind in ("head", "activation") and node.position == "all"
