"""The work that the engine is given: base runs, blocks of patches, and the units that share a forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch.engine.deltas import Deltas


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
    """A block of patches, all of one base run at one hook point (not a transformer layer).

    Attributes:
        name: a description of the patches that is unique within the base run.
        run: the base run.
        site: the hook point where the deltas are added.
        deltas: one change per patch, as wide as the flat activation.
    """

    name: str
    run: BaseRun
    site: str
    deltas: Deltas


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

    @property
    def name(self) -> str:
        """A description of what the unit computes, unique within a sweep."""
        return f"{self.block.run.name}|{self.block.name}|{self.patches.tolist()}"
