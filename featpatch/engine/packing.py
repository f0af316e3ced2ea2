"""Pack blocks of patches into batches.

Patches of a block that change nothing before the same position form a unit; units fill a budget of rows.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby

from featpatch.engine.deltas import NEVER
from featpatch.engine.path import PatchPath
from featpatch.engine.work import Block, Unit


def units_of(blocks: Sequence[Block], *, causal: bool) -> list[Unit]:
    """Return every patch that can have an effect, in units by block and first changed position.

    A patch that changes nothing is left out, and in a causal model also one that changes only positions after the answer: they
    have exactly no effect.
    """
    units = []
    for index, block in enumerate(blocks):
        first = block.deltas.first()
        for position in first.unique().tolist():
            if position != NEVER and (position <= block.run.answer or not causal):
                units.append(Unit(index, block, (first == position).nonzero()[:, 0], position))
    return units


def batches(path: PatchPath, units: Sequence[Unit], budget: int) -> Iterator[list[Unit]]:
    """Yield batches of units of one group, packed up to the row budget; a unit that exceeds the remaining budget is split."""
    key = {id(unit): path.group(unit.block) for unit in units}
    order = sorted(units, key=lambda unit: (str(key[id(unit)]), unit.block.run.name, unit.first, unit.index))
    for _, group in groupby(order, key=lambda unit: key[id(unit)]):
        batch: list[Unit] = []
        room = budget
        for unit in group:
            rows, start = path.rows(unit), 0
            while start < len(unit.patches):
                if batch and room < rows:
                    yield batch
                    batch, room = [], budget
                stop = min(len(unit.patches), start + max(1, room // rows))
                batch.append(unit.part(start, stop))
                room -= rows * (stop - start)
                start = stop
        if batch:
            yield batch
