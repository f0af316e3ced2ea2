"""Two ways to run patches, with the same interface, and the choice between them by measurement.

Featpatch's own forward pass is fast and written for one form of layer; the model's own pass is right by definition. Before a
sweep, a few random patches go through both; if they disagree, or the model has another form, the plain path is used, with a
warning.

The plain path resumes the model's own forward pass at the lowest patched layer, with the changes made by hooks. It reuses no
position, so it also serves models with bidirectional attention, and hook points inside a layer.
"""

import warnings
from collections.abc import Hashable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch.nn import functional

from featpatch import sites
from featpatch.engine.cost import plain_flops
from featpatch.engine.patches import BaseRun, Block, Deltas
from featpatch.engine.suffix import Columns, SuffixPath
from featpatch.errors import FeatpatchError, FeatpatchWarning
from featpatch.model.layer import UnsupportedError, product_rounding
from featpatch.model.lens import Edit, Lens, added
from featpatch.nodes import Combine


@dataclass(frozen=True)
class PlainPath:
    """The model's own forward pass as a way to run patches, see `PatchPath`."""

    lens: Lens

    def group(self, block: Block) -> tuple[tuple[str, ...], Combine, int]:
        """Return the group of a block; blocks of one group may share a forward pass."""
        return tuple(block.deltas), block.combine if len(block.deltas) > 1 else "add", len(block.run.tokens)

    def rows(self, unit: Block) -> int:
        """Return the number of rows that one patch of a unit takes."""
        return len(unit.run.tokens)

    def flops(self, unit: Block, columns: int) -> int:
        """Return the floating-point operations of the unit's matrix products; all logits are computed, whatever is read."""
        return plain_flops(self.lens, unit)

    def prepare(self, runs: Iterable[BaseRun]) -> None:
        """Do nothing, because this path keeps nothing of the base runs."""

    @torch.no_grad()
    def baseline(self, run: BaseRun, columns: Columns) -> Float[torch.Tensor, "1 columns"]:
        """Return the logits of the base run at its answer position."""
        layer = min(run.resid)
        tokens, answers = run.tokens[None].to(self.lens.device), torch.tensor([run.answer], device=self.lens.device)
        return _columns(self.lens.resume(layer, run.resid[layer][None].clone(), tokens, answers), columns)

    @torch.no_grad()
    def logits(self, units: Sequence[Block], columns: Sequence[Columns]) -> list[Float[torch.Tensor, "_ _"]]:
        """Return the logits of every patch at its answer position; all units must be of one group."""
        hooks, combine, length = self.group(units[0])
        layer, base = min(map(sites.layer_of, hooks)), int(combine == "set")
        sizes = torch.tensor([len(unit) + base for unit in units], device=self.lens.device)
        resid = torch.stack([unit.run.resid[layer] for unit in units])
        resid = resid.repeat_interleave(sizes.to(resid.device), 0)
        tokens = torch.stack([unit.run.tokens for unit in units]).to(self.lens.device).repeat_interleave(sizes, 0)
        answers = torch.tensor([unit.run.answer for unit in units], device=sizes.device).repeat_interleave(sizes)
        with ExitStack() as stack:
            firing = {}
            for site in sorted(hooks, key=sites.is_stream):  # where both are changed by one hook: what is added, then the sum
                adding = combine == "add"
                change = self._adding(site, units, length) if adding else self._setting(site, units, length, stack)
                firing[site] = stack.enter_context(self.lens.edit(self.lens.carrier(site), change))
            logits = self.lens.resume(layer, resid, tokens, answers)
        for site, fired in firing.items():
            if fired.count != 1:
                raise FeatpatchError(
                    f"the hook {site!r} was called {fired.count} times in one forward pass: expected once; choose a hook point "
                    "that every pass reaches once"
                )
        parts = [part[: len(part) - base] for part in logits.split(sizes.tolist())]
        return [_columns(part, wanted) for part, wanted in zip(parts, columns, strict=True)]

    def _adding(self, site: str, units: Sequence[Block], length: int) -> Edit:
        """Return a function that adds the changes at a hook point to the activations of all patches."""
        delta = torch.cat([unit.of(site).dense(length) for unit in units])

        def change(activation: torch.Tensor) -> torch.Tensor:
            return added(activation, delta.reshape(activation.shape))

        return change

    def _setting(self, site: str, units: Sequence[Block], length: int, stack: ExitStack) -> Edit:
        """Return a function that sets activations to those of the base run plus the change, where a patch names a position.

        The base run of each unit is the row after its patches.
        """
        deltas = [unit.of(site) for unit in units]
        delta = torch.cat([functional.pad(each.dense(length), (0, 0, 0, 0, 0, 1)) for each in deltas])
        named = torch.cat([functional.pad(each.named(length), (0, 0, 0, 1)) for each in deltas])
        sizes = torch.tensor([len(each) + 1 for each in deltas])
        of_base = (sizes.cumsum(0) - 1).repeat_interleave(sizes)
        entering: list[torch.Tensor] = []
        if self.lens.carrier(site) != site:  # what is set is the sum of this and what enters the layer
            stack.enter_context(self.lens.edit(sites.resid_pre(sites.layer_of(site)), entering.append))

        def change(activation: torch.Tensor) -> torch.Tensor:
            flat = activation.flatten(2)
            below = entering[0] if entering else 0
            value = added((below + flat)[of_base], delta) - below
            return torch.where(named.to(flat.device)[..., None], value, flat).reshape(activation.shape)

        return change


def _columns(logits: torch.Tensor, columns: Columns) -> torch.Tensor:
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

    def rows(self, unit: Block) -> int:
        """Return the number of rows that one patch of a unit takes."""
        ...

    def flops(self, unit: Block, columns: int) -> int:
        """Return the floating-point operations of the unit's matrix products, if `columns` logits are read."""
        ...

    def prepare(self, runs: Iterable[BaseRun]) -> None:
        """Compute what the patches of these base runs share."""
        ...

    def baseline(self, run: BaseRun, columns: Columns) -> Float[torch.Tensor, "1 columns"]:
        """Return the logits of the base run at its answer position."""
        ...

    def logits(self, units: Sequence[Block], columns: Sequence[Columns]) -> list[Float[torch.Tensor, "_ _"]]:
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


def choose_path(lens: Lens, runs: Sequence[BaseRun], wanted: Sequence[tuple[tuple[str, ...], Combine]]) -> PatchPath:
    """Return the fast path if it is right for every patch, else the plain one.

    Args:
        runs: base runs to check with, those of the shortest and the longest pair.
        wanted: the hook points that will be patched together, and what such a patch means.
    """
    plain = PlainPath(lens)
    try:
        for site in (site for hooks, _ in wanted for site in hooks):
            if sites.entry(site) is None:
                raise UnsupportedError(f"the hook point {site!r} inside a layer")
        if lens.hooked:
            raise UnsupportedError("hooks attached by you")
        if not lens.causal:
            raise UnsupportedError("bidirectional attention")
        lengths = [len(run.tokens) for run in runs]
        fast = SuffixPath(lens, lens.stack(min(lengths), max(lengths)))
        worst = max(_disagreement(fast, plain, run, *patched) for run in runs for patched in wanted)
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
def _disagreement(fast: PatchPath, plain: PlainPath, run: BaseRun, hooks: Sequence[str], combine: Combine) -> float:
    """Return the largest difference of logits between the paths, in units of what rounding explains."""
    lens, resid = plain.lens, run.resid[min(map(sites.layer_of, hooks))]
    generator = torch.Generator().manual_seed(0)
    position, number = torch.linspace(0, run.answer / 2, PROBES).long(), torch.arange(PROBES)
    deltas = {}
    for site in hooks:
        width = lens.n_heads * lens.d_head if sites.is_component(site, "z") else lens.d_model
        values = resid.float().std().item() * torch.randn(PROBES, width, generator=generator)
        deltas[site] = Deltas.explicit(number, position, values.to(resid), PROBES)
    units = [Block("probe", run, deltas, number[row, None], combine) for row in range(PROBES)]
    found, true = (torch.cat(path.logits(units, [None] * PROBES)).double().cpu() for path in (fast, plain))
    rounding = max(product_rounding(resid.dtype, 80), 80 * torch.finfo(torch.float32).eps)
    tolerance = rounding * true.abs().max().item()
    return float("inf") if not torch.isfinite(found).all() else (found - true).abs().max().item() / max(tolerance, 1e-30)
