"""What the engine is given: base runs, and blocks of patches as sparse changes of activations at one hook point or several.

A patch at several hook points has one of two meanings, because a change at one of them also changes what arrives at those
downstream of it:

    "add"    x' = x_arriving + delta
    "set"    x' = x_base     + delta      at the positions that the patch names, so that what arrives there is replaced
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from jaxtyping import Bool, Float, Int

from featpatch.nodes import Combine

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
        if self._one_row_each:
            return self._keep(patches, len(patches), torch.arange(len(patches)))
        number = torch.full((self.patches,), -1)
        number[patches] = torch.arange(len(patches))
        rows = (number[self.patch] >= 0).nonzero()[:, 0]
        return self._keep(rows, len(patches), number[self.patch[rows]])

    @cached_property
    def _one_row_each(self) -> bool:
        """Whether row i is the only one of patch i, for every patch."""
        return len(self.patch) == self.patches and torch.equal(self.patch, torch.arange(self.patches))

    def upto(self, position: int) -> "Deltas":
        """Return the changes at positions up to `position`."""
        if bool((self.position <= position).all()):
            return self
        rows = (self.position <= position).nonzero()[:, 0]
        return self._keep(rows, self.patches, self.patch[rows])

    def values(self) -> Float[torch.Tensor, "rows d"]:
        """Return the change that each row makes."""
        return self.coefficient[:, None] * self.directions[self.direction.to(self.directions.device)]

    def dense(self, length: int) -> Float[torch.Tensor, "patches pos d"]:
        """Return the changes of all patches at positions 0 to `length` - 1, zero where a patch changes nothing."""
        values = self.values()
        dense = values.new_zeros(self.patches, length, values.shape[-1])
        dense[self.patch.to(dense.device), self.position.to(dense.device)] = values
        return dense

    def named(self, length: int) -> Bool[torch.Tensor, "patches pos"]:
        """Return the positions 0 to `length` - 1 at which each patch has a row, even if its change there is zero."""
        named = torch.zeros(self.patches, length, dtype=torch.bool)
        named[self.patch, self.position] = True
        return named

    def _keep(self, rows: torch.Tensor, patches: int, patch: torch.Tensor) -> "Deltas":
        coefficient = self.coefficient[rows.to(self.coefficient.device)]
        return Deltas(patches, patch, self.position[rows], self.direction[rows], coefficient, self.directions)


@dataclass(frozen=True, eq=False)
class BaseRun:
    """A run that patches are applied to.

    Attributes:
        name: a description that is unique within a sweep, e.g. `"pair 3 denoising"`.
        tokens: the token ids, `[pos]`.
        resid: the residual stream `[pos, d_model]` at the input of the layers at which patches enter, by layer.
        answer: the position where the metric is read.
        correct, wrong: the token ids of the answers there.
        clean: the clean run of the pair; None if this run is the clean run.
    """

    name: str
    tokens: Int[torch.Tensor, " pos"]
    resid: Mapping[int, Float[torch.Tensor, "pos d_model"]]
    answer: int
    correct: Sequence[int]
    wrong: Sequence[int]
    clean: "BaseRun | None" = None


@dataclass(frozen=True)
class Block:
    """A block of patches, all of one base run and at the same hook points (not a transformer layer).

    Attributes:
        name: a description of the patches that is unique within the base run.
        run: the base run.
        deltas: by hook point, one change per patch, as wide as the flat activation; the changes of a patch at one position
            of a hook point are a single row.
        combine: what a patch at several hook points means, see above.
    """

    name: str
    run: BaseRun
    deltas: Mapping[str, Deltas]
    combine: Combine = "add"

    def __len__(self) -> int:
        return len(next(iter(self.deltas.values())))

    def first(self) -> Int[torch.Tensor, " patches"]:
        """Return the first position that each patch changes at any hook point, or NEVER."""
        return reduce(torch.minimum, (deltas.first() for deltas in self.deltas.values()))


@dataclass(frozen=True)
class Unit:
    """Patches of one block that change nothing before the same position.

    Attributes:
        index: the index of the block.
        block: the block.
        patches: indices of the patches within the block, in ascending order.
        first: the first position that any of them changes.
    """

    index: int
    block: Block
    patches: Int[torch.Tensor, " patches"]
    first: int

    def part(self, start: int, stop: int) -> "Unit":
        """Return the unit with the patches from `start` to `stop` alone."""
        return Unit(self.index, self.block, self.patches[start:stop], self.first)

    def deltas(self, site: str) -> Deltas:
        """Return the changes that the patches of the unit make at a hook point of the block."""
        return self.block.deltas[site].select(self.patches)

    @property
    def name(self) -> str:
        """A description of what the unit computes, unique within a sweep."""
        return f"{self.block.run.name}|{self.block.name}|{self.patches.tolist()}"
