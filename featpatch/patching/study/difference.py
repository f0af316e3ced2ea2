"""What differs between the runs of one pair: at a dictionary, feature by feature, and at a whole site.

    x' = x_b + dec(f_b with f_s in S) - dec(f_b)  [+ e_s - e_b  if the error node is in S]

With `b` corrupted and `s` clean this is denoising, the other way round noising. Where a unit of a feature always adds the same
direction (see `Behaviour.linear`), the deltas of single features are multiples of it, times the gain of the base run's state if
that matters; elsewhere each is worked out by the definition. The error node carries the state of the decoder (see `chosen`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int

from featpatch.lens import Dictionary, Split
from featpatch.patch import Direction
from featpatch.patching.study.run import Run, Ways

Change = Mapping[Direction, Float[torch.Tensor, "pos d"]]
"""How the activations of the patched run change, by direction."""

Splits = Mapping[Direction, tuple[Split, Split]]
"""Base and source of each direction, split."""


@dataclass(frozen=True)
class Difference:
    """What differs at one dictionary between the runs of one pair.

    Attributes:
        position, feature: where features differ; one entry each, by feature, then by position.
        value: how much each entry adds of its feature's direction.
        moved: what each entry changes alone, `[entries, d_out]`, where features have no direction, else None.
        features, error: what all features, and what the error, change; 0 before the first differing token.
    """

    position: Int[torch.Tensor, " entries"]
    feature: Int[torch.Tensor, " entries"]
    value: Mapping[Direction, Float[torch.Tensor, " entries"]]
    moved: Mapping[Direction, Float[torch.Tensor, "entries d_out"]] | None
    features: Change
    error: Change

    @classmethod
    def of(cls, dictionary: Dictionary, ways: Ways, first: int) -> "Difference":
        """Between base and source of each direction; nothing differs before position `first`."""
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
        """These features alone; what all features change stays."""
        kept = torch.isin(self.feature, torch.tensor(features, dtype=torch.long)).nonzero()[:, 0]
        return replace(
            self,
            position=self.position[kept],
            feature=self.feature[kept],
            value={way: value[kept.to(value.device)] for way, value in self.value.items()},
            moved=None if self.moved is None else {way: moved[kept.to(moved.device)] for way, moved in self.moved.items()},
        )

    def at(self, span: list[int]) -> torch.Tensor:
        """Indices of the entries at these positions."""
        return torch.isin(self.position, torch.tensor(span, dtype=torch.long)).nonzero()[:, 0]


def split_ways(dictionary: Dictionary, ways: Ways, first: int) -> dict[Direction, tuple[Split, Split]]:
    """Base and source of each direction, split from position `first` on."""
    start = first if dictionary.behaviour.rowwise else 0
    runs: list[Run] = list(dict.fromkeys(run for both in ways.values() for run in both))
    split = {run: run.split(dictionary, start).since(first - start) for run in runs}
    return {way: (split[base], split[source]) for way, (base, source) in ways.items()}


def whole_change(site: str, ways: Ways, first: int) -> Change:
    """How the whole activation changes, flat; exactly 0 before position `first`."""
    changes: dict[Direction, torch.Tensor] = {}
    for way, (base, source) in ways.items():
        changes[way] = (source.at(site) - base.at(site)).flatten(1)
        changes[way][:first] = 0
    return changes


def _each_way(
    first: int, dictionary: Dictionary, splits: Splits, change: Callable[[Dictionary, Split, Split], torch.Tensor]
) -> dict[Direction, torch.Tensor]:
    """A change in each direction, with zeros before `first`.

    Without a state, one of two directions is minus the other, and worked out once.
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
    after, before = (dictionary.decode(features, base.state) for features in (source.features, base.features))
    return (after.to(base.error) - before.to(base.error))[0]


def _all_else(dictionary: Dictionary, base: Split, source: Split) -> torch.Tensor:
    change = (source.error - base.error)[0]
    if not base.state:
        return change
    after, before = (dictionary.decode(base.features, state) for state in (source.state, base.state))
    return change + (after.to(change) - before.to(change))[0]
