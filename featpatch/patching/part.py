"""A part of a study: nodes that are swapped one by one, and how."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from featpatch.patching.difference import Change
from featpatch.patching.positions import Wanted
from featpatch.patching.runs import PairRuns
from featpatch.patching.swaps import Swaps, differing


class Part(ABC):
    """What is patched, at which sites, from which activations."""

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
