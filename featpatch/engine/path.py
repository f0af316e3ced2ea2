"""Two ways to run patches, with the same interface, and the choice between them by measurement.

Featpatch's own forward pass is fast and written for one form of layer; the model's own pass is right by definition. Before a
sweep, a few random patches go through both; if they disagree, or the model has another form, the plain path is used, with a
warning.

The plain path resumes the model's own forward pass at the patched layer, with the delta added by a hook. It reuses no position,
so it also serves models with bidirectional attention, and hook points inside a layer.
"""

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float

from featpatch import sites
from featpatch.engine.cost import plain_flops
from featpatch.engine.patches import BaseRun, Block, Deltas, Unit
from featpatch.engine.suffix import SuffixPath
from featpatch.errors import FeatpatchError, FeatpatchWarning
from featpatch.model.layer import UnsupportedError
from featpatch.model.lens import Lens, added


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
                f"the hook {site!r} was called {firing.count} times in one forward pass: expected once; choose a hook point "
                "that every pass reaches once"
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


PROBES = 2
"""Number of random patches per hook point that go through both paths."""


@runtime_checkable
class PatchPath(Protocol):
    """A way to run patches."""

    @property
    def lens(self) -> Lens:
        """The lens of the model that runs the patches."""
        ...

    def group(self, block: Block) -> Hashable:
        """Return the group of a block; blocks of one group may share a forward pass."""
        ...

    def rows(self, unit: Unit) -> int:
        """Return the number of rows that one patch of a unit takes."""
        ...

    def flops(self, unit: Unit, columns: int) -> int:
        """Return the floating-point operations of the unit's matrix products, if `columns` logits are read."""
        ...

    def prepare(self, runs: Sequence[BaseRun]) -> None:
        """Compute what the patches of these base runs share."""
        ...

    def baseline(self, run: BaseRun, columns: Sequence[int] | None) -> Float[torch.Tensor, "1 columns"]:
        """Return the logits of the base run at its answer position."""
        ...

    def logits(self, units: Sequence[Unit], columns: Sequence[Sequence[int] | None]) -> list[Float[torch.Tensor, "_ _"]]:
        """Return the logits of every patch at its answer position; all units must be of one group."""
        ...


class SlowPathWarning(FeatpatchWarning):
    """Warning that a model runs through its own forward pass, which is right but slower than the fast one.

    Examples:
        >>> import warnings
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("error", fp.SlowPathWarning)  # refuse the slow path
        ...     layers = fp.rank_components(model, pairs, sites="resid_pre", positions=["S2"], progress=False)
    """


def choose_path(lens: Lens, runs: Sequence[BaseRun], wanted: Sequence[str]) -> PatchPath:
    """Return the fast path if it is right for every hook point, else the plain one.

    Args:
        runs: base runs to check with, those of the shortest and the longest pair.
        wanted: the hook points that will be patched.
    """
    plain = PlainPath(lens)
    try:
        for site in wanted:
            if sites.entry(site) is None:
                raise UnsupportedError(f"the hook point {site!r} inside a layer")
        if lens.hooked:
            raise UnsupportedError("hooks attached by you")
        if not lens.causal:
            raise UnsupportedError("bidirectional attention")
        lengths = [len(run.tokens) for run in runs]
        fast = SuffixPath(lens, lens.stack(min(lengths), max(lengths)))
        worst = max(_disagreement(fast, plain, run, site) for run in runs for site in wanted)
        if worst <= 1:
            fast.traces.clear()  # made one run at a time; a sweep makes traces together, which rounds differently
            return fast
        reason = f"the two differ by {worst:.2g} times the tolerance"
    except UnsupportedError as unsupported:
        reason = str(unsupported)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    lens.watch.check()
    warnings.warn(
        f"{lens.kind} {lens.name!r} uses its own forward pass instead of the fast one ({reason}): results are the same, but a "
        "sweep takes longer",
        SlowPathWarning,
        stacklevel=5,
    )
    return plain


@torch.no_grad()
def _disagreement(fast: PatchPath, plain: PlainPath, run: BaseRun, site: str) -> float:
    """Return the largest difference of logits between the paths, in units of what rounding explains."""
    layer = sites.layer_of(site)
    lens = plain.lens
    width = lens.n_heads * lens.d_head if sites.entry(site) == (layer, "z") else lens.d_model
    generator = torch.Generator().manual_seed(0)
    size = run.resid[layer].float().std().item()
    values = (size * torch.randn(PROBES, width, generator=generator)).to(run.resid[layer])
    position = torch.linspace(0, run.answer / 2, PROBES).long()
    number = torch.arange(PROBES)
    block = Block("probe", run, site, Deltas.explicit(number, position, values, PROBES))
    units = [Unit(0, block, number[row, None], int(first)) for row, first in enumerate(position)]
    found, true = (torch.cat(path.logits(units, [None] * PROBES)).double().cpu() for path in (fast, plain))
    eps = torch.finfo(run.resid[layer].dtype).eps
    tolerance = (8 if eps > 1e-4 else 80) * max(eps, torch.finfo(torch.float32).eps) * true.abs().max().item()
    return float("inf") if not torch.isfinite(found).all() else (found - true).abs().max().item() / max(tolerance, 1e-30)
