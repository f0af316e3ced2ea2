"""From what differs between the runs of a pair to the deltas of its swaps."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
from jaxtyping import Bool, Float, Int

from featpatch.engine import Deltas
from featpatch.files import sha256
from featpatch.lens import Dictionary
from featpatch.pairs.spans import Wanted
from featpatch.patch import Direction, Kind, Node, Position
from featpatch.patching.study.difference import Change, Difference


@dataclass(frozen=True)
class Swaps:
    """Nodes of one site that differ between the runs of one pair, with the deltas of both directions.

    Attributes:
        longer: by direction the deltas of each reading, where they are not the same because the prompt is continued.
    """

    site: str
    nodes: tuple[Node, ...]
    deltas: Mapping[Direction, Deltas]
    longer: Mapping[Direction, Sequence[Deltas]] = field(default_factory=dict)

    def at(self, direction: Direction, reading: int) -> Deltas:
        """The deltas of a reading."""
        return self.longer[direction][reading] if self.longer else self.deltas[direction]

    def keep(self, nodes: frozenset[Node]) -> "Swaps":
        """Those of these nodes."""
        kept = [patch for patch, node in enumerate(self.nodes) if node in nodes]
        some = torch.tensor(kept, dtype=torch.long)
        return Swaps(
            self.site,
            tuple(self.nodes[patch] for patch in kept),
            {way: deltas.select(some) for way, deltas in self.deltas.items()},
            {way: [deltas.select(some) for deltas in of_way] for way, of_way in self.longer.items()},
        )

    @property
    def name(self) -> str:
        """A short name of the nodes, the same in every run."""
        return sha256("\n".join(f"{node.sae} {node}" for node in self.nodes).encode())[:24]


Naming = Callable[[int, Position], Node]
"""The node of a feature at a requested position."""


def feature_swaps(difference: Difference, wanted: Wanted, directions: "Directions", site: str, naming: Naming) -> list[Swaps]:
    """Every feature that differs, alone; at each requested position."""
    swaps = []
    for position, span in wanted.items():
        entries = difference.at(span)
        indices, patch = difference.feature[entries].unique(return_inverse=True)
        nodes = tuple(naming(feature, position) for feature in indices.tolist())
        swaps.append(Swaps(site, nodes, deltas_of(difference, entries, patch, directions, len(nodes))))
    return swaps


def deltas_of(
    difference: Difference, entries: torch.Tensor, patch: torch.Tensor, directions: "Directions", patches: int
) -> dict[Direction, Deltas]:
    """The changes that entries make, each in its patch; patch ascends."""
    if difference.moved is None:
        return _along(difference, entries, patch, directions, patches)
    where = difference.position[entries]
    return {
        way: Deltas.explicit(patch, where, moved[entries.to(moved.device)], patches) for way, moved in difference.moved.items()
    }


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
    differs = differing(change)
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


def differing(change: Change) -> Bool[torch.Tensor, " pos"]:
    """Where something changes, in one direction at least."""
    return torch.stack([(whole != 0).any(1).cpu() for whole in change.values()]).any(0)
