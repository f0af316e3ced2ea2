"""Joint patches whose changes are those of their nodes, added up at each hook point.

Each node is measured against the unpatched runs once, whatever the number of patches that contain it. Where a change upstream
moves what arrives downstream, `combine` says whether changes are added to it or replace it (see `engine.patches`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations

import torch
from jaxtyping import Bool

from featpatch.engine.patches import Block, Deltas
from featpatch.errors import FeatpatchError
from featpatch.nodes import Combine, Direction, Node
from featpatch.pairs.pairs import Pairs
from featpatch.patching.changes import Part, as_blocks, blocks_of
from featpatch.patching.runs import PairRuns
from featpatch.sae.dictionary import Dictionary
from featpatch.sae.nodes import CODED
from featpatch.sites import layer_of


@dataclass(frozen=True, eq=False)
class SummedPart(Part):
    """Patches of several nodes each, at any hook points.

    Attributes:
        parts: parts that patch each of the nodes alone.
        patches: the nodes of each patch, by the node that names it.
        combine: what a patch at several hook points means.
    """

    parts: Sequence[Part]
    patches: Mapping[Node, Sequence[Node]]
    combine: Combine

    @property
    def complete(self) -> bool:
        """False, because the nodes are those that were named."""
        return False

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionaries of all parts."""
        return list(dict.fromkeys(owner for part in self.parts for owner in part.owners))

    @property
    def hooks(self) -> set[str]:
        """The hook points whose activations the parts need."""
        return {hook for part in self.parts for hook in part.hooks}

    @property
    def sites(self) -> list[str]:
        """The hook points at which any of the patches changes anything."""
        return sorted({site for part in self.parts for site in part.sites}, key=layer_of)

    @property
    def layers(self) -> set[int]:
        """The layers at whose input the parts need the base runs."""
        return {layer for part in self.parts for layer in part.layers}

    @property
    def patched(self) -> list[tuple[tuple[str, ...], Combine]]:
        """The hook points that a patch can change together: all of them."""
        return [(tuple(self.sites), self.combine)]

    def count(self, run: PairRuns) -> int:
        """Return the number of patches in which a value differs between the runs of a pair."""
        differing = self._written(run)
        return sum(any(node in differing for node in nodes) for nodes in self.patches.values())

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair in which a value differs, by the set of hook points that they change."""
        return [self._of_pair(run) for run in runs]

    def _alone(self, run: PairRuns) -> list[Block]:
        """Return patches of each node alone, computed once."""
        return run.once(self, lambda: blocks_of(self.parts, run, chain(*self.patches.values())))

    def _written(self, run: PairRuns) -> dict[Node, frozenset[str]]:
        """Return the hook points that each node changes, for the nodes that differ between the runs of a pair."""
        return {node: frozenset(block.deltas) for block in self._alone(run) for node in block.nodes}

    def _of_pair(self, run: PairRuns) -> list[Block]:
        single, written = self._alone(run), self._written(run)
        alike: dict[frozenset[str], list[Node]] = {}
        for name, nodes in self.patches.items():
            hooks = frozenset(hook for node in nodes for hook in written.get(node, ()))
            if hooks:
                alike.setdefault(hooks, []).append(name)
        return [block for hooks, names in alike.items() for block in self._together(run, single, tuple(names), hooks)]

    def _together(self, run: PairRuns, single: list[Block], names: tuple[Node, ...], hooks: frozenset[str]) -> list[Block]:
        """Return the patches with these names, all of which change these hook points."""
        deltas: dict[str, dict[Direction, list[Deltas]]] = {}
        for site in sorted(hooks, key=layer_of):
            here = [block for block in single if site in block.deltas]
            nodes = [node for block in here if block.run is here[0].run for node in block.nodes]
            member = torch.tensor([[node in self.patches[name] for node in nodes] for name in names])
            deltas[site] = {
                way: [_summed(member, [block.deltas[site] for block in here if block.run is base]) for base in run.bases[way]]
                for way in run.ways
            }
        return as_blocks(run, names, deltas, self.combine, by_token=True)


def _summed(member: Bool[torch.Tensor, "patches nodes"], changes: Sequence[Deltas]) -> Deltas:
    """Return the deltas of patches as sums of the deltas of their nodes, with a row wherever a node of the patch has one.

    Args:
        member: whether each node belongs to each patch.
        changes: the deltas of the nodes, in order, a few nodes each.
    """
    positions = torch.cat([deltas.position for deltas in changes]).unique()
    placed = [replace(deltas, position=torch.searchsorted(positions, deltas.position)) for deltas in changes]
    device = changes[0].directions.device
    values = torch.cat([deltas.dense(len(positions)).to(device) for deltas in placed])
    named = torch.cat([deltas.named(len(positions)) for deltas in placed])
    patch, place = ((member[..., None] & named).any(1)).nonzero(as_tuple=True)
    total = (member.to(values) @ values.flatten(1)).unflatten(1, values.shape[1:])
    return Deltas.explicit(patch, positions[place], total[patch.to(total.device), place.to(total.device)], len(member))


def check_apart(patches: Mapping[Node, Sequence[Node]], found: Sequence[Dictionary], pairs: Pairs) -> None:
    """Raise a FeatpatchError if a patch changes the same value twice, because the changes of its nodes are added up."""
    outputs = {dictionary.name: dictionary.outputs for dictionary in found}
    for nodes in patches.values():
        for one, other in combinations(nodes, 2):
            if _overlap(one, other, outputs) and any(
                {*p.positions(one.position)} & {*p.positions(other.position)} for p in pairs
            ):
                raise FeatpatchError(
                    f"{str(one)!r} and {str(other)!r} overlap: expected nodes of a patch whose changes can be added up; leave "
                    "one of them out"
                )


def _overlap(one: Node, other: Node, outputs: Mapping[str, Sequence[str]]) -> bool:
    """Return whether two nodes stand for the same value, if they are at the same position."""
    sites = [set(outputs.get(node.sae, [node.site]) if node.kind in CODED else [node.site]) for node in (one, other)]
    kinds = {one.kind, other.kind}
    if not sites[0] & sites[1]:
        return False
    if one.kind in CODED and other.kind in CODED:
        same = one.sae == other.sae and one.site == other.site
        if kinds == {"feature"}:
            return same and one.index == other.index
        return one.sae == other.sae and (kinds == {"feature", "all_features"} or (len(kinds) == 1 and same))
    return len(kinds) > 1 or one.index == other.index
