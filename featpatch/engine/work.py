"""What the engine is asked to do: base runs, blocks of patches, and the units that share a forward pass."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch.engine.deltas import Deltas


@dataclass(frozen=True, eq=False)
class BaseRun:
    """A run that patches are made in.

    Attributes:
        name: what it is, unique within a sweep, e.g. `"pair 3 denoising"`.
        tokens: `[pos]`.
        resid: the residual stream `[pos, d_model]` at the entry of the blocks at which patches come in, by block.
        answer: where the metric is read.
        correct, wrong: ids of the answers there.
        clean: the clean run of the pair, None where this is it.
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
    """Patches of one base run at one site.

    Attributes:
        name: what they are, unique within the base run.
        site: where the deltas are added.
        deltas: one change per patch, as wide as the activation when flat.
    """

    name: str
    run: BaseRun
    site: str
    deltas: Deltas


@dataclass(frozen=True)
class Unit:
    """Patches of one block that change nothing before the same position.

    Attributes:
        block: the block, and its index.
        patches: indices of the patches within the block, ascending.
        first: the first position that any of them changes.
    """

    index: int
    block: Block
    patches: Int[torch.Tensor, " patches"]
    first: int

    def part(self, start: int, stop: int) -> "Unit":
        """Some of the patches."""
        return Unit(self.index, self.block, self.patches[start:stop], self.first)

    @property
    def name(self) -> str:
        """What it computes, unique within a sweep."""
        return f"{self.block.run.name}|{self.block.name}|{self.patches.tolist()}"
