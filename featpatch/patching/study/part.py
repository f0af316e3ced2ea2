"""A part of a study: nodes that are swapped one by one, and how."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from featpatch.lens import Dictionary
from featpatch.pairs.spans import Wanted
from featpatch.patching.study.difference import Change, Difference
from featpatch.patching.study.runs import PairRuns
from featpatch.patching.study.swaps import Swaps, differing


class Part(ABC):
    """What is patched, at which sites, from which activations; a dataclass, that goes to workers without what it has found."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self) if each.init)  # type: ignore[arg-type]

    @property
    @abstractmethod
    def hooks(self) -> set[str]:
        """The hooks whose activations it needs."""

    @property
    @abstractmethod
    def sites(self) -> list[str]:
        """The sites at which its changes are added."""

    @abstractmethod
    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swaps]]:
        """The swaps of some pairs that run together, pair by pair."""

    @abstractmethod
    def count(self, run: PairRuns) -> int:
        """How many patches to one direction the swaps of a pair are."""


def count_whole(change: Change, wanted: Wanted) -> int:
    """How many patches `whole_swaps` makes."""
    differs = differing(change)
    return sum(bool(differs[span].any()) for span in wanted.values())


@dataclass(frozen=True, eq=False)
class DictionaryPart(Part):
    """A part about one dictionary: it needs what the dictionary reads and writes, and patches what it writes."""

    dictionary: Dictionary

    def difference(self, run: PairRuns) -> Difference:
        """Return the difference between the runs of a pair, computed once."""
        return run.once(self, lambda: Difference.of(self.dictionary, run.ways, run.first))

    @property
    def hooks(self) -> set[str]:
        """Those that the dictionary reads and writes."""
        return {self.dictionary.reads, self.dictionary.writes}

    @property
    def sites(self) -> list[str]:
        """The one that it writes."""
        return [self.dictionary.writes]
