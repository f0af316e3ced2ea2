"""What a patch changes: the difference between two runs, and swaps, which hold the deltas of patches.

    x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error node is in S]

A `Contrast` says which run is the base b, which is patched, and which is the source s of the values. With b corrupted and s
clean this is denoising, the other way round noising. A `Difference` compares the two feature by feature. If features have fixed
directions (see `Behaviour.linear`), the delta of a single feature is a multiple of its direction, times the gain of the base
run's state if the dictionary has one; otherwise each delta is computed by the definition. The error node includes the state of
the decoder (see `Dictionary.change`). A `Part` says which nodes are patched.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int

from featpatch.engine.patches import Deltas
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


def split_ways(dictionary: Dictionary, ways: Ways, first: int) -> dict[Direction, tuple[Split, Split]]:
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


@dataclass(frozen=True)
class Swap:
    """Nodes that differ between the runs of one pair, one patch each, with the deltas of each direction.

    Attributes:
        nodes: the nodes.
        deltas: the deltas of the patches, by hook point and direction; each patch is made at all of these hook points.
        longer: the deltas for each reading, by hook point and direction, if they depend on the tokens that follow the prompt;
            otherwise empty.
        by_token: whether the deltas of `Labelled` runs are at token positions; otherwise they are at places.
        combine: what a patch at several hook points means.
    """

    nodes: tuple[Node, ...]
    deltas: Mapping[str, Mapping[Direction, Deltas]]
    longer: Mapping[str, Mapping[Direction, Sequence[Deltas]]] = field(default_factory=dict)
    by_token: bool = False
    combine: Combine = "add"

    def at(self, run: PairRuns, direction: Direction, reading: int) -> dict[str, Deltas]:
        """Return the deltas for a reading of a pair, by hook point, at token positions of the base run."""
        base = run.ways[direction][0]
        if self.longer:
            found = {site: longer[direction][reading] for site, longer in self.longer.items()}
        else:
            found = {site: deltas[direction] for site, deltas in self.deltas.items()}
        if self.by_token or not isinstance(base, Labelled):
            return found
        return {site: replace(deltas, position=base.tokens[deltas.position]) for site, deltas in found.items()}

    def keep(self, nodes: frozenset[Node]) -> "Swap":
        """Return the swaps of only these nodes."""
        kept = [patch for patch, node in enumerate(self.nodes) if node in nodes]
        some = torch.tensor(kept, dtype=torch.long)
        return replace(
            self,
            nodes=tuple(self.nodes[patch] for patch in kept),
            deltas={site: {way: each.select(some) for way, each in ways.items()} for site, ways in self.deltas.items()},
            longer={
                site: {way: [each.select(some) for each in of_way] for way, of_way in ways.items()}
                for site, ways in self.longer.items()
            },
        )

    @cached_property
    def name(self) -> str:
        """A short name derived from the nodes, the same every time."""
        return hashlib.sha256("\n".join(map(repr, self.nodes)).encode()).hexdigest()[:24]


def joined(swaps: Sequence[Swap]) -> list[Swap]:
    """Join the swaps that change the same hook points with the same meaning; none may have `longer` or `by_token`."""
    alike: dict[tuple[str, ...], list[Swap]] = {}
    for swap in swaps:
        alike.setdefault((*swap.deltas, swap.combine), []).append(swap)
    return [
        Swap(
            tuple(node for swap in some for node in swap.nodes),
            {
                site: {way: Deltas.joined([swap.deltas[site][way] for swap in some]) for way in ways}
                for site, ways in some[0].deltas.items()
            },
            combine=some[0].combine,
        )
        for some in alike.values()
    ]


Naming = Callable[[int, Position], Node]
"""A function that returns the node of a feature at a requested position."""


def feature_swaps(difference: Difference, wanted: Wanted, naming: Naming, combine: Combine = "add") -> list[Swap]:
    """Return the swaps in which each feature that differs is patched alone, by requested position and group of features."""
    swaps, dictionary = [], difference.dictionary
    for position, span in wanted.items():
        at_position = difference.at(span)
        group_of = difference.feature[at_position] // dictionary.per_group
        for group in range(dictionary.codec.groups):
            entries = at_position[group_of == group]
            indices, patch = difference.feature[entries].unique(return_inverse=True)
            nodes = tuple(naming(feature, position) for feature in indices.tolist())
            deltas = difference.deltas(entries, patch, len(nodes))
            swaps.append(Swap(nodes, _by_output(dictionary, deltas, group), combine=combine))
    return swaps


def _by_output(dictionary: Dictionary, deltas: Mapping[Direction, Deltas], group: int) -> dict[str, dict[Direction, Deltas]]:
    """Return the deltas at each hook point to which a group of features writes."""
    parts = {way: dictionary.by_output(of_way.directions) for way, of_way in deltas.items()}
    return {
        site: {way: replace(of_way, directions=parts[way][site]) for way, of_way in deltas.items()}
        for site in dictionary.outputs[group:]
    }


def whole_swaps(
    site: str, kind: str, changes: Mapping[str, Change], wanted: Wanted, sae: str = "", combine: Combine = "add"
) -> Swap:
    """Return one patch per requested position, which makes the whole change there.

    Args:
        site: the hook point of the nodes.
        kind: the kind of the nodes.
        changes: the change of the activation at each hook point that is patched, by direction.
        wanted: the requested positions.
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
            nodes.append(Node(site, cast(Kind, kind), None, name, sae))
    where, numbers = torch.tensor(position, dtype=torch.long), torch.tensor(patch, dtype=torch.long)
    deltas = {
        hook: {way: Deltas.explicit(numbers, where, whole[where.to(whole.device)], len(nodes)) for way, whole in change.items()}
        for hook, change in changes.items()
    }
    return Swap(tuple(nodes), deltas, combine=combine)


def differing(changes: Mapping[str, Change]) -> Bool[torch.Tensor, " pos"]:
    """Return a mask of the positions at which any hook point changes in at least one direction."""
    return torch.stack([(whole != 0).any(1).cpu() for change in changes.values() for whole in change.values()]).any(0)


def by_output(dictionary: Dictionary, change: Mapping[Direction, torch.Tensor]) -> dict[str, Mapping[Direction, torch.Tensor]]:
    """Return the part of a change that belongs to each hook point that a dictionary writes."""
    parts = {way: dictionary.by_output(of_way) for way, of_way in change.items()}
    return {site: {way: of_way[site] for way, of_way in parts.items()} for site in dictionary.outputs}


def count_whole(changes: Mapping[str, Change], wanted: Wanted) -> int:
    """Return the number of patches that `whole_swaps` makes."""
    differs = differing(changes)
    return sum(bool(differs[span].any()) for span in wanted.values())


class Part(ABC):
    """Nodes that are patched, as a dataclass; results that it caches are not pickled for workers."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self) if each.init)  # type: ignore[arg-type]

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
    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swap]]:
        """Return the swaps of each of some pairs that run together."""

    @abstractmethod
    def count(self, run: PairRuns) -> int:
        """Return the number of patches per direction in the swaps of a pair."""
