"""Two ways to run patches, with the same interface, and the choice between them by measurement.

Featpatch's own forward pass is fast and written for one form of layer; the model's own pass is right by definition. Before a
sweep, a few random patches go through both; if they disagree, or the model has another form, the plain path is used, with a
warning.
"""

import warnings
from collections.abc import Hashable, Sequence
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float

from featpatch import sites
from featpatch.engine.deltas import Deltas
from featpatch.engine.plain import PlainPath
from featpatch.engine.suffix import SuffixPath
from featpatch.engine.work import BaseRun, Block, Unit
from featpatch.errors import FeatpatchWarning
from featpatch.lens import Lens, UnsupportedError

PROBES = 2
"""Number of random patches per hook point that go through both paths."""


@runtime_checkable
class PatchPath(Protocol):
    """A way to run patches."""

    @property
    def lens(self) -> Lens:
        """The model."""
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
    """Warning that a model runs through its own forward pass, which is right but slower than the fast one."""


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
                raise UnsupportedError(f"site {site!r} inside a block")
        if lens.hooked:
            raise UnsupportedError("hooks that you attached")
        if not lens.causal:
            raise UnsupportedError("attention in both directions")
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
        f"{lens.kind} {lens.name!r} runs through its own forward pass instead of the fast one "
        f"({reason}): results are the same, a sweep takes longer",
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
