"""Sets of features that are patched together, as a part of a study."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch.engine import Deltas
from featpatch.patch import Direction, Node, Position
from featpatch.patching.study.difference import Difference, split_ways
from featpatch.patching.study.part import DictionaryPart
from featpatch.patching.study.runs import PairRuns
from featpatch.patching.study.swaps import Directions, Swaps

MOST = 64
"""The default number of features in the largest set."""

Sets = Mapping[Position, Sequence[Sequence[int]]]
"""The sets of feature indices at each position."""


@dataclass(frozen=True, eq=False)
class SetPart(DictionaryPart):
    """Sets of features of one dictionary, at one position or several; the error and the other features are kept.

    Attributes:
        sets: the sets.
    """

    sets: Sets

    def count(self, run: PairRuns) -> int:
        """Return the number of sets, including those in which nothing differs."""
        return sum(len(sets) for position, sets in self.sets.items() if run.wanted.get(position))

    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swaps]]:
        """Return the swaps of each pair, one per position."""
        found = [self.difference(run) for run in runs]
        directions = Directions.of(self.dictionary, found)
        return [
            [self._of_position(run, difference, directions, position) for position in self.sets if run.wanted.get(position)]
            for run, difference in zip(runs, found, strict=True)
        ]

    def _of_position(self, run: PairRuns, difference: Difference, directions: Directions, position: Position) -> Swaps:
        sets, span = self.sets[position], torch.tensor(run.wanted[position])
        site, name = self.dictionary.writes, self.dictionary.name
        nodes = tuple(Node(site, "set", number, position, name) for number in range(len(sets)))
        if difference.moved is None:
            changes = self._along(difference, directions, sets, span)
        else:
            changes = self._by_definition(run, sets, span)
        return Swaps(site, nodes, {way: _deltas(change, span) for way, change in changes.items()})

    def _along(
        self, difference: Difference, directions: Directions, sets: Sequence[Sequence[int]], span: Int[torch.Tensor, " span"]
    ) -> dict[Direction, Float[torch.Tensor, "sets span d"]]:
        """Return the change that each set makes, as a sum of multiples of feature directions."""
        entries = difference.at(span.tolist())
        feature, place = difference.feature[entries], torch.searchsorted(span, difference.position[entries])
        rows = directions.values[directions.rows(feature).to(directions.values.device)]
        member = torch.stack([torch.isin(feature, torch.tensor(list(some), dtype=torch.long)) for some in sets])
        changes = {}
        for way, value in difference.value.items():
            added = value[entries.to(value.device), None] * rows
            change = rows.new_zeros(len(sets), len(span), rows.shape[1])
            for index in range(len(span)):
                here = place == index
                change[:, index] = member[:, here].to(rows) @ added[here.to(rows.device)]
            changes[way] = change
        return changes

    def _by_definition(
        self, run: PairRuns, sets: Sequence[Sequence[int]], span: Int[torch.Tensor, " span"]
    ) -> dict[Direction, Float[torch.Tensor, "sets span d"]]:
        """Return the change that each set S makes, by the definition dec(f_b with f_s in S) - dec(f_b)."""
        changes = {}
        for way, (base, source) in split_ways(self.dictionary, run.ways, 0).items():
            before, parts = self.dictionary.decode(base.features, base.state), []
            number = torch.arange(base.features.shape[2], device=base.features.device)
            for some in sets:
                chosen = torch.isin(number, torch.tensor(list(some), dtype=torch.long, device=number.device))
                after = self.dictionary.decode(torch.where(chosen, source.features, base.features), base.state)
                parts.append((after - before)[0, span])
            changes[way] = torch.stack(parts)
        return changes


def _deltas(changes: Float[torch.Tensor, "sets span d"], span: Int[torch.Tensor, " span"]) -> Deltas:
    """Return one patch per set, covering the positions at which the set changes anything."""
    patch, place = (changes != 0).any(2).nonzero(as_tuple=True)
    return Deltas.explicit(patch.cpu(), span[place.cpu()], changes[patch, place], len(changes))
