"""Runs in which nodes (features, error terms, heads and whole activations) are each kept or ablated.

At every hook point of a candidate, everything that is not kept is ablated, whether or not it is a candidate; other hook points
are left alone. Kept nodes have the values that arise in this run, which upstream ablations may have changed (Marks et al. 2024,
arXiv 2403.19647). With features f, error e and their ablation values f_a and e_a:

    x' = x + dec(f with the ablated features from f_a) - dec(f)  [+ e_a - e, where the error is ablated]
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool

from featpatch import sites
from featpatch.circuits.graph import Graph
from featpatch.errors import FeatpatchError
from featpatch.model.lens import Edit, added, keeping
from featpatch.nodes import Node
from featpatch.patching.ablation_values import Everywhere
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary, digests
from featpatch.sae.nodes import names_of

Errors = Literal["in", "out", "nodes"]
"""How error terms are treated: always kept, always ablated, or candidates like other nodes."""

Mask = Bool[torch.Tensor, "circuits pairs pos _"]
"""A mask of what is ablated; the last dimension is features, heads, or 1."""


@dataclass(eq=False, repr=False)
class NodeRuns(Graph):
    """The runs in which candidate nodes are kept or ablated.

    Attributes:
        dictionaries: the dictionaries of the features and errors.
        errors: how error terms are treated.
        groups: the members of items that stand for several nodes, which are kept or ablated together.
    """

    dictionaries: Sequence[Dictionary] = ()
    errors: Errors = "in"
    groups: Mapping[Node, tuple[Node, ...]] = field(default_factory=dict)
    _ablation: dict[int, Any] = field(default_factory=dict, init=False, repr=False)

    def check(self) -> None:
        """Check the pairs as in `Graph.check`, and that every node can be ablated.

        Raises:
            FeatpatchError: a node has another kind, its dictionary is not among those given, its activation can't be set, it is
                in several candidates, or the nodes at a hook point include both features and heads or the whole activation.
        """
        super().check()
        known = {dictionary.name: dictionary.writes for dictionary in self.dictionaries}
        seen: set[Node] = set()
        for _, node in self.members:
            if node in seen:
                raise FeatpatchError(
                    f"node {str(node)!r} is in several candidates: expected each node in one, with which it is kept or "
                    "ablated; leave it out of the others"
                )
            seen.add(node)
            coded = node.kind in ("feature", "error") and known.get(node.sae) == node.site
            head = node.kind == "head" and sites.is_component(node.site, "z")
            if not coded and not head and node.kind != "activation":
                raise FeatpatchError(
                    f"node {str(node)!r}: expected a feature or error of "
                    f"{names_of(self.dictionaries)}, a head at hook_z, or a whole activation"
                )
            if self.lens.carrier(self.lens.site(node.site)) != node.site:
                raise FeatpatchError(
                    f"node {str(node)!r}: the activation at this hook point is a copy that the model does not read, so it "
                    f"can't be set: expected {self.lens.carrier(self.lens.site(node.site))!r} instead"
                )
        both = {node.site for _, node in self.members if node.kind in ("head", "activation")} & set(known.values()) & {
            node.site for _, node in self.members if node.sae
        }  # fmt: skip
        if both:
            raise FeatpatchError(
                f"{sorted(both)[0]!r} has both features and heads or whole activations among the nodes: expected only one "
                "kind at a hook point; remove the others"
            )

    @cached_property
    def members(self) -> list[tuple[int, Node]]:
        """The nodes of all items, each with the index of its item."""
        return [(number, node) for number, item in enumerate(self.items) for node in self.groups.get(item, (item,))]

    def members_of(self, item: Node) -> tuple[Node, ...]:
        """Return the members of an item that stands for several nodes; empty for one that is a node."""
        return self.groups.get(item, ())

    def rows_of_one(self) -> int:
        """Return 1, because one choice of items needs one row."""
        return 1

    def about(self) -> Mapping[str, Any]:
        """Return metadata: that the items are nodes, the dictionaries, the groups, and how errors are treated."""
        groups = {str(node): list(map(str, members)) for node, members in self.groups.items()}
        about = {"over": "nodes", "errors": self.errors, "saes": digests(self.dictionaries)}
        return {**about, **({"groups": groups} if groups else {})}

    @torch.no_grad()
    def measured(self, kept: torch.Tensor, some: Sequence[int]) -> torch.Tensor:
        """Measure the metric of all circuits and runs in one forward pass."""
        (tokens, answers), circuits = self.prompts(some), len(kept)
        live: dict[str, torch.Tensor] = {}
        with self._editing(self._edits(kept, some, self._ablation_values(some), live), live):
            logits = self.lens.answer(tokens.repeat(circuits, 1), answers.repeat(circuits))
        return self.metric_of(logits.unflatten(0, (circuits, len(some))), some)

    def _edits(
        self, kept: torch.Tensor, some: Sequence[int], others: Mapping[str, Any], live: Mapping[str, torch.Tensor]
    ) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
        """Return the edits that ablate what circuits don't keep, by the names of dictionaries and of other hook points.

        Args:
            kept: mask of the items that each circuit keeps.
            some: the indices of the runs.
            others: the ablation values, see `_ablation_values`.
            live: the activations that transcoders read, filled in by `_editing`.
        """
        edits = {}
        for dictionary in self._used():
            ablated = self._ablated(kept, some, of_sae(dictionary.name), dictionary.d_sae)
            errors = self._errors(kept, some, dictionary)
            edits[dictionary.name] = self._edit_of_dictionary(dictionary, ablated, errors, others[dictionary.name], live)
        return edits | {site: self._edit_of_hook(kept, some, site, others[site]) for site in self._plain()}

    @contextmanager
    def _editing(self, edits: Mapping[str, Edit], live: dict[str, torch.Tensor]) -> Iterator[None]:
        """Apply edits to the model until the context ends, see `_edits`."""
        with ExitStack() as stack:
            for dictionary in self._used():
                stack.enter_context(self.lens.edit(dictionary.writes, edits[dictionary.name]))
            for site in self._plain():
                stack.enter_context(self.lens.edit(site, edits[site]))
            for dictionary in self._used():
                if dictionary.reads != dictionary.writes:
                    stack.enter_context(self.lens.edit(dictionary.reads, keeping(dictionary.reads, live)))
            yield

    def _used(self) -> list[Dictionary]:
        """Return the dictionaries of the candidates."""
        names = {node.sae for _, node in self.members if node.sae}
        return [dictionary for dictionary in self.dictionaries if dictionary.name in names]

    def _plain(self) -> list[str]:
        """Return the hook points of heads and whole activations."""
        return list(dict.fromkeys(node.site for _, node in self.members if not node.sae))

    def ablated(self) -> tuple[Sequence[str], Sequence[Dictionary]]:
        """Return the hook points of the first layer's input, heads and whole activations, and the candidates' dictionaries."""
        return list(dict.fromkeys([sites.resid_pre(0), *self._plain()])), self._used()

    def _ablation_values(self, some: Sequence[int]) -> dict[str, Any]:
        """Return the ablation values, computed once: a split by dictionary, and an activation by hook point of other nodes.

        Ablation values that are the same in all prompts have no decoding state; that of the patched run is then used.
        """
        if some[0] not in self._ablation:
            plain, used, prompts = self._plain(), self._used(), self.others(some)
            tokens = self.prompts(some[:1])[0] if prompts is None else prompts
            read = self.lens.read(tokens, sorted({*plain, *(hook for d in used for hook in d.hooks)}))
            found: dict[str, Any] = {site: read[site] for site in plain} | {d.name: d.split(read) for d in used}

            def same(of: str | Dictionary, *like: torch.Tensor) -> list[torch.Tensor]:
                values = self.everywhere(of, tuple(each[0] for each in like), tokens.shape[1])
                return [value[None].expand(len(some), *value.shape) for value in values]

            for site in plain if prompts is None else ():
                (found[site],) = same(site, found[site])
            for d in used if prompts is None else ():
                features, error = same(d, found[d.name].features, found[d.name].error)
                found[d.name] = Split(features, {}, error)
            self._ablation[some[0]] = found
        return self._ablation[some[0]]

    def _ablated(self, kept: torch.Tensor, some: Sequence[int], own: Callable[[Node], bool], count: int | None = None) -> Mask:
        """Return a mask of what is ablated at a hook point: everything that is not kept.

        Args:
            kept: mask of the items that each circuit keeps.
            some: the indices of the runs.
            own: selects the nodes at the hook point.
            count: the number of features or heads; None for nodes without an index.
        """
        ablated = self._ablatable(some).repeat(len(kept), 1, 1, count or 1)
        for number, node in self.members:
            if own(node) and (node.index is None) == (count is None):
                for slot, index in enumerate(some):
                    ablated[:, slot, self.tokens_at(index, node.position), node.index or 0] &= ~kept[:, number, None]
        return ablated

    def _errors(self, kept: torch.Tensor, some: Sequence[int], dictionary: Dictionary) -> Mask:
        """Return a mask of the positions at which the error is ablated."""
        if self.errors == "nodes":
            return self._ablated(kept, some, of_sae(dictionary.name))
        return self._ablatable(some).repeat(len(kept), 1, 1, 1) & (self.errors == "out")

    def _ablatable(self, some: Sequence[int]) -> Mask:
        """Return a mask `[1, runs, pos, 1]` of the positions that are ablated.

        If ablation values are the same in all prompts, special tokens keep their values, as in `fp.ablate`: means leave them
        out, and a node at `"all"` does not cover them.
        """
        found = torch.ones(1, len(some), len(self.runs[some[0]]), 1, dtype=torch.bool)
        if isinstance(self.ablation, Everywhere):
            for slot, index in enumerate(some):
                found[:, slot, sorted(self.runs[index].special)] = False
        return found

    def _edit_of_dictionary(
        self, dictionary: Dictionary, ablated: Mask, errors: Mask, other: Split, live: Mapping[str, torch.Tensor]
    ) -> Any:
        def change(activation: torch.Tensor) -> torch.Tensor:
            now = dictionary.differentiable_split({**live, dictionary.writes: activation})
            circuits = len(ablated)
            where, rest = (mask.flatten(0, 1) for mask in (ablated, errors))
            source = other.map(lambda values: values.repeat(circuits, 1, 1))
            source = source if source.state else replace(source, state=now.state)
            delta = dictionary.differentiable_change(now, source, features=where, error=rest)
            return added(activation, delta.reshape(activation.shape))

        return change

    def _edit_of_hook(self, kept: torch.Tensor, some: Sequence[int], site: str, other: torch.Tensor) -> Any:
        heads = sites.is_component(site, "z")
        whole = self._ablated(kept, some, lambda node: node.site == site)
        of_heads = self._ablated(kept, some, lambda node: node.site == site, other.shape[2]) if heads else whole
        ablated = (whole & of_heads if heads else whole).flatten(0, 1).to(other.device)

        def change(activation: torch.Tensor) -> torch.Tensor:
            values = other.repeat(len(kept), *[1] * (other.dim() - 1))
            return torch.where(ablated[..., None] if heads else ablated, values, activation)

        return change


def of_sae(name: str) -> Callable[[Node], bool]:
    """Return a function that says whether a node is a feature or the error of the SAE with this name."""
    return lambda node: node.sae == name
