"""Changes of an activation, one per patch, stored sparsely: only rows that differ are kept."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int

NEVER = torch.iinfo(torch.int64).max
"""The first changed position of a patch that changes nothing."""


@dataclass(frozen=True)
class Deltas:
    """Changes of an activation: row r adds `coefficient[r] * directions[direction[r]]` at `position[r]` in patch `patch[r]`.

    Attributes:
        patches: the number of patches, including those that change nothing.
        patch, position, direction: indices, on the CPU; `patch` is in ascending order.
        coefficient, directions: values in the SAE's dtype, on its device.
    """

    patches: int
    patch: Int[torch.Tensor, " rows"]
    position: Int[torch.Tensor, " rows"]
    direction: Int[torch.Tensor, " rows"]
    coefficient: Float[torch.Tensor, " rows"]
    directions: Float[torch.Tensor, "directions d"]

    def __len__(self) -> int:
        return self.patches

    def __neg__(self) -> "Deltas":
        return replace(self, coefficient=-self.coefficient)

    @classmethod
    def explicit(cls, patch: torch.Tensor, position: torch.Tensor, values: torch.Tensor, patches: int) -> "Deltas":
        """Make changes from their values `[rows, d]`."""
        ones = torch.ones(len(values), dtype=values.dtype, device=values.device)
        return cls(patches, patch, position, torch.arange(len(values)), ones, values)

    def first(self) -> Int[torch.Tensor, " patches"]:
        """Return the first position that each patch changes, or NEVER."""
        return torch.full((self.patches,), NEVER).scatter_reduce(0, self.patch, self.position, "amin")

    def select(self, patches: Int[torch.Tensor, " some"]) -> "Deltas":
        """Return the changes of some patches, given in ascending order, renumbered from 0."""
        if len(patches) == self.patches:
            return self
        number = torch.full((self.patches,), -1)
        number[patches] = torch.arange(len(patches))
        return self._keep((number[self.patch] >= 0).nonzero()[:, 0], len(patches), number)

    def upto(self, position: int) -> "Deltas":
        """Return the changes at positions up to `position`."""
        if bool((self.position <= position).all()):
            return self
        return self._keep((self.position <= position).nonzero()[:, 0], self.patches, torch.arange(self.patches))

    def values(self) -> Float[torch.Tensor, "rows d"]:
        """Return the change that each row makes."""
        return self.coefficient[:, None] * self.directions[self.direction.to(self.directions.device)]

    def _keep(self, rows: torch.Tensor, patches: int, number: torch.Tensor) -> "Deltas":
        return replace(
            self,
            patches=patches,
            patch=number[self.patch[rows]],
            position=self.position[rows],
            direction=self.direction[rows],
            coefficient=self.coefficient[rows.to(self.coefficient.device)],
        )
