"""Parts of a study: nodes that are patched one at a time, and how they are patched."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from featpatch.nodes import Combine, Node
from featpatch.patching.changes import Difference, Swap
from featpatch.patching.runs import PairRuns
from featpatch.sae.dictionary import Dictionary
from featpatch.sites import layer_of


class Part(ABC):
    """Nodes that are patched, as a dataclass; results that it caches are not pickled for workers."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), tuple(getattr(self, each.name) for each in fields(self) if each.init)  # type: ignore[arg-type]

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionaries whose features and errors are patched; none by default."""
        return ()

    @property
    def complete(self) -> bool:
        """Whether all nodes at the hook points are patched, so that one without a row has no effect; True by default."""
        return True

    @property
    @abstractmethod
    def hooks(self) -> set[str]:
        """The hook points whose activations the part needs."""

    @property
    @abstractmethod
    def sites(self) -> list[str]:
        """The hook points at which the changes are added."""

    @property
    def patched(self) -> "list[tuple[tuple[str, ...], Combine]]":
        """The hook points that are patched together, and what such a patch means: by default each alone."""
        return [((site,), "add") for site in self.sites]

    @property
    def layers(self) -> set[int]:
        """The layers at whose input the base runs are needed: those of `sites`, if not more."""
        return set(map(layer_of, self.sites))

    @abstractmethod
    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swap]]:
        """Return the swaps of each of some pairs that run together."""

    @abstractmethod
    def count(self, run: PairRuns) -> int:
        """Return the number of patches per direction in the swaps of a pair."""


@dataclass(frozen=True, eq=False)
class OnlyPart(Part):
    """Some of the nodes of another part.

    Attributes:
        part: the other part.
        only: the nodes that are patched.
    """

    part: Part
    only: frozenset[Node]

    @property
    def complete(self) -> bool:
        """False, because some nodes of the other part are left out."""
        return False

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionaries of the other part."""
        return self.part.owners

    @property
    def hooks(self) -> set[str]:
        """The hook points whose activations the other part needs."""
        return self.part.hooks

    @property
    def sites(self) -> list[str]:
        """The hook points that the other part patches."""
        return self.part.sites

    @property
    def patched(self) -> "list[tuple[tuple[str, ...], Combine]]":
        """The hook points that the other part patches together."""
        return self.part.patched

    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swap]]:
        """Return the swaps of each pair with only these nodes, computed once."""
        return [run.once(self, partial(self._of_pair, run)) for run in runs]

    def count(self, run: PairRuns) -> int:
        """Return the number of these nodes that differ between the runs."""
        return sum(len(swap.nodes) for swap in self.swaps([run])[0])

    def _of_pair(self, run: PairRuns) -> list[Swap]:
        swaps = [swap.keep(self.only) for swap in self.part.swaps([run])[0]]
        return [swap for swap in swaps if swap.nodes]


@dataclass(frozen=True, eq=False)
class DictionaryPart(Part):
    """A part that patches nodes of one dictionary.

    Attributes:
        dictionary: the dictionary.
    """

    dictionary: Dictionary

    def difference(self, run: PairRuns) -> Difference:
        """Return the difference between the runs of a pair, computed once."""
        return run.once(self, lambda: Difference.of(self.dictionary, run.ways, run.first))

    @property
    def owners(self) -> Sequence[Dictionary]:
        """The dictionary whose nodes are patched."""
        return (self.dictionary,)

    @property
    def hooks(self) -> set[str]:
        """The hook points that the dictionary reads and writes."""
        return set(self.dictionary.hooks)

    @property
    def sites(self) -> list[str]:
        """The hook points that the dictionary writes."""
        return list(self.dictionary.outputs)
