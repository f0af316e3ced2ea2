"""The exact sweep: add deltas at hook points, run what they can change, and measure. It does not depend on SAEs.

The patches of a block with the same first changed position form a unit, a smaller block. Units are packed into batches of so
many rows that the processor is busy and the available memory suffices. When memory runs out, the sweep halves the batch and
continues. When it is interrupted, the values of all finished batches have been filled in.
"""

import sys
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import groupby
from typing import Any
from weakref import WeakKeyDictionary

import psutil
import torch
from jaxtyping import Float
from tqdm.auto import tqdm

from featpatch.engine.journal import Book, batch_key
from featpatch.engine.patches import NEVER, BaseRun, Block, in_groups
from featpatch.engine.path import PatchPath
from featpatch.errors import FeatpatchError
from featpatch.metrics import Measures
from featpatch.model.lens import Lens

BUSY = 2**31
"""Multiply-adds per weight matrix of one forward pass above which a CPU is busy; a GPU needs GPU_FACTOR times as many."""
GPU_FACTOR = 16
LEAST, MOST = 256, 4096
"""The smallest and largest number of rows that are useful on a CPU; of small models, more do not fit into its cache."""
SHARE = 0.25
"""Fraction of the free memory that one forward pass may take."""
NO_MEMORY = "can't allocate memory", "could not create a primitive", "CUBLAS_STATUS_ALLOC_FAILED"
"""What the errors of PyTorch's allocator, oneDNN and cuBLAS say when memory runs out."""
LONG = 60.0
"""The number of remaining seconds above which a sweep says how much time is left."""
READ = 0.01
"""The number of seconds below which a batch was probably read from a journal and not run."""


def row_numbers(width: int, heads: int, d_head: int, hidden: int, length: int, columns: int) -> int:
    """Return how many numbers one row takes at the peak of memory use.

    They are copies of the residual stream, the heads, the MLP, the scores over `length` tokens, and `columns` logits of one
    row.
    """
    return 4 * width + 8 * heads * d_head + 3 * hidden + 3 * heads * length + 4 * columns


def row_bytes(lens: Lens, length: int, columns: int) -> int:
    """Return the bytes that one row takes at the peak of memory use, see `row_numbers`."""
    return int(row_numbers(lens.d_model, lens.n_heads, lens.d_head, lens.d_mlp, length, columns) * lens.itemsize)


def row_budget(lens: Lens, length: int, columns: int) -> int:
    """Return the number of rows per forward pass, limited by the device with the least free memory.

    Args:
        length: the maximum number of tokens of a prompt.
        columns: the number of logits of each patch.
    """
    factor = GPU_FACTOR if lens.device.type == "cuda" else 1
    busy = BUSY // (lens.d_model * max(lens.d_mlp, lens.d_model)) * factor
    fits = int(SHARE * min(map(free_memory, lens.devices))) // row_bytes(lens, length, columns)
    return max(1, min(max(busy, LEAST), MOST * factor, fits))


def trace_bytes(lens: Lens, layers: Sequence[int]) -> int:
    """Return the maximum number of bytes kept per token of a base run that is patched in some layers.

    They hold the residual stream, z, queries, keys and values.
    """
    numbers = 3 * lens.d_model + 3 * lens.n_heads * lens.d_head
    return (lens.n_layers - min(layers, default=0)) * numbers * lens.itemsize


def free_memory(device: torch.device) -> int:
    """Return the number of bytes that can still be allocated on a device.

    On a GPU, PyTorch keeps freed memory for itself, which the driver counts as used.
    """
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0] + kept)


def out_of_memory(error: BaseException) -> bool:
    """Return whether an exception, or its cause, says that memory ran out, on a GPU or on the CPU."""
    return any(
        isinstance(one, (torch.OutOfMemoryError, MemoryError)) or any(words in str(one) for words in NO_MEMORY)
        for one in (error, error.__cause__)
    )


def units_of(blocks: Sequence[Block], *, causal: bool) -> list[Block]:
    """Return every patch that can have an effect, in one unit for each block and first changed position.

    A patch that changes nothing is left out, and in a causal model also one that changes only positions after the answer: they
    have exactly no effect.
    """
    units = []
    for block in blocks:
        starts = block.starts
        for position in starts.unique().tolist():
            if position != NEVER and (position <= block.run.answer or not causal):
                units.append(block.part(starts == position))
    return units


def batches(path: PatchPath, units: Sequence[Block], budget: int) -> Iterator[list[Block]]:
    """Yield batches of units of one group, packed up to the row budget; a unit that exceeds the remaining budget is split."""
    key = {id(unit): path.group(unit) for unit in units}
    order = sorted(units, key=lambda unit: (str(key[id(unit)]), unit.first, unit.run.name))
    for _, group in groupby(order, key=lambda unit: key[id(unit)]):
        batch: list[Block] = []
        room = budget
        for unit in group:
            rows, start = path.rows(unit), 0
            while start < len(unit):
                if batch and room < rows:
                    yield batch
                    batch, room = [], budget
                stop = min(len(unit), start + max(1, room // rows))
                batch.append(unit.part(slice(start, stop)))
                room -= rows * (stop - start)
                start = stop
        if batch:
            yield batch


Values = Float[torch.Tensor, "_ metrics"]


@dataclass
class Sweep:
    """A sweep over patches, with what it learns about memory and clean runs on the way.

    Attributes:
        path: the way to run patches.
        measures: the metrics.
        rows: the maximum number of rows per forward pass.
        book: the store of finished batches; None to keep none.
        done: a function that is called with the number of patches of each finished batch.
        limit: the number of rows that memory allows for, known once memory has run out.
        clean: the logits of clean runs, if a metric reads them.
    """

    path: PatchPath
    measures: Measures
    rows: int
    book: Book | None = None
    done: Callable[[int], object] = field(default=lambda patches: None)
    limit: float = field(default=float("inf"), init=False)
    clean: "WeakKeyDictionary[BaseRun, torch.Tensor]" = field(default_factory=WeakKeyDictionary, init=False)

    @torch.no_grad()
    def baselines(self, runs: Sequence[BaseRun]) -> Float[torch.Tensor, "runs metrics"]:
        """Return the metrics of the base runs, computed through the same path as the patches."""
        wanted = [*runs, *map(self._clean_run, runs)] if self.measures.reads_clean else runs
        self.path.prepare(list(dict.fromkeys(wanted)))
        values = [self._measured(self.path.baseline(run, self._columns(run)), run) for run in runs]
        return torch.cat([torch.zeros(0, len(self.measures.parts), dtype=torch.float64), *values])

    @torch.no_grad()
    def fill(self, blocks: Sequence[Block], values: Sequence[Values]) -> None:
        """Write the exact metrics of every patch into `values`, one float64 tensor per block, batch by batch.

        A patch that can't change anything gets the metric of the base run, without a forward pass.
        """
        runs = list(dict.fromkeys(block.run for block in blocks))
        base = dict(zip(runs, self.baselines(runs), strict=True))
        units = self.units(blocks)
        idle = torch.ones(sum(map(len, blocks)), dtype=torch.bool)
        masks = idle.split([*map(len, blocks)])
        number = {id(block.deltas): number for number, block in enumerate(blocks)}  # a unit has the deltas of its block
        for unit in units:
            masks[number[id(unit.deltas)]][unit.patches] = False
        for block, into, mask in zip(blocks, values, masks, strict=True):
            into[mask] = base[block.run]
        self.done(int(idle.sum()))
        for batch in batches(self.path, units, self.rows):
            sizes = [*map(len, batch)]
            for unit, part in zip(batch, self._finished(batch).split(sizes), strict=True):
                values[number[id(unit.deltas)]][unit.patches] = part
            self.done(sum(sizes))

    @torch.no_grad()
    def batches(self, blocks: Sequence[Block]) -> dict[str, list[Block]]:
        """Return the forward passes that `fill` would make, by the key under which each is stored; ready to `run`."""
        self.baselines(list(dict.fromkeys(block.run for block in blocks)))
        made = batches(self.path, self.units(blocks), self.rows)
        return {batch_key(unit.key for unit in batch): batch for batch in made}

    def cost(self, blocks: Sequence[Block]) -> tuple[int, int, int]:
        """Return the number of patches that need a forward pass, of their rows, and of their floating-point operations."""
        units = self.units(blocks)
        return sum(len(u) for u in units), sum(self.path.rows(u) * len(u) for u in units), self._flops(units)

    @torch.no_grad()
    def trial(self, blocks: Sequence[Block]) -> tuple[int, float]:
        """Run the first batch once, after a warm-up with its first patch; return its floating-point operations and seconds."""
        batch = next(batches(self.path, self.units(blocks), self.rows), [])
        if not batch:
            return 0, 0.0
        self.run([batch[0].part(slice(1))])
        start = time.perf_counter()
        self.run(batch)
        seconds = time.perf_counter() - start
        return self._flops(batch), seconds

    def units(self, blocks: Sequence[Block]) -> list[Block]:
        """Return the patches of the blocks that can have an effect, in units."""
        return units_of(blocks, causal=self.path.lens.causal)

    def _flops(self, units: Sequence[Block]) -> int:
        columns = [self._columns(unit.run) for unit in units]
        vocabulary = self.path.lens.d_vocab
        return sum(self.path.flops(u, vocabulary if c is None else len(c)) for u, c in zip(units, columns, strict=True))

    def _finished(self, batch: list[Block]) -> Values:
        """Return the values of a batch, from the book or from a forward pass."""
        if self.book is None:
            return self.run(batch)
        key = batch_key(unit.key for unit in batch)
        known = self.book.get(key, sum(map(len, batch)) * len(self.measures.parts))
        if known is not None:
            return known.unflatten(0, (-1, len(self.measures.parts)))
        values = self.run(batch)
        self.book.put(key, values.flatten())
        return values

    @torch.no_grad()
    def run(self, batch: list[Block]) -> Values:
        """Run a batch in one forward pass, or in several if memory is short, and return its values.

        Raises:
            FeatpatchError: there is not enough memory for a single patch.
        """
        patches, rows = sum(map(len, batch)), sum(self.path.rows(u) * len(u) for u in batch)
        if rows <= self.limit or patches == 1:
            try:
                logits = self.path.logits(batch, [self._columns(unit.run) for unit in batch])
                runs = [unit.run for unit in batch]
                return torch.cat(in_groups(map(self._alike, runs), logits, lambda unit, x: self._measured(x, runs[unit])))
            except (RuntimeError, MemoryError, FeatpatchError) as error:
                if not out_of_memory(error):
                    raise
                if patches == 1:
                    raise FeatpatchError(
                        f"memory ran out for a single patch of {rows} rows ({error}): expected enough memory for one patch; "
                        "free memory, or use shorter prompts or a smaller dtype"
                    ) from error
            self.limit = rows // 2
        return torch.cat([self.run(half) for half in _halves(batch)])

    def _columns(self, run: BaseRun) -> tuple[int, ...] | None:
        return self.measures.columns(run.correct, run.wrong)

    def _measured(self, logits: torch.Tensor, run: BaseRun) -> Values:
        clean = self._clean_logits(run) if self.measures.reads_clean else None
        return self.measures(logits, run.correct, run.wrong, clean)

    def _clean_run(self, run: BaseRun) -> BaseRun:
        return run if run.clean is None else run.clean

    def _clean_logits(self, run: BaseRun) -> torch.Tensor:
        clean = self._clean_run(run)
        if clean not in self.clean:
            self.clean[clean] = self.path.baseline(clean, None)
        return self.clean[clean]

    def _alike(self, run: BaseRun) -> Hashable:
        """Return a key that is equal for runs that can be measured together.

        It holds the answers, and the clean run if a metric reads it.
        """
        return tuple(run.correct), tuple(run.wrong), id(self._clean_run(run)) if self.measures.reads_clean else None


def _halves(batch: list[Block]) -> tuple[list[Block], list[Block]]:
    """Split the patches of a batch into two halves, in the same order."""
    half = sum(map(len, batch)) // 2
    left: list[Block] = []
    right: list[Block] = []
    for unit in batch:
        cut = min(half, len(unit))
        half -= cut
        if cut:
            left.append(unit.part(slice(cut)))
        if cut < len(unit):
            right.append(unit.part(slice(cut, None)))
    return left, right


def announcing(bar: "tqdm[Any]") -> Callable[[int], None]:
    """Return a function that updates a progress bar batch by batch and, for a long sweep, says once how much time is left.

    The estimate is made after the first batch that is run. The first call is for patches that need no batch.
    """
    last, told = None, False

    def done(items: int) -> None:
        nonlocal last, told
        now = time.monotonic()
        bar.update(items)
        if not told and last is not None and items and now - last > READ:
            told, left = True, (bar.total - bar.n) / items * (now - last)
            if left > LONG and not bar.disable:
                about = timedelta(seconds=round(left))
                bar.write(
                    f"{bar.total:,} {bar.unit}es in total, about {about} left (estimated from the first batch)", file=sys.stderr
                )
        last = now

    return done
