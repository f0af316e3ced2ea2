"""Turn the differences between the runs of a pair into deltas of patches."""

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
    """Nodes at one hook point that differ between the runs of one pair, with the deltas of each direction.

    Attributes:
        site: the hook point.
        nodes: the nodes, one patch each.
        deltas: the deltas of the patches, by direction.
        longer: by direction, the deltas for each reading, if they depend on the tokens that follow the prompt; otherwise empty.
    """

    site: str
    nodes: tuple[Node, ...]
    deltas: Mapping[Direction, Deltas]
    longer: Mapping[Direction, Sequence[Deltas]] = field(default_factory=dict)

    def at(self, direction: Direction, reading: int) -> Deltas:
        """Return the deltas for a reading."""
        return self.longer[direction][reading] if self.longer else self.deltas[direction]

    def keep(self, nodes: frozenset[Node]) -> "Swaps":
        """Return the swaps of only these nodes."""
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
        """A short name derived from the nodes, the same every time."""
        return sha256("\n".join(f"{node.sae} {node}" for node in self.nodes).encode())[:24]


Naming = Callable[[int, Position], Node]
"""A function that returns the node of a feature at a requested position."""


def feature_swaps(difference: Difference, wanted: Wanted, directions: "Directions", site: str, naming: Naming) -> list[Swaps]:
    """Return one `Swaps` per requested position, in which each feature that differs there is patched alone."""
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
    """Return the deltas that entries of a difference make.

    Args:
        difference: the difference.
        entries: indices of entries of the difference.
        patch: the number of the patch that each entry belongs to, ascending.
        directions: the directions of the features.
        patches: the number of patches.
    """
    if difference.moved is None:
        return _along(difference, entries, patch, directions, patches)
    where = difference.position[entries]
    return {
        way: Deltas.explicit(patch, where, moved[entries.to(moved.device)], patches) for way, moved in difference.moved.items()
    }


def _along(
    difference: Difference, entries: torch.Tensor, patch: torch.Tensor, directions: "Directions", patches: int
) -> dict[Direction, Deltas]:
    """Return the deltas as multiples of the features' directions."""
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
    """Decoder directions of some features, computed once for all pairs that run together.

    Attributes:
        features: the features, ascending.
        values: the direction of each feature.
        moving: mask of the features whose direction is not 0.
    """

    features: Int[torch.Tensor, " n"]
    values: Float[torch.Tensor, "n d_out"]
    moving: Bool[torch.Tensor, " n"]

    @classmethod
    def of(cls, dictionary: Dictionary, differences: Sequence[Difference]) -> "Directions":
        """Compute the directions of all features that differ in any of the differences."""
        along = [difference.feature for difference in differences if difference.moved is None]
        features = torch.cat([torch.zeros(0, dtype=torch.long), *along]).unique()
        values = dictionary.directions(features)
        return cls(features, values, (values != 0).any(1).cpu())

    def rows(self, features: torch.Tensor) -> torch.Tensor:
        """Return the rows of `values` that hold the directions of these features."""
        return torch.searchsorted(self.features, features)


def whole_swaps(site: str, kind: str, change: Change, wanted: Wanted, sae: str = "") -> Swaps:
    """Return one patch per requested position, which makes the whole change there.

    Args:
        site: the hook point that is patched.
        kind: the kind of the nodes.
        change: the change of the activation, by direction.
        wanted: the requested positions.
        sae: the name of the dictionary, if the nodes belong to one.
    """
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
    """Return a mask of the positions that change in at least one direction."""
    return torch.stack([(whole != 0).any(1).cpu() for whole in change.values()]).any(0)
