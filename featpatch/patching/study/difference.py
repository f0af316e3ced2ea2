"""Differences between the runs of one pair, feature by feature for a dictionary or for a whole activation.

    x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error node is in S]

With `b` corrupted and `s` clean this is denoising, the other way round noising. If a unit of a feature always adds the same
direction (see `Behaviour.linear`), the deltas of single features are multiples of that direction, times the gain of the base
run's state if the dictionary has one; otherwise each delta is computed by the definition. The error node includes the state of
the decoder (see `chosen`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int

from featpatch.lens import Dictionary, Split
from featpatch.patch import Direction
from featpatch.patching.study.run import Run, Ways

Change = Mapping[Direction, Float[torch.Tensor, "pos d"]]
"""The change of the flat activation of the patched run, by direction of patching."""

Splits = Mapping[Direction, tuple[Split, Split]]
"""Base and source run of each direction, split into features and error."""


@dataclass(frozen=True)
class Difference:
    """The features of one dictionary that differ between the runs of one pair, and the changes that they make.

    Attributes:
        position, feature: the positions and features that differ, one entry each, sorted by feature, then by position.
        value: how much of its feature's direction each entry adds.
        moved: the change that each entry makes alone, `[entries, d_out]`, if features have no fixed direction; otherwise None.
        features, error: the change that all features make, and the change that the error makes; 0 before the first differing
            token.
    """

    position: Int[torch.Tensor, " entries"]
    feature: Int[torch.Tensor, " entries"]
    value: Mapping[Direction, Float[torch.Tensor, " entries"]]
    moved: Mapping[Direction, Float[torch.Tensor, "entries d_out"]] | None
    features: Change
    error: Change

    @classmethod
    def of(cls, dictionary: Dictionary, ways: Ways, first: int) -> "Difference":
        """Compute the difference between base and source of each direction; nothing differs before position `first`."""
        splits = split_ways(dictionary, ways, first)
        changes = {way: (source.features - base.features)[0] for way, (base, source) in splits.items()}
        feature, position = next(iter(changes.values())).T.nonzero(as_tuple=True)
        values = {way: change[position, feature] for way, change in changes.items()}
        if dictionary.behaviour.scaled:
            values = {way: value * dictionary.gains(splits[way][0])[position] for way, value in values.items()}
        linear = dictionary.behaviour.linear
        return cls(
            position=position.cpu() + first,
            feature=feature.cpu(),
            value=values,
            moved=None if linear else {way: dictionary.moved(*runs, position, feature) for way, runs in splits.items()},
            features=_each_way(first, dictionary, splits, _all_features),
            error=_each_way(first, dictionary, splits, _all_else),
        )

    def keep(self, features: Sequence[int]) -> "Difference":
        """Return the difference with only the entries of these features; the change by all features stays the same."""
        kept = torch.isin(self.feature, torch.tensor(features, dtype=torch.long)).nonzero()[:, 0]
        return replace(
            self,
            position=self.position[kept],
            feature=self.feature[kept],
            value={way: value[kept.to(value.device)] for way, value in self.value.items()},
            moved=None if self.moved is None else {way: moved[kept.to(moved.device)] for way, moved in self.moved.items()},
        )

    def at(self, span: list[int]) -> torch.Tensor:
        """Return the indices of the entries at these positions."""
        return torch.isin(self.position, torch.tensor(span, dtype=torch.long)).nonzero()[:, 0]


def split_ways(dictionary: Dictionary, ways: Ways, first: int) -> dict[Direction, tuple[Split, Split]]:
    """Return base and source of each direction, split into features and error from position `first` on."""
    start = first if dictionary.behaviour.rowwise else 0
    runs: list[Run] = list(dict.fromkeys(run for both in ways.values() for run in both))
    split = {run: run.split(dictionary, start).since(first - start) for run in runs}
    return {way: (split[base], split[source]) for way, (base, source) in ways.items()}


def whole_change(site: str, ways: Ways, first: int) -> Change:
    """Return how the whole flat activation changes in each direction; exactly 0 before position `first`."""
    changes: dict[Direction, torch.Tensor] = {}
    for way, (base, source) in ways.items():
        changes[way] = (source.at(site) - base.at(site)).flatten(1)
        changes[way][:first] = 0
    return changes


def _each_way(
    first: int, dictionary: Dictionary, splits: Splits, change: Callable[[Dictionary, Split, Split], torch.Tensor]
) -> dict[Direction, torch.Tensor]:
    """Return a change in each direction, with zeros before position `first`.

    Without decoder state, the change in one direction is minus that in the other and is computed only once.
    """
    changes: dict[Direction, torch.Tensor] = {}
    for way, (base, source) in splits.items():
        if changes and not base.state:
            changes[way] = -next(iter(changes.values()))
        else:
            found = change(dictionary, base, source)
            changes[way] = torch.cat([found.new_zeros(first, found.shape[1]), found])
    return changes


def _all_features(dictionary: Dictionary, base: Split, source: Split) -> torch.Tensor:
    """Return the change that patching all features makes, `[pos, d]`."""
    after, before = (dictionary.decode(features, base.state) for features in (source.features, base.features))
    return (after.to(base.error) - before.to(base.error))[0]


def _all_else(dictionary: Dictionary, base: Split, source: Split) -> torch.Tensor:
    """Return the change that patching the error, with the decoder's state, makes, `[pos, d]`."""
    change = (source.error - base.error)[0]
    if not base.state:
        return change
    after, before = (dictionary.decode(base.features, state) for state in (source.state, base.state))
    return change + (after.to(change) - before.to(change))[0]
