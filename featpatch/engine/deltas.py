"""Changes of an activation, one per patch, made only when they are needed: `deltas[a:b]` is a tensor `[b - a, pos, d]`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float


@runtime_checkable
class Deltas(Protocol):
    """As many changes `[pos, d]` as there are patches."""

    def __len__(self) -> int: ...

    def __getitem__(self, patches: slice) -> Float[torch.Tensor, "patches pos d"]: ...

    def __neg__(self) -> "Deltas":
        """The same changes in the other direction."""
        ...


@dataclass(frozen=True)
class Directional:
    """One direction per patch, times a coefficient per position: `delta[n, t] = coefficients[n, t] * directions[n]`."""

    coefficients: Float[torch.Tensor, "patches pos"]
    directions: Float[torch.Tensor, "patches d"]

    def __len__(self) -> int:
        return len(self.directions)

    def __getitem__(self, patches: slice) -> Float[torch.Tensor, "some pos d"]:
        return self.coefficients[patches, :, None] * self.directions[patches, None]

    def __neg__(self) -> "Directional":
        return Directional(-self.coefficients, self.directions)


@dataclass(frozen=True)
class Explicit:
    """Changes that are written out."""

    values: Sequence[torch.Tensor]

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, patches: slice) -> Float[torch.Tensor, "some pos d"]:
        return torch.stack(list(self.values[patches]))

    def __neg__(self) -> "Explicit":
        return Explicit([-value for value in self.values])
