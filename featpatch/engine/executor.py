"""The interface of executors, which run every batch of every shard once and store the results in a book."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Batch:
    """A forward pass.

    Attributes:
        key: a name for what it computes, the same in every process.
        patches: the number of patches in it.
    """

    key: str
    patches: int


@runtime_checkable
class Shards(Protocol):
    """A sweep divided into shards of a few batches; every worker holds one, and computes the content of a shard from it."""

    def __len__(self) -> int:
        """Return the number of shards."""

    def batches(self, shard: int) -> list[Batch]:
        """Return the batches of a shard, always in the same order."""

    def run(self, shard: int, key: str) -> torch.Tensor | None:
        """Run a batch of a shard, and return its values, flat, float64.

        Returns None if this process divides the shard into other batches: rounding may decide whether a feature differs at all,
        and so how patches are packed.
        """


@runtime_checkable
class Book(Protocol):
    """A store of finished batches: what executors need of a `journal.Book`."""

    def get(self, key: str) -> torch.Tensor | None:
        """Return the values of a batch; None if it is not finished."""

    def put(self, key: str, values: torch.Tensor) -> None:
        """Store the values of a finished batch."""


class Executor(ABC):
    """A way to run shards in other processes."""

    @abstractmethod
    def run(self, make: Callable[[], Shards], shards: int, book: Book, done: Callable[[int], object]) -> None:
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
