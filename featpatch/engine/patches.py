"""What the engine is given: base runs, and patches as sparse changes of activations; and the rows that these change.

A patch at several hook points has one of two meanings, because a change at one of them also changes what arrives at those
downstream of it:

    "add"    x' = x_arriving + delta
    "set"    x' = x_base     + delta      at the positions that the patch names, so that what arrives there is replaced

In the fast forward pass, the rows of all units of a batch lie in one matrix, unit by unit, patch by patch, position by position
from the first changed one to the answer. In the last layer, after the keys and values, only the answer row of each patch is
left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce

import torch
from jaxtyping import Bool, Float, Int

from featpatch import sites
from featpatch.model.lens import added
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


Entry = tuple[int, str]
"""A layer, and a place in it where changes enter, see `sites.ENTRIES`; the layer after the last stands for the end."""


Trace = dict[tuple[int, str], torch.Tensor]
"""The activations of a base run in featpatch's own forward pass, by layer and name.

The names are `pre` for the residual stream `[pos, d_model]` at the input of the layer (after the last layer, at its output),
`mid` for the residual stream after attention, `z` for the output of attention before W_O `[pos, width]`, and `query`, `key` and
`value` for these `[pos, heads, d_head]`.
"""


@dataclass(frozen=True)
class Span:
    """The rows of units of one base run with the same first position, which share attention.

    There is a copy of the run's positions `first` to `answer` for each patch.
    """

    trace: Trace
    units: Sequence[Unit]
    first: int
    answer: int

    @property
    def patches(self) -> int:
        """The number of patches."""
        return sum(len(unit.patches) for unit in self.units)

    @property
    def length(self) -> int:
        """The number of positions of one patch."""
        return self.answer - self.first + 1

    @property
    def rows(self) -> int:
        """The number of rows of all patches."""
        return self.patches * self.length

    def base(self, values: torch.Tensor) -> torch.Tensor:
        """Return the base run's values at the span's positions for every patch, as a copy that can be written to."""
        part = values[self.first : self.answer + 1]
        return part.expand(self.patches, *part.shape).clone()


@dataclass(frozen=True)
class Rows:
    """Some rows of the matrix.

    Attributes:
        spans: the spans that make up the matrix.
        sizes: the number of these rows in each span; they are sorted by span.
        patch, position: the patch within its span and the token position of each row, on the CPU.
    """

    spans: Sequence[Span]
    sizes: Sequence[int]
    patch: Int[torch.Tensor, " rows"]
    position: Int[torch.Tensor, " rows"]

    def number(self, *, answer_only: bool) -> Int[torch.Tensor, " rows"]:
        """Return the number of each row in the matrix, or in the matrix that holds only answer rows."""
        lengths = [1 if answer_only else span.length for span in self.spans]
        starts = torch.tensor([0, *(s.patches * n for s, n in zip(self.spans, lengths, strict=True))]).cumsum(0)[:-1]
        firsts = torch.tensor([span.answer if answer_only else span.first for span in self.spans])
        sizes = torch.tensor(self.sizes)
        start, length, first = (each.repeat_interleave(sizes) for each in (starts, torch.tensor(lengths), firsts))
        return start + self.patch * length + self.position - first

    def find(self, some: "Rows") -> Int[torch.Tensor, " rows"]:
        """Return where some of these rows are among them; unless they are the same, these must be sorted, as in `union`."""
        if some is self:
            return torch.arange(len(self.position))
        return torch.searchsorted(self.number(answer_only=False), some.number(answer_only=False))

    def keep(self, some: torch.Tensor) -> "Rows":
        """Return the rows for which a mask is True."""
        sizes = [int(part.sum()) for part in some.split([*self.sizes])]
        return Rows(self.spans, sizes, self.patch[some], self.position[some])

    @classmethod
    def union(cls, some: "Sequence[Rows]") -> "Rows":
        """Return the rows that are in any of some sets of rows of one matrix, each once and sorted."""
        spans = some[0].spans
        numbers = torch.cat([rows.number(answer_only=False) for rows in some]).unique()
        ends = torch.tensor([span.rows for span in spans]).cumsum(0)
        sizes = torch.searchsorted(numbers, ends).diff(prepend=torch.tensor([0])).tolist()
        patch, position, start = [], [], 0
        for span, part in zip(spans, numbers.split(sizes), strict=True):
            patch.append((part - start) // span.length)
            position.append((part - start) % span.length + span.first)
            start += span.rows
        return cls(spans, sizes, torch.cat(patch), torch.cat(position))

    def base(self, layer: int, name: str) -> torch.Tensor:
        """Return the base runs' values in these rows, see `Trace`."""
        values = [span.trace[layer, name] for span in self.spans]
        places = self.position.split([*self.sizes])
        return torch.cat([of_span[place.to(of_span.device)] for of_span, place in zip(values, places, strict=True)])


@dataclass(frozen=True)
class Changes:
    """The changes that patches make at one hook point, `delta[r]` in row r of `rows`."""

    site: str
    combine: Combine
    rows: Rows
    delta: Float[torch.Tensor, "rows d"]

    @classmethod
    def of(cls, spans: Sequence[Span], site: str, combine: Combine) -> "Changes":
        """Collect the changes at a hook point from those patches whose changes have this meaning."""
        found, patch, sizes = [], [], []
        for span in spans:
            before, size = 0, 0
            for unit in span.units:
                if site in unit.block.deltas and unit.block.combine == combine:
                    deltas = unit.deltas(site).upto(span.answer)
                    found.append(deltas)
                    patch.append(deltas.patch + before)
                    size += len(deltas.patch)
                before += len(unit.patches)
            sizes.append(size)
        values = [deltas.values() for deltas in found]
        delta = torch.cat([each.to(values[0].device) for each in values])
        return cls(site, combine, Rows(spans, sizes, torch.cat(patch), torch.cat([d.position for d in found])), delta)

    def at_answer(self) -> "Changes":
        """Return the changes of the answer rows alone."""
        ends = torch.tensor([span.answer for span in self.rows.spans]).repeat_interleave(torch.tensor(self.rows.sizes))
        some = self.rows.position == ends
        return replace(self, rows=self.rows.keep(some), delta=self.delta[some.to(self.delta.device)])

    def apply(self, x: torch.Tensor, at: Int[torch.Tensor, " rows"], before: torch.Tensor | None) -> None:
        """Make the changes in a matrix.

        Args:
            x: the activation, or the residual stream after it has been added; it is changed in place.
            at: the row of the matrix for each row of the changes.
            before: the residual stream before the activation was added; None if it is that of the base run.
        """
        at = at.to(x.device)
        value = x[at]
        if self.combine == "set":
            layer, place = entry(self.site)
            value = self.rows.base(layer, place).to(x.device)
            if before is not None and not sites.is_stream(self.site) and place != "z":
                earlier = (layer, "pre") if place == "mid" else (layer - 1, "mid")
                value = before[at] + (value - self.rows.base(*earlier).to(x.device))
        x[at] = added(value, self.delta)


def entering(units: Sequence[Unit]) -> dict[Entry, list[tuple[str, Combine]]]:
    """Return the hook points that units patch and the meanings of these patches, by the place where they enter."""
    patched = dict.fromkeys((site, unit.block.combine) for unit in units for site in unit.block.deltas)
    places: dict[Entry, list[tuple[str, Combine]]] = {}
    for site, combine in sorted(patched, key=lambda each: (sites.is_stream(each[0]), sites.layer_of(each[0]))):
        places.setdefault(entry(site), []).append((site, combine))  # addends come before sums
    return places


def entry(site: str) -> Entry:
    """Return the place at which changes of a hook point enter, which the fast pass knows."""
    place = sites.entry(site)
    assert place is not None
    return place
