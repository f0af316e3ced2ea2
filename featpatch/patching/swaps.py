"""From two runs of a pair to the deltas of its swaps, for one dictionary.

    x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error node is in S]

With `b` corrupted and `s` clean this is denoising, the other way round noising. Where a unit of a feature always adds the same
direction (see `Behaviour.linear`), the deltas of single features are multiples of it, times the gain of the base run's state if
that matters; elsewhere each is worked out by the definition. The error node carries the state of the decoder (see `chosen`).
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import SupportsIndex, cast

import torch
from jaxtyping import Bool, Float, Int

from featpatch.engine import Deltas
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Split
from featpatch.pairs import Pair
from featpatch.patch import Direction, Kind, Node, Position

Positions = str | Sequence[Position]
"""`"all"`, `"each"`, or a list of labels and indices."""

Wanted = Mapping[Position, list[int]]
"""The token positions of one pair that each requested position stands for."""


@dataclass(frozen=True)
class Swaps:
    """Nodes of one site that differ between the runs of one pair, with the deltas of both directions."""

    site: str
    nodes: tuple[Node, ...]
    deltas: Mapping[Direction, Deltas]

    @property
    def name(self) -> str:
        """A short name of the nodes, the same in every run."""
        return hashlib.sha256("\n".join(f"{node.sae} {node}" for node in self.nodes).encode()).hexdigest()[:24]


Change = Mapping[Direction, Float[torch.Tensor, "pos d"]]
"""How the activations of the patched run change, by direction."""


@dataclass(frozen=True)
class Difference:
    """What differs at one dictionary between the runs of one pair.

    Attributes:
        position, feature: where features differ; one entry each, by feature, then by position.
        value: how much each entry adds of its feature's direction.
        moved: what each entry changes alone, `[entries, d_out]`, where features have no direction, else None.
        features, error: what all features, and what the error, change; 0 before the first differing token.
    """

    position: Int[torch.Tensor, " entries"]
    feature: Int[torch.Tensor, " entries"]
    value: Mapping[Direction, Float[torch.Tensor, " entries"]]
    moved: Mapping[Direction, Float[torch.Tensor, "entries d_out"]] | None
    features: Change
    error: Change

    @classmethod
    def of(
        cls, dictionary: Dictionary, clean: Mapping[str, torch.Tensor], corrupted: Mapping[str, torch.Tensor], first: int
    ) -> "Difference":
        """From activations `[pos, ...]` by hook; nothing differs before position `first`."""
        start = first if dictionary.behaviour.rowwise else 0
        c, b = (
            dictionary.split(run[dictionary.reads][None, start:], run[dictionary.writes][None, start:]).since(first - start)
            for run in (clean, corrupted)
        )
        difference = (c.features - b.features)[0]
        feature, position = difference.T.nonzero(as_tuple=True)
        ways: dict[Direction, tuple[Split, Split]] = {"denoising": (b, c), "noising": (c, b)}
        linear = dictionary.behaviour.linear
        return cls(
            position=position.cpu() + first,
            feature=feature.cpu(),
            value=_values(dictionary, ways, difference[position, feature], position),
            moved=None if linear else {way: dictionary.moved(*runs, position, feature) for way, runs in ways.items()},
            features=_both_ways(first, dictionary, ways, _all_features),
            error=_both_ways(first, dictionary, ways, _all_else),
        )

    def at(self, span: list[int]) -> torch.Tensor:
        """Indices of the entries at these positions."""
        return torch.isin(self.position, torch.tensor(span, dtype=torch.long)).nonzero()[:, 0]


def _values(
    dictionary: Dictionary, ways: Mapping[Direction, tuple[Split, Split]], value: torch.Tensor, position: torch.Tensor
) -> dict[Direction, torch.Tensor]:
    """The differences with their signs, each times the gain of its base run."""
    values: dict[Direction, torch.Tensor] = {"denoising": value, "noising": -value}
    if not dictionary.behaviour.scaled:
        return values
    return {way: part * dictionary.gains(ways[way][0])[position] for way, part in values.items()}


def _both_ways(
    first: int,
    dictionary: Dictionary,
    ways: Mapping[Direction, tuple[Split, Split]],
    change: Callable[[Dictionary, Split, Split], torch.Tensor],
) -> dict[Direction, torch.Tensor]:
    """A change in both directions, with zeros before `first`; without a state one is minus the other, and worked out once."""
    denoising = _after(first, change(dictionary, *ways["denoising"]))
    stateless = not ways["denoising"][0].state
    return {
        "denoising": denoising,
        "noising": -denoising if stateless else _after(first, change(dictionary, *ways["noising"])),
    }


def _all_features(dictionary: Dictionary, base: Split, source: Split) -> torch.Tensor:
    after, before = (dictionary.decode(features, base.state) for features in (source.features, base.features))
    return (after.to(base.error) - before.to(base.error))[0]


def _all_else(dictionary: Dictionary, base: Split, source: Split) -> torch.Tensor:
    change = (source.error - base.error)[0]
    if not base.state:
        return change
    after, before = (dictionary.decode(base.features, state) for state in (source.state, base.state))
    return change + (after.to(change) - before.to(change))[0]


def _after(first: int, change: torch.Tensor) -> torch.Tensor:
    """With zeros at the positions before `first`."""
    return torch.cat([change.new_zeros(first, change.shape[1]), change])


def spans(pair: Pair, positions: Positions) -> dict[Position, list[int]]:
    """What each requested position stands for in a pair: a name or index, and the token positions.

    Raises:
        FeatpatchError: the pair has no such position, or the request is not one.
    """
    if positions not in ("all", "each") if isinstance(positions, str) else not isinstance(positions, Sequence):
        raise FeatpatchError(
            f"positions={positions!r}: expected 'all', 'each' or a list of labels and indices such as ['S2', 0]"
        )
    if positions == "all":
        return {"all": pair.positions("all")}
    wanted: Sequence[Position] = pair.positions("all") if positions == "each" else [_plain(entry) for entry in positions]
    if not wanted:
        raise FeatpatchError("positions is empty: expected 'all', 'each' or a list of labels and indices")
    return {position: pair.positions(position) for position in wanted}


def _plain(entry: object) -> Position:
    """A label, or an index as a plain int."""
    try:
        return entry if isinstance(entry, str) else index(cast(SupportsIndex, entry))
    except TypeError as error:
        raise FeatpatchError(f"position {entry!r} is a {type(entry).__name__}: expected a label or an index") from error


def feature_swaps(dictionary: Dictionary, difference: Difference, wanted: Wanted, directions: "Directions") -> list[Swaps]:
    """Every feature that differs, alone; then all features, and the error."""
    swaps = []
    for position, span in wanted.items():
        entries = difference.at(span)
        indices, patch = difference.feature[entries].unique(return_inverse=True)
        names = [Node(dictionary.writes, "feature", feature, position, dictionary.name) for feature in indices.tolist()]
        if difference.moved is None:
            deltas = _along(difference, entries, patch, directions, len(names))
        else:
            where = difference.position[entries]
            deltas = {
                way: Deltas.explicit(patch, where, moved[entries.to(moved.device)], len(names))
                for way, moved in difference.moved.items()
            }
        swaps.append(Swaps(dictionary.writes, tuple(names), deltas))
    swaps.append(whole_swaps(dictionary.writes, "all_features", difference.features, wanted, dictionary.name))
    swaps.append(whole_swaps(dictionary.writes, "error", difference.error, wanted, dictionary.name))
    return swaps


def _along(
    difference: Difference, entries: torch.Tensor, patch: torch.Tensor, directions: "Directions", patches: int
) -> dict[Direction, Deltas]:
    """Multiples of the features' directions."""
    moving = directions.moving[directions.rows(difference.feature[entries])]
    entries = entries[moving]
    return {
        way: Deltas(
            patches=patches,
            patch=patch[moving],
            position=difference.position[entries],
            direction=directions.rows(difference.feature[entries]),
            coefficient=value[entries.to(value.device)],
            directions=directions.values,
        )
        for way, value in difference.value.items()
    }


def count_swaps(difference: Difference, wanted: Wanted) -> int:
    """How many patches `feature_swaps` makes."""
    features = sum(len(difference.feature[difference.at(span)].unique()) for span in wanted.values())
    return features + sum(
        bool(_differing(change)[span].any()) for change in (difference.features, difference.error) for span in wanted.values()
    )


@dataclass(frozen=True)
class Directions:
    """Decoder directions of some features, probed once for all pairs that are run together; moving are those that aren't 0."""

    features: Int[torch.Tensor, " n"]
    values: Float[torch.Tensor, "n d_out"]
    moving: Bool[torch.Tensor, " n"]

    @classmethod
    def of(cls, dictionary: Dictionary, differences: Sequence[Difference]) -> "Directions":
        """Of every feature that differs somewhere."""
        along = [difference.feature for difference in differences if difference.moved is None]
        features = torch.cat([torch.zeros(0, dtype=torch.long), *along]).unique()
        values = dictionary.directions(features)
        return cls(features, values, (values != 0).any(1).cpu())

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """Where the directions of these features are."""
        return torch.searchsorted(self.features, features)


def whole_swaps(site: str, kind: str, change: Change, wanted: Wanted, sae: str = "") -> Swaps:
    """One swap per requested position of everything that differs there."""
    differs = _differing(change)
    nodes: list[Node] = []
    patch: list[int] = []
    position: list[int] = []
    for name, span in wanted.items():
        changed = [p for p in span if differs[p]]
        if changed:
            patch += [len(nodes)] * len(changed)
            position += changed
            nodes.append(Node(site, cast(Kind, kind), None, name, sae))
    where = torch.tensor(position, dtype=torch.long)
    numbers = torch.tensor(patch, dtype=torch.long)
    deltas = {way: Deltas.explicit(numbers, where, whole[where.to(whole.device)], len(nodes)) for way, whole in change.items()}
    return Swaps(site, tuple(nodes), deltas)


def _differing(change: Change) -> Bool[torch.Tensor, " pos"]:
    """Where something changes, in one direction at least."""
    return torch.stack([(whole != 0).any(1).cpu() for whole in change.values()]).any(0)
