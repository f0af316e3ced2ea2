"""What a patch changes: the difference between two runs, and the deltas of patches.

    x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error node is in S]

`Ways` say which run is the base b, which is patched, and which is the source s of the values. With b corrupted and s clean this
is denoising, the other way round noising. A `Difference` compares the two feature by feature. If features have fixed
directions (see `Behaviour.linear`), the delta of a single feature is a multiple of its direction, times the gain of the base
run's state if the dictionary has one; otherwise each delta is computed by the definition. The error node includes the state of
the decoder (see `Dictionary.change`). A `Part` says which nodes are patched.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from featpatch.engine.patches import Block, Deltas
from featpatch.nodes import Combine, Direction, Kind, Node, Position
from featpatch.pairs.pair import Wanted
from featpatch.patching.runs import Labelled, PairRuns, Run, Ways
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary
from featpatch.sites import layer_of

Change = Mapping[Direction, Float[torch.Tensor, "pos d"]]
"""The change of the flat activation of the patched run, by direction of patching."""

Splits = Mapping[Direction, tuple[Split, Split]]
"""Base and source run of each direction, split into features and error."""


@dataclass(frozen=True)
class Difference:
    """The features of one dictionary that differ between the runs of one pair, and the changes that they make.

    Attributes:
        dictionary: the dictionary.
        position, feature: the positions and features that differ, one entry each, sorted by feature, then by position.
        value: how much of its feature's direction each entry adds.
        moved: the change that each entry makes alone, `[entries, d_out]`, if features have no fixed direction; otherwise None.
        features, error: the change that all features make, and the change that the error makes; 0 before the first differing
            token.
        directions: decoder directions, and for each entry the number of its direction and whether that direction is not 0;
            None until `with_directions` computes them, and if features have no fixed direction.
    """

    dictionary: Dictionary
    position: Int[torch.Tensor, " entries"]
    feature: Int[torch.Tensor, " entries"]
    value: Mapping[Direction, Float[torch.Tensor, " entries"]]
    moved: Mapping[Direction, Float[torch.Tensor, "entries d_out"]] | None
    features: Change
    error: Change
    directions: tuple[torch.Tensor, Int[torch.Tensor, " entries"], Bool[torch.Tensor, " entries"]] | None = None

    @classmethod
    def of(cls, dictionary: Dictionary, ways: Ways, first: int) -> "Difference":
        """Compute the difference between base and source of each direction; nothing differs before position `first`."""
        splits = split_ways(dictionary, ways, first)
        changes = {way: (source.features - base.features)[0] for way, (base, source) in splits.items()}
        feature, position = next(iter(changes.values())).T.nonzero(as_tuple=True)
        values = {way: change[position, feature] for way, change in changes.items()}
        if dictionary.behaviour.scaled:
            values = {way: value * dictionary.gains(splits[way][0])[position] for way, value in values.items()}
        linear = dictionary.behaviour.linear
        return cls(
            dictionary=dictionary,
            position=position.cpu() + first,
            feature=feature.cpu(),
            value=values,
            moved=None if linear else {way: dictionary.moved(*runs, position, feature) for way, runs in splits.items()},
            features=_each_way(first, splits, partial(dictionary.change, features=True)),
            error=_each_way(first, splits, partial(dictionary.change, error=True)),
        )

    def keep(self, features: Sequence[int]) -> "Difference":
        """Return the difference with only the entries of these features; the change by all features stays the same."""
        kept = torch.isin(self.feature, torch.tensor(features, dtype=torch.long)).nonzero()[:, 0]
        return replace(
            self,
            position=self.position[kept],
            feature=self.feature[kept],
            value={way: value[kept.to(value.device)] for way, value in self.value.items()},
            moved=None if self.moved is None else {way: moved[kept.to(moved.device)] for way, moved in self.moved.items()},
        )

    def at(self, span: list[int]) -> torch.Tensor:
        """Return the indices of the entries at these positions."""
        return torch.isin(self.position, torch.tensor(span, dtype=torch.long)).nonzero()[:, 0]

    def count(self, wanted: Wanted) -> int:
        """Return the number of features that differ at each of some requested positions, in total."""
        return sum(len(self.feature[self.at(span)].unique()) for span in wanted.values())

    def deltas(self, entries: torch.Tensor, patch: torch.Tensor, patches: int) -> dict[Direction, Deltas]:
        """Return the deltas that some entries make, except those that add nothing because their direction is zero.

        Args:
            entries: the indices of the entries.
            patch: the number of the patch that each entry belongs to, ascending.
            patches: the number of patches.
        """
        where = self.position[entries]
        if self.moved is not None:
            moved = {way: of_way[entries.to(of_way.device)] for way, of_way in self.moved.items()}
            return {way: Deltas.explicit(patch, where, values, patches) for way, values in moved.items()}
        assert self.directions is not None
        directions, row, moving = self.directions
        some = moving[entries]
        patch, where, entries = patch[some], where[some], entries[some]
        return {
            way: Deltas(patches, patch, where, row[entries], value[entries.to(value.device)], directions)
            for way, value in self.value.items()
        }


def with_directions(differences: Sequence[Difference]) -> list[Difference]:
    """Return the differences of some pairs with the decoder directions of their features, computed once for all pairs.

    Differences of features without fixed directions are returned as they are.
    """
    if not differences or differences[0].moved is not None:
        return list(differences)
    features, row = torch.cat([difference.feature for difference in differences]).unique(return_inverse=True)
    directions = differences[0].dictionary.directions(features)
    moving = (directions != 0).any(1).cpu()[row]
    sizes = [len(difference.feature) for difference in differences]
    return [
        replace(difference, directions=(directions, *of_pair))
        for difference, *of_pair in zip(differences, row.split(sizes), moving.split(sizes), strict=True)
    ]


def split_ways(dictionary: Dictionary, ways: Ways, first: int) -> Splits:
    """Return base and source of each direction, split into features and error from position `first` on."""
    start = first if dictionary.behaviour.rowwise else 0
    runs: list[Run] = list(dict.fromkeys(run for both in ways.values() for run in both))
    split = {run: run.split(dictionary, start).map(lambda values: values[:, first - start :]) for run in runs}
    return {way: (split[base], split[source]) for way, (base, source) in ways.items()}


def whole_change(site: str, ways: Ways, first: int) -> Change:
    """Return how the whole flat activation changes in each direction; exactly 0 before position `first`."""
    changes: dict[Direction, torch.Tensor] = {}
    for way, (base, source) in ways.items():
        changes[way] = (source.at(site) - base.at(site)).flatten(1)
        changes[way][:first] = 0
    return changes


def _each_way(first: int, splits: Splits, change: Callable[[Split, Split], torch.Tensor]) -> dict[Direction, torch.Tensor]:
    """Return a change in each direction, with zeros before position `first`.

    Without decoder state, the change in one direction is minus that in the other and is computed only once.
    """
    changes: dict[Direction, torch.Tensor] = {}
    for way, (base, source) in splits.items():
        if changes and not base.state:
            changes[way] = -next(iter(changes.values()))
        else:
            found = change(base, source)[0]
            changes[way] = torch.cat([found.new_zeros(first, found.shape[1]), found])
    return changes


BothWays = Mapping[str, Mapping[Direction, Sequence[Deltas]]]
"""Deltas of the same patches by hook point and direction.

A single entry is for all readings; otherwise there is one for each, because the tokens that follow the prompt differ."""

Patches = tuple[tuple[Node, ...], BothWays, Combine]
"""The nodes of some patches, one each, their deltas, and what a patch at several hook points means."""


def as_blocks(
    run: PairRuns, nodes: tuple[Node, ...], deltas: BothWays, combine: Combine = "add", *, by_token: bool = False
) -> list[Block]:
    """Return patches of a pair as one block for each direction and reading; none if there are no nodes.

    Args:
        run: the runs of the pair.
        nodes, deltas, combine: see `Patches`.
        by_token: whether the deltas of `Labelled` runs are at token positions; otherwise they are at places.
    """
    if not nodes:
        return []
    name, every, found = _name(nodes), torch.arange(len(nodes)), []
    for way, (patched, _) in run.ways.items():
        of_way = {site: ways[way] for site, ways in deltas.items()}
        if isinstance(patched, Labelled) and not by_token:
            of_way = {
                site: [replace(each, position=patched.tokens[each.position]) for each in several]
                for site, several in of_way.items()
            }
        for reading, base in enumerate(run.bases[way]):
            of_base = {site: several[reading if len(several) > 1 else 0] for site, several in of_way.items()}
            found.append(Block(name, base, of_base, every, combine, nodes))
    return found


def blocks_of(parts: Iterable["Part"], run: PairRuns, nodes: Iterable[Node]) -> list[Block]:
    """Return the patches of some nodes of a pair, which belong to several parts."""
    return keep((block for part in parts for block in part.blocks([run])[0]), frozenset(nodes))


def keep(blocks: Iterable[Block], nodes: frozenset[Node]) -> list[Block]:
    """Return the blocks of a pair with only the patches of some nodes, without blocks that have none of them."""
    found: list[Block] = []
    for every, group in groupby(blocks, key=lambda block: block.nodes):
        some = torch.tensor([patch for patch, node in enumerate(every) if node in nodes], dtype=torch.long)
        kept = tuple(every[patch] for patch in some.tolist())
        if not kept:
            continue
        name, numbers, alike = _name(kept), torch.arange(len(kept)), list(group)
        shared = {id(each): each for block in alike for each in block.deltas.values()}  # readings share theirs
        selected = {key: each.select(some) for key, each in shared.items()}
        for block in alike:
            deltas = {site: selected[id(each)] for site, each in block.deltas.items()}
            found.append(replace(block, name=name, deltas=deltas, patches=numbers, nodes=kept))
    return found


def _name(nodes: Sequence[Node]) -> str:
    """Return a short name for patches of some nodes, the same every time."""
    return hashlib.sha256("\n".join(map(repr, nodes)).encode()).hexdigest()[:24]


def joined(several: Iterable[Patches]) -> list[Patches]:
    """Join the patches that change the same hook points with the same meaning; each must have one entry for all readings."""
    alike: dict[tuple[tuple[str, ...], Combine], list[Patches]] = {}
    for patches in several:
        alike.setdefault((tuple(patches[1]), patches[2]), []).append(patches)
    return [
        (
            tuple(node for nodes, _, _ in some for node in nodes),
            {
                site: {way: [Deltas.joined([deltas[site][way][0] for _, deltas, _ in some])] for way in ways}
                for site, ways in some[0][1].items()
            },
            combine,
        )
        for (_, combine), some in alike.items()
    ]


Naming = Callable[[int, Position], Node]
"""A function that returns the node of a feature at a requested position."""


def feature_patches(difference: Difference, wanted: Wanted, naming: Naming, combine: Combine = "add") -> list[Patches]:
    """Return patches of each feature that differs, alone, by requested position and group of features."""
    found: list[Patches] = []
    dictionary = difference.dictionary
    for position, span in wanted.items():
        at_position = difference.at(span)
        group_of = difference.feature[at_position] // dictionary.per_group
        for group in range(dictionary.codec.groups):
            entries = at_position[group_of == group]
            indices, patch = difference.feature[entries].unique(return_inverse=True)
            nodes = tuple(naming(feature, position) for feature in indices.tolist())
            deltas = difference.deltas(entries, patch, len(nodes))
            parts = by_output(dictionary, {way: of_way.directions for way, of_way in deltas.items()})
            written = {
                site: {way: [replace(of_way, directions=parts[site][way])] for way, of_way in deltas.items()}
                for site in dictionary.outputs[group:]
            }
            found.append((nodes, written, combine))
    return found


def whole_patches(
    wanted: Wanted, site: str, kind: Kind, changes: Mapping[str, Change], sae: str = "", combine: Combine = "add"
) -> Patches:
    """Return one patch per requested position, which makes the whole change there.

    Args:
        wanted: the requested positions.
        site: the hook point of the nodes.
        kind: the kind of the nodes.
        changes: the change of the activation at each hook point that is patched, by direction.
        sae: the name of the dictionary, if the nodes belong to one.
        combine: what a patch at several hook points means.
    """
    differs = differing(changes)
    nodes: list[Node] = []
    patch: list[int] = []
    position: list[int] = []
    for name, span in wanted.items():
        changed = [p for p in span if differs[p]]
        if changed:
            patch += [len(nodes)] * len(changed)
            position += changed
            nodes.append(Node(site, kind, None, name, sae))
    where, numbers = torch.tensor(position, dtype=torch.long), torch.tensor(patch, dtype=torch.long)
    deltas = {
        hook: {
            way: [Deltas.explicit(numbers, where, whole[where.to(whole.device)], len(nodes))] for way, whole in change.items()
        }
        for hook, change in changes.items()
    }
    return tuple(nodes), deltas, combine


def differing(changes: Mapping[str, Change]) -> Bool[torch.Tensor, " pos"]:
    """Return a mask of the positions at which any hook point changes in at least one direction."""
    return torch.stack([(whole != 0).any(1).cpu() for change in changes.values() for whole in change.values()]).any(0)


def by_output(dictionary: Dictionary, change: Mapping[Direction, torch.Tensor]) -> dict[str, Mapping[Direction, torch.Tensor]]:
    """Return the part of a change that belongs to each hook point that a dictionary writes."""
    parts = {way: dictionary.by_output(of_way) for way, of_way in change.items()}
    return {site: {way: of_way[site] for way, of_way in parts.items()} for site in dictionary.outputs}


def count_whole(changes: Mapping[str, Change], wanted: Wanted) -> int:
    """Return the number of patches that `whole_patches` makes."""
    differs = differing(changes)
    return sum(bool(differs[span].any()) for span in wanted.values())


def count_nodes(blocks: Iterable[Block]) -> int:
    """Return the number of nodes that the blocks of a pair are named by."""
    return len({node for block in blocks for node in block.nodes})


class Part(ABC):
    """Nodes that are patched, as a dataclass. Results that it caches are left out when it is sent to workers."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self))  # type: ignore[arg-type]

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionaries whose features and errors are patched; none by default."""
        return ()

    @property
    def complete(self) -> bool:
        """Whether all nodes at the hook points are patched, so that one without a row has no effect; True by default."""
        return True

    @property
    @abstractmethod
    def hooks(self) -> set[str]:
        """The hook points whose activations the part needs."""

    @property
    @abstractmethod
    def sites(self) -> list[str]:
        """The hook points at which the changes are added."""

    @property
    def patched(self) -> list[tuple[tuple[str, ...], Combine]]:
        """The hook points that are patched together, and what such a patch means: by default each alone."""
        return [((site,), "add") for site in self.sites]

    @property
    def layers(self) -> set[int]:
        """The layers at whose input the base runs are needed: those of `sites`, if not more."""
        return set(map(layer_of, self.sites))

    @abstractmethod
    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each of some pairs that run together, see `as_blocks`."""

    @abstractmethod
    def count(self, run: PairRuns) -> int:
        """Return the number of patches of a pair per direction and reading."""
