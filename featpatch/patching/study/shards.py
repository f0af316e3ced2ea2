"""Split a study into shards for workers: each shard is one part of the study for one group of pairs that run together."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from featpatch.engine import Sweep
from featpatch.engine.work import Unit
from featpatch.execution import Batch
from featpatch.lens.transport import unpacked
from featpatch.patching.study.runs import chunks

if TYPE_CHECKING:
    from featpatch.patching.study.study import Study


@dataclass
class StudyShards:
    """A worker's copy of the study, with the batches of the shard that it is working on.

    Attributes:
        study: the study.
    """

    study: "Study"
    _open: tuple[int, dict[str, list[Unit]]] = field(default=(-1, {}), init=False)

    def __post_init__(self) -> None:
        self._shards = [(some, part) for some in chunks(self.study.pairs) for part in self.study.parts]
        self._sweep = Sweep(self.study.path, self.study.readout.measures, self.study.rows)

    def __len__(self) -> int:
        return len(self._shards)

    def batches(self, shard: int) -> list[Batch]:
        """Return the batches of a shard, each with the number of its patches."""
        return [Batch(key, sum(len(unit.patches) for unit in batch)) for key, batch in self._batches(shard).items()]

    def run(self, shard: int, key: str) -> torch.Tensor | None:
        """Run a batch in one forward pass, or in several if memory is short; return None if the shard has no such batch."""
        batch = self._batches(shard).get(key)
        return None if batch is None else self._sweep.run(batch).flatten()

    def _batches(self, shard: int) -> dict[str, list[Unit]]:
        """Return the batches of a shard by key; those of the latest shard are kept."""
        if self._open[0] != shard:
            some, part = self._shards[shard]
            self._open = shard, self._sweep.batches(self.study.blocks(some, part))
        return self._open[1]


def made(study: bytes) -> StudyShards:
    """Make a study and its shards from a pickled function that makes the study."""
    return StudyShards(unpacked(study)())
