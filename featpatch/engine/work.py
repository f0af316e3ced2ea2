"""What the engine is asked to do: base runs, blocks of patches, and the units that share a forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch.engine.deltas import Deltas
from featpatch.pairs import Pair


@dataclass(frozen=True, eq=False)
class BaseRun:
    """A run that patches are made in.

    Attributes:
        name: what it is, unique within a sweep, e.g. `"pair 3 denoising"`.
        pair: whose answers and answer position the metric takes.
        tokens: `[pos]`.
        resid: the residual stream `[pos, d_model]` at the entry of the blocks at which patches come in, by block.
        clean: the clean run of the pair, None where this is it.
    """

    name: str
    pair: Pair
    tokens: Int[torch.Tensor, " pos"]
    resid: Mapping[int, Float[torch.Tensor, "pos d_model"]]
    clean: "BaseRun | None" = None

    @property
    def answer(self) -> int:
        """Where the metric is read."""
        return self.pair.answer_position


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
