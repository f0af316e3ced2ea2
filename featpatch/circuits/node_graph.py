"""The graph of nodes (features, error terms, heads and whole activations), each of which is kept or ablated.

At every hook point of a candidate, everything that is not kept is ablated, whether or not it is a candidate; other hook points
are left alone. Kept nodes have their values in this run, which upstream ablations may have changed (Marks et al. 2024, arXiv
2403.19647). With f_a and e_a the ablation values:

    x' = x + dec(f with the ablated features from f_a) - dec(f)  [+ e_a - e, where the error is ablated]
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray

from featpatch import sites
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.graph import Graph
from featpatch.errors import FeatpatchError
from featpatch.model.lens import added
from featpatch.nodes import Edge, Node
from featpatch.pairs.pair import spans
from featpatch.patching.ablation import Everywhere
from featpatch.sae.dictionary import Dictionary, Split

Errors = Literal["in", "out", "nodes"]
"""How error terms are treated: always kept, always ablated, or candidates like other nodes."""

Mask = Bool[torch.Tensor, "circuits pairs pos _"]
"""A mask of what is ablated; the last dimension is features, heads, or 1."""


@dataclass(eq=False)
class NodeGraph(Graph):
    """The graph of candidate nodes.

    Attributes:
        dictionaries: the dictionaries of the features and errors.
        errors: how error terms are treated.
    """

    dictionaries: Sequence[Dictionary] = ()
    errors: Errors = "in"
    _others: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """Check the pairs as in `Graph.check`, and that every node can be ablated.

        Raises:
            FeatpatchError: if a node has another kind, its dictionary is not among those given, its activation can't be set, or
                a hook point has both features and whole parts among the nodes.
        """
        super().check()
        known = {dictionary.name: dictionary.writes for dictionary in self.dictionaries}
        for node in self.items:
            of_sae = node.kind in ("feature", "error") and known.get(node.sae) == node.site
            head = node.kind == "head" and sites.is_component(node.site, "z")
            if not of_sae and not head and node.kind != "activation":
                raise FeatpatchError(
                    f"node {str(node)!r}: expected a feature or error of "
                    f"{', '.join(sorted(known)) or 'an SAE (pass saes=...)'}, a head at hook_z, or a whole activation"
                )
            if self.lens.carrier(self.lens.site(node.site)) != node.site:
                raise FeatpatchError(
                    f"node {str(node)!r}: the activation at this hook point is a copy that the model does not read, so it "
                    f"can't be set: expected {self.lens.carrier(self.lens.site(node.site))!r} instead"
                )
        both = {node.site for node in self.items if node.kind in ("head", "activation")} & set(known.values()) & {
            node.site for node in self.items if node.sae
        }  # fmt: skip
        if both:
            raise FeatpatchError(
                f"{sorted(both)[0]!r} has both features and heads or whole activations among the nodes: expected only one "
                "kind at a hook point; remove the others"
            )

    def rows_of_one(self) -> int:
        """Return 1, because one choice of items needs one row."""
        return 1

    def about(self) -> Mapping[str, Any]:
        """Return what to store with the results: that the items are nodes, the dictionaries, and how errors are treated."""
        return {"over": "nodes", "errors": self.errors, "saes": {d.name: d.digest() for d in self.dictionaries}}

    def edge_counts(self, masks: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return the number of the model's edges between the nodes that each circuit keeps, the embedding and the logits.

        This is the weighted edge count of the MIB benchmark for circuits of nodes, in which a node has no weight of its own. As
        there, nodes that are not candidates are kept. It is defined for heads and outputs of MLPs at all positions; features,
        errors and single positions are parts of nodes, for which it is NaN.
        """
        if any(not _is_component(node) for node in self.items):
            return np.full(len(masks), np.nan)
        graph = EdgeGraph(self.lens, self.pairs, self.to, self.read)
        senders = [edge.sender for edge in graph.items if isinstance(edge, Edge)]
        ablated = [{self.items[number] for number in np.flatnonzero(~mask)} for mask in masks]
        return graph.edge_counts(graph.pruned(np.array([[sender not in out for sender in senders] for out in ablated])))

    @torch.no_grad()
    def measured(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """Measure the metric of all circuits and pairs in one run."""
        circuits, tokens = len(kept), torch.tensor([self.runs[index].clean for index in some])
        answers = torch.tensor([self.runs[index].answer_position for index in some])
        others = self._outside(some)
        live: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            for dictionary in self._used():
                ablated = self._ablated(kept, some, _of_sae(dictionary.name), dictionary.d_sae)
                errors = self._errors(kept, some, dictionary)
                change = self._coded(dictionary, ablated, errors, others[dictionary.name], live)
                stack.enter_context(self.lens.edit(dictionary.writes, change))
            for site in self._plain():
                stack.enter_context(self.lens.edit(site, self._parted(kept, some, site, others[site])))
            for dictionary in self._used():
                if dictionary.reads != dictionary.writes:
                    stack.enter_context(self.lens.edit(dictionary.reads, _keeping(dictionary.reads, live)))
            logits = self.lens.answer(tokens.repeat(circuits, 1), answers.repeat(circuits))
        return self.metric_of(logits.unflatten(0, (circuits, len(some))), some)

    def _used(self) -> list[Dictionary]:
        names = {node.sae for node in self.items if node.sae}
        return [dictionary for dictionary in self.dictionaries if dictionary.name in names]

    def _plain(self) -> list[str]:
        return list(dict.fromkeys(node.site for node in self.items if not node.sae))

    def ablated(self) -> tuple[Sequence[str], Sequence[Dictionary]]:
        """Return the hook points of whole activations and heads, and the dictionaries of features and errors."""
        return self._plain(), self._used()

    def _outside(self, some: Sequence[int]) -> dict[str, Any]:
        """Return the ablation values, computed once: a split by dictionary, and an activation by hook point of other nodes.

        Ablation values that are the same in all prompts have no state for decoding; it is then that of the patched run.
        """
        if some[0] not in self._others:
            (plain, used), prompts = self.ablated(), self.others(some)
            tokens = torch.tensor([self.runs[some[0]].clean]) if prompts is None else prompts
            hooks = [*{hook for d in used for hook in (d.reads, d.writes)}, *plain]
            read = self.lens.read(tokens, list(dict.fromkeys(hooks)))
            splits = {d.name: d.split(read[d.reads], read[d.writes]) for d in used}
            if prompts is None:
                length = tokens.shape[1]
                for site in plain:
                    read[site] = self.everywhere(site, (read[site][0],), length)[0][None].expand(
                        len(some), *read[site].shape[1:]
                    )
                for d in used:
                    like = splits[d.name].features[0], splits[d.name].error[0]
                    features, error = (
                        value[None].expand(len(some), *value.shape) for value in self.everywhere(d, like, length)
                    )
                    splits[d.name] = Split(features, {}, error)
            self._others[some[0]] = {**{site: read[site] for site in plain}, **splits}
        return self._others[some[0]]

    def _ablated(self, kept: torch.Tensor, some: Sequence[int], own: Callable[[Node], bool], count: int | None = None) -> Mask:
        """Return a mask of what is ablated at a hook point: everything that is not kept.

        Args:
            kept: mask of the items that each circuit keeps.
            some: the indices of the runs.
            own: selects the nodes at the hook point.
            count: the number of features or heads; None for nodes without an index.
        """
        ablated = self._ablatable(some).repeat(len(kept), 1, 1, count or 1)
        for number, node in enumerate(self.items):
            if own(node) and (node.index is None) == (count is None):
                for slot, index in enumerate(some):
                    at = spans(self.runs[index], [node.position])[node.position]
                    ablated[:, slot, at, node.index or 0] &= ~kept[:, number, None]
        return ablated

    def _errors(self, kept: torch.Tensor, some: Sequence[int], dictionary: Dictionary) -> Mask:
        if self.errors == "nodes":
            return self._ablated(kept, some, _of_sae(dictionary.name))
        return self._ablatable(some).repeat(len(kept), 1, 1, 1) & (self.errors == "out")

    def _ablatable(self, some: Sequence[int]) -> Mask:
        """Return a mask `[1, runs, pos, 1]` of the positions that are ablated.

        If ablation values are the same in all prompts, special tokens keep their values, as in `fp.ablate`: means leave them
        out, and no node at `"all"` covers them.
        """
        found = torch.ones(1, len(some), len(self.runs[some[0]]), 1, dtype=torch.bool)
        if isinstance(self.ablation, Everywhere):
            for slot, index in enumerate(some):
                found[:, slot, sorted(self.runs[index].special)] = False
        return found

    def _coded(
        self, dictionary: Dictionary, ablated: Mask, errors: Mask, other: Split, live: Mapping[str, torch.Tensor]
    ) -> Any:
        def change(activation: torch.Tensor) -> torch.Tensor:
            read = activation if dictionary.reads == dictionary.writes else live[dictionary.reads]
            now = dictionary.split(read, activation)
            circuits = len(ablated)
            where, rest = (mask.flatten(0, 1) for mask in (ablated, errors))
            source = other.map(lambda values: values.repeat(circuits, 1, 1))
            source = source if source.state else replace(source, state=now.state)
            delta = dictionary.change(now, source, features=where, error=rest)
            return added(activation, delta.reshape(activation.shape))

        return change

    def _parted(self, kept: torch.Tensor, some: Sequence[int], site: str, other: torch.Tensor) -> Any:
        heads = sites.is_component(site, "z")
        whole = self._ablated(kept, some, lambda node: node.site == site)
        of_heads = self._ablated(kept, some, lambda node: node.site == site, other.shape[2]) if heads else whole
        ablated = (whole & of_heads if heads else whole).flatten(0, 1).to(other.device)

        def change(activation: torch.Tensor) -> torch.Tensor:
            outside = other.repeat(len(kept), *[1] * (other.dim() - 1))
            return torch.where(ablated[..., None] if heads else ablated, outside, activation)

        return change


def _keeping(hook: str, live: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], None]:
    return lambda activation: live.update({hook: activation})


def _of_sae(name: str) -> Callable[[Node], bool]:
    return lambda node: node.sae == name


def _is_component(node: Node) -> bool:
    """Return whether a node is a head or the output of an MLP, at all positions."""
    whole = sites.is_component(node.site, "z") if node.kind == "head" else sites.is_component(node.site, "mlp_out")
    return whole and node.kind in ("head", "activation") and node.position == "all"
