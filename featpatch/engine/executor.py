"""The shards of a sweep, and the interface of executors, which run every batch of every shard in other processes."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float

from featpatch.engine.patches import Block
from featpatch.engine.sweep import Sweep


@dataclass(frozen=True)
class Batch:
    """A forward pass.

    Attributes:
        key: a name for what it computes, the same in every process.
        patches: the number of patches in it.
    """

    key: str
    patches: int


@dataclass
class Shards:
    """A sweep divided into shards of a few batches; every worker holds one, and computes the content of a shard from it.

    Attributes:
        sweep: the sweep.
        blocks: for each shard, a function that returns its patches.
    """

    sweep: Sweep
    blocks: Sequence[Callable[[], list[Block]]]
    _latest: tuple[int, dict[str, list[Block]]] = field(default=(-1, {}), init=False)

    def __len__(self) -> int:
        """Return the number of shards."""
        return len(self.blocks)

    def batches(self, shard: int) -> list[Batch]:
        """Return the batches of a shard, always in the same order."""
        return [Batch(key, sum(map(len, batch))) for key, batch in self._batches(shard).items()]

    def run(self, shard: int, key: str) -> Float[torch.Tensor, " values"] | None:
        """Run a batch of a shard in one forward pass, or in several if memory is short, and return its values in float64.

        Returns None if this process divides the shard into other batches: rounding may decide whether a feature differs at all,
        and so how patches are packed.
        """
        batch = self._batches(shard).get(key)
        return None if batch is None else self.sweep.run(batch).flatten()

    def _batches(self, shard: int) -> dict[str, list[Block]]:
        """Return the batches of a shard by key; those of the latest shard are kept."""
        if self._latest[0] != shard:
            self._latest = shard, self.sweep.batches(self.blocks[shard]())
        return self._latest[1]


@runtime_checkable
class Finished(Protocol):
    """The finished batches of a sweep: what executors need of a `journal.Book`, which a user's executor may wrap."""

    def get(self, key: str) -> torch.Tensor | None:
        """Return the values of a batch; None if it is not finished."""

    def put(self, key: str, values: torch.Tensor) -> None:
        """Store the values of a finished batch."""


class Executor(ABC):
    """A way to run shards in other processes."""

    @abstractmethod
    def run(self, make: Callable[[], Shards], shards: int, book: Finished, done: Callable[[int], object]) -> None:
        """Run every batch that the book lacks, and store it as soon as it is finished.

        The caller runs batches that are left out.

        Args:
            make: a function that makes the shards of a worker; it is sent to each worker once.
            shards: the number of shards.
            book: the store of finished batches.
            done: a function that is called with the number of patches of each batch, including batches that the book has
                already.

        Raises:
            FeatpatchError: workers can't be started, or die again and again; or the error that a batch raises.
        """
