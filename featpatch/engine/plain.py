"""The model's own forward pass, resumed at the patched layer, with the delta added by a hook: slow, but right for every model.

It reuses no position, so it also serves models with bidirectional attention, and hook points inside a layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch import sites
from featpatch.engine.cost import plain_flops
from featpatch.engine.work import BaseRun, Block, Unit
from featpatch.errors import FeatpatchError
from featpatch.lens import Lens, added


@dataclass(frozen=True)
class PlainPath:
    """The model's own forward pass as a way to run patches, see `PatchPath`."""

    lens: Lens

    def group(self, block: Block) -> tuple[str, int]:
        """Return the group of a block; blocks of one group may share a forward pass."""
        return block.site, len(block.run.tokens)

    def rows(self, unit: Unit) -> int:
        """Return the number of rows that one patch of a unit takes."""
        return len(unit.block.run.tokens)

    def flops(self, unit: Unit, columns: int) -> int:
        """Return the floating-point operations of the unit's matrix products; all logits are computed, whatever is read."""
        return plain_flops(self.lens, unit)

    def prepare(self, runs: Sequence[BaseRun]) -> None:
        """Do nothing, because this path keeps nothing of the base runs."""

    @torch.no_grad()
    def baseline(self, run: BaseRun, columns: Sequence[int] | None) -> Float[torch.Tensor, "1 columns"]:
        """Return the logits of the base run at its answer position."""
        layer = min(run.resid)
        tokens, answers = run.tokens[None].to(self.lens.device), torch.tensor([run.answer], device=self.lens.device)
        return _columns(self.lens.resume(layer, run.resid[layer][None].clone(), tokens, answers), columns)

    @torch.no_grad()
    def logits(self, units: Sequence[Unit], columns: Sequence[Sequence[int] | None]) -> list[Float[torch.Tensor, "_ _"]]:
        """Return the logits of every patch at its answer position; all units must be of one group."""
        site, length = self.group(units[0].block)
        layer, sizes = sites.layer_of(site), torch.tensor([len(unit.patches) for unit in units], device=self.lens.device)
        resid = torch.stack([unit.block.run.resid[layer] for unit in units])
        resid = resid.repeat_interleave(sizes.to(resid.device), 0)
        tokens = torch.stack([unit.block.run.tokens for unit in units]).to(self.lens.device).repeat_interleave(sizes, 0)
        answers = torch.tensor([unit.block.run.answer for unit in units], device=sizes.device).repeat_interleave(sizes)
        delta = torch.cat([self._dense(unit, length).to(resid.device) for unit in units])

        def add(activation: torch.Tensor) -> torch.Tensor:
            return added(activation, delta.reshape(activation.shape))

        with self.lens.edit(self.lens.carrier(site), add) as firing:
            logits = self.lens.resume(layer, resid, tokens, answers)
        if firing.count != 1:
            raise FeatpatchError(
                f"the patch at {site!r} fired {firing.count} times in a forward pass: expected once; "
                "choose a hook of every pass"
            )
        parts = logits.split(sizes.tolist())
        return [_columns(part, wanted) for part, wanted in zip(parts, columns, strict=True)]

    def _dense(self, unit: Unit, length: int) -> torch.Tensor:
        deltas = unit.block.deltas.select(unit.patches)
        values = deltas.values()
        dense = values.new_zeros(len(unit.patches), length, values.shape[-1])
        dense[deltas.patch.to(dense.device), deltas.position.to(dense.device)] = values
        return dense


def _columns(logits: torch.Tensor, columns: Sequence[int] | None) -> torch.Tensor:
    return logits if columns is None else logits[:, list(columns)]
