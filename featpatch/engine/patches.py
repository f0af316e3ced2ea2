"""What the engine is given, base runs and patches as sparse changes of their activations, and the rows that it computes.

A patch at several hook points has one of two meanings, because a change at one of them also changes what arrives at those
downstream of it:

    "add"    x' = x_arriving + delta
    "set"    x' = x_base     + delta      at the positions that the patch names, so that what arrives there is replaced

Patches of one base run at the same hook points form a `Block`. A unit is a block whose patches all have the same first changed
position. In the fast forward pass, the rows of all units of a batch lie in one `Matrix`, unit by unit, patch by patch, position
by position from the first changed one to the answer. In the last layer, after the keys and values, only the answer row of each
patch is left.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import accumulate
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int

from featpatch import sites
from featpatch.model.lens import added
from featpatch.nodes import Combine, Node

Key = TypeVar("Key", bound=Hashable)

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

    @classmethod
    def explicit(cls, patch: torch.Tensor, position: torch.Tensor, values: torch.Tensor, patches: int) -> "Deltas":
        """Make changes from their values `[rows, d]`."""
        ones = torch.ones(len(values), dtype=values.dtype, device=values.device)
        return cls(patches, patch, position, torch.arange(len(values)), ones, values)

    @classmethod
    def nonzero(cls, values: Float[torch.Tensor, "patches pos d"]) -> "Deltas":
        """Make changes from the values of each patch at every position, with rows only where they are not 0; see `dense`."""
        patch, position = (values != 0).any(2).nonzero(as_tuple=True)
        return cls.explicit(patch.cpu(), position.cpu(), values[patch, position], len(values))

    @classmethod
    def joined(cls, several: Sequence["Deltas"]) -> "Deltas":
        """Return the patches of several deltas, one after the other, on the device of the first.

        Directions that they share are kept once.
        """
        device = several[0].directions.device

        def key(deltas: Deltas) -> tuple[torch.device, int, int]:
            return deltas.directions.device, deltas.directions.data_ptr(), len(deltas.directions)

        tables = {key(deltas): deltas.directions for deltas in several}
        rows = dict(zip(tables, accumulate(map(len, tables.values()), initial=0), strict=False))
        patches = [*accumulate((deltas.patches for deltas in several), initial=0)]
        return cls(
            patches=patches.pop(),
            patch=torch.cat([deltas.patch + before for deltas, before in zip(several, patches, strict=True)]),
            position=torch.cat([deltas.position for deltas in several]),
            direction=torch.cat([deltas.direction + rows[key(deltas)] for deltas in several]),
            coefficient=torch.cat([deltas.coefficient.to(device) for deltas in several]),
            directions=several[0].directions if len(tables) == 1 else torch.cat([each.to(device) for each in tables.values()]),
        )

    @cached_property
    def first(self) -> Int[torch.Tensor, " patches"]:
        """The first position that each patch changes, or NEVER."""
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

    def values(self, rows: Int[torch.Tensor, " some"] | None = None) -> Float[torch.Tensor, "some d"]:
        """Return the change that each row makes, or each of some rows."""
        kept = self if rows is None else self._keep(rows, self.patches, self.patch[rows])
        return kept.coefficient[:, None] * kept.directions[kept.direction.to(kept.directions.device)]

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


@dataclass(frozen=True, eq=False)
class Block:
    """Patches of one base run at the same hook points (not a transformer layer).

    Attributes:
        name: a description of the patches of `deltas` that is unique within the base run.
        run: the base run.
        deltas: by hook point, one change per patch, as wide as the flat activation; the changes of a patch at one position
            of a hook point are a single row.
        patches: the numbers of the patches in this block among those of `deltas`, in ascending order.
        combine: what a patch at several hook points means, see the top of this file.
        nodes: the nodes that the patches of `deltas` are named by, one each; the engine does not read them.
    """

    name: str
    run: BaseRun
    deltas: Mapping[str, Deltas]
    patches: Int[torch.Tensor, " patches"]
    combine: Combine = "add"
    nodes: tuple[Node, ...] = ()

    def __len__(self) -> int:
        return len(self.patches)

    def part(self, some: "torch.Tensor | slice") -> "Block":
        """Return the block with some of its patches."""
        return replace(self, patches=self.patches[some])

    def of(self, site: str) -> Deltas:
        """Return the changes that the patches of the block make at a hook point."""
        return self.deltas[site].select(self.patches)

    @property
    def starts(self) -> Int[torch.Tensor, " patches"]:
        """The first position that each patch changes at any hook point, or NEVER."""
        return reduce(torch.minimum, (deltas.first for deltas in self.deltas.values()))[self.patches]

    @cached_property
    def first(self) -> int:
        """The first position that any patch changes."""
        return int(self.starts.min())

    @property
    def key(self) -> str:
        """A description of what the block computes, unique within a sweep."""
        return f"{self.run.name}|{self.name}|{self.patches.tolist()}"


Entry = tuple[int, str]
"""A layer, and a place in it where changes enter, see `sites.ENTRIES`; the layer after the last stands for the end."""


Trace = dict[tuple[int, str], torch.Tensor]
"""The activations of a base run in featpatch's own forward pass, by layer and name.

The names are `pre` for the residual stream `[pos, d_model]` at the input of the layer (after the last layer, at its output),
`mid` for the residual stream after attention, `z` for the output of attention before W_O `[pos, width]`, and `query`, `key` and
`value` for these `[pos, heads, d_head]`.
"""


Changes = dict[tuple[str, Combine], tuple[Int[torch.Tensor, " rows"], Float[torch.Tensor, "rows d"]]]
"""The changes that enter at one place: the rows of a `Matrix` and what is added there, by hook point and meaning."""


@dataclass(frozen=True, eq=False)
class Matrix:
    """The rows of a batch: unit by unit, patch by patch, position by position from the first changed one to the answer.

    Row numbers are on the CPU.

    Attributes:
        units: the units of the batch: blocks whose patches all have the same first changed position.
        traces: the traces of their base runs.
    """

    units: Sequence[Block]
    traces: Mapping[BaseRun, Trace]

    @cached_property
    def sizes(self) -> list[int]:
        """The number of patches of each unit."""
        return [*map(len, self.units)]

    @cached_property
    def groups(self) -> list[tuple[int, int, list[tuple[Trace, int]]]]:
        """The adjacent units that share attention: first and last position, and each base run's trace with its patches."""
        found: list[tuple[int, int, list[tuple[Trace, int]]]] = []
        for unit, size in zip(self.units, self.sizes, strict=True):
            ends, trace = (unit.first, unit.run.answer), self.traces[unit.run]
            if not found or found[-1][:2] != ends:
                found.append((*ends, []))
            runs = found[-1][2]
            if runs and runs[-1][0] is trace:
                size += runs.pop()[1]
            runs.append((trace, size))
        return found

    @cached_property
    def hooks(self) -> dict[Entry, list[tuple[str, Combine]]]:
        """The hook points that are patched and the meanings of these patches, by the place where they enter."""
        patched = dict.fromkeys((site, unit.combine) for unit in self.units for site in unit.deltas)
        places: dict[Entry, list[tuple[str, Combine]]] = {}
        for site, combine in sorted(patched, key=lambda each: (sites.is_stream(each[0]), sites.layer_of(each[0]))):
            places.setdefault(entry(site), []).append((site, combine))  # addends come before sums
        return places

    @cached_property
    def starts(self) -> Int[torch.Tensor, " patches"]:
        """The row that position 0 of each patch would have: the patch's row at position p is this plus p."""
        return self.ends - self._of_patches(unit.run.answer for unit in self.units)

    @cached_property
    def ends(self) -> Int[torch.Tensor, " patches"]:
        """The answer row of each patch."""
        return self._lengths.cumsum(0) - 1

    @cached_property
    def positions(self) -> Int[torch.Tensor, " rows"]:
        """The token position of each row."""
        return torch.arange(int(self._lengths.sum())) - self.starts.repeat_interleave(self._lengths)

    @cached_property
    def _lengths(self) -> Int[torch.Tensor, " patches"]:
        return self._of_patches(unit.run.answer - unit.first + 1 for unit in self.units)

    @cached_property
    def _first(self) -> int:
        """The first position of any row."""
        return min(unit.first for unit in self.units)

    @cached_property
    def _base_rows(self) -> Int[torch.Tensor, " rows"]:
        """The row of each row's base value if the traces from the first position on are put one after the other."""
        ends = accumulate(len(run.tokens) - self._first for run in self.traces)
        before = {run: end - len(run.tokens) for run, end in zip(self.traces, ends, strict=True)}
        return self.positions + self._of_patches(before[u.run] for u in self.units).repeat_interleave(self._lengths)

    def _of_patches(self, of_units: Iterable[int]) -> Int[torch.Tensor, " patches"]:
        return torch.tensor([*of_units]).repeat_interleave(torch.tensor(self.sizes))

    def base(self, layer: int, name: str, rows: Int[torch.Tensor, " some"] | None = None) -> torch.Tensor:
        """Return the base runs' values in some rows, by default in all, as a copy; see `Trace`."""
        values = torch.cat([trace[layer, name][self._first :] for trace in self.traces.values()])
        return values[(self._base_rows if rows is None else self._base_rows[rows]).to(values.device)]

    def inserted(self, layer: int, name: str, rows: Int[torch.Tensor, " some"], values: torch.Tensor) -> torch.Tensor:
        """Return the base runs' values in all rows, with other values in some of them."""
        whole = self.base(layer, name)
        whole[rows.to(whole.device)] = values
        return whole

    def changes(self, place: Entry) -> Changes:
        """Return the changes that enter at a place."""
        return {patched: self._changes(*patched) for patched in self.hooks.get(place, ())}

    def _changes(self, site: str, combine: Combine) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the changes at a hook point with one meaning, read once for all units of a block, which share its deltas."""
        rows, values, patches = [], [], torch.arange(len(self.ends)).split(self.sizes)
        for numbers in alike(id(unit.deltas) for unit in self.units).values():
            block = self.units[numbers[0]]
            if site in block.deltas and block.combine == combine:
                deltas, patch = block.deltas[site], torch.full((block.deltas[site].patches,), -1)
                patch[torch.cat([self.units[n].patches for n in numbers])] = torch.cat([patches[n] for n in numbers])
                here = patch[deltas.patch]
                some = ((here >= 0) & (deltas.position <= block.run.answer)).nonzero()[:, 0]
                rows.append(self.starts[here[some]] + deltas.position[some])
                values.append(deltas.values(some))
        return torch.cat(rows), torch.cat([each.to(values[0].device) for each in values])

    def change(self, changes: Changes, x: torch.Tensor, rows: torch.Tensor | None, before: torch.Tensor | None) -> torch.Tensor:
        """Make changes in some rows of an activation and return it.

        Args:
            changes: the changes.
            x: the activation in these rows, or the residual stream after it has been added; it is changed in place.
            rows: the numbers of the rows, in ascending order, the last of them not before any change; None for all rows.
            before: the residual stream before the activation was added; None if it is that of the base run.
        """
        for (site, combine), (changed, delta) in changes.items():
            at = changed
            if rows is not None:
                at = torch.searchsorted(rows, changed)
                some = (rows[at] == changed).nonzero()[:, 0]
                changed, at, delta = changed[some], at[some], delta[some.to(delta.device)]
            at = at.to(x.device)
            value = x[at]
            if combine == "set":
                layer, name = entry(site)
                value = self.base(layer, name, changed).to(x.device)
                if before is not None and not sites.is_stream(site) and name != "z":
                    earlier = (layer, "pre") if name == "mid" else (layer - 1, "mid")
                    value = before[at] + (value - self.base(*earlier, changed).to(x.device))
            x[at] = added(value, delta)
        return x


def in_groups(
    keys: Iterable[Hashable], parts: Sequence[torch.Tensor], find: Callable[[int, torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Return what a function finds for each of some parts, called once for all rows of the parts with the same key.

    Args:
        keys: the key of each part.
        parts: tensors of rows.
        find: a function from the number of the first such part and these rows to a tensor with as many rows.
    """
    found: dict[int, torch.Tensor] = {}
    for numbers in alike(keys).values():
        rows = find(numbers[0], torch.cat([parts[number] for number in numbers]))
        found |= dict(zip(numbers, rows.split([len(parts[number]) for number in numbers]), strict=True))
    return [found[number] for number in range(len(parts))]


def alike(keys: Iterable[Key]) -> dict[Key, list[int]]:
    """Return the numbers of the items that have each key."""
    found: dict[Key, list[int]] = {}
    for number, key in enumerate(keys):
        found.setdefault(key, []).append(number)
    return found


def entry(site: str) -> Entry:
    """Return the place at which changes of a hook point enter the fast pass, which must know the hook point."""
    place = sites.entry(site)
    assert place is not None
    return place
