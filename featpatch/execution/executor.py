"""What an executor is asked to do: the batches of all shards, each once, into a book."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        key: names what it computes, the same wherever it is worked out.
        patches: how many.
    """

    key: str
    patches: int


@runtime_checkable
class Shards(Protocol):
    """A sweep in shards of a few batches; every worker holds one, and works out from it what a shard is."""

    def __len__(self) -> int:
        """The number of shards."""

    def batches(self, shard: int) -> list[Batch]:
        """Those of a shard, always in the same order."""

    def run(self, shard: int, key: str) -> torch.Tensor | None:
        """The values of a batch of a shard, flat, float64; None where this process makes other batches of the shard.

        Rounding may decide whether a feature differs at all, and so how patches are packed.
        """


@runtime_checkable
class Book(Protocol):
    """Where finished batches are written down and looked up."""

    def get(self, key: str) -> torch.Tensor | None:
        """The values of a batch, if it is finished."""

    def put(self, key: str, values: torch.Tensor) -> None:
        """Writes down a finished batch."""


class Executor(ABC):
    """Runs shards elsewhere."""

    @abstractmethod
    def run(self, make: Callable[[], Shards], shards: int, book: Book, done: Callable[[int], object]) -> None:
        """Runs every batch that the book lacks, and writes it down as soon as it is there; the caller runs what is left out.

        Args:
            make: makes the shards of a worker; it is taken there once.
            done: called with the number of patches of each batch, also of those that the book has.

        Raises:
            FeatpatchError: workers can't be started, or die again and again; whatever a batch raises.
        """
