"""Random directions as controls, to test whether a feature does more than any change of the same size."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from featpatch.effects.selection import measured_effect
from featpatch.effects.table import Effects
from featpatch.engine.patches import Block, Deltas
from featpatch.errors import FeatpatchError, check_numbers, decimal
from featpatch.metrics import Metrics
from featpatch.nodes import DIRECTIONS, Direction, Effect, Node, Position
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs
from featpatch.patching.changes import Difference, as_blocks, with_directions
from featpatch.patching.features import DictionaryPart, feature_study
from featpatch.patching.runs import PairRuns
from featpatch.untrusted import visible


@dataclass(frozen=True, repr=False)
class Controls:
    """The effects of a feature and of random directions of the same norm.

    Attributes:
        feature: a table with the feature's row.
        random: a table with one row per random direction.

    Examples:
        >>> controls = fp.random_controls(model, saes[0], pairs, n=50, position="S2", progress=False)
        >>> controls.share("degradation") < 0.1
        True
    """

    feature: Effects
    random: Effects

    def share(self, effect: Effect | None = None) -> float:
        """Return the share of random directions whose pooled effect is at least as large as the feature's.

        Args:
            effect: the effect; by default the first that was measured.

        Raises:
            FeatpatchError: the effect was not measured.
        """
        effect = measured_effect(effect, self.feature.directions_run())
        return float((self.random.pooled(effect) >= self.feature.pooled(effect)[0]).mean())

    def __repr__(self) -> str:
        parts = [
            f"{effect}: {self.share(effect):.1%} of {len(self.random)} random directions of the same norm have an effect of "
            f"at least {decimal(self.feature.pooled(effect)[0], '.3f')}, that of {self.feature.nodes[0]}"
            for effect in self.feature.directions_run()
        ]
        return visible("\n".join(parts))


def random_controls(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    feature: int | None = None,
    n: int = 200,
    seed: int = 0,
    position: Position = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    progress: bool = True,
) -> Controls:
    """Measure the exact effects of a feature and of random directions in its place.

    Where patching the feature adds a vector to the activation, each control adds a vector of the same norm, with the feature's
    sign, along a random unit vector. A control uses the same unit vector in every pair and at every position.

    Args:
        saes: a single SAE, as in `fp.select_features`.
        feature: the index of the feature; by default that of the largest effect at the position.
        n: the number of random directions.
        seed: the seed for the random directions.
        model, pairs, position, directions, metric, batch_rows, progress: as in `fp.select_features`.

    Returns:
        The effects of the feature and of the random directions, and the share of these that reach the feature's effect.

    Raises:
        FeatpatchError: the input is unusable, there are several dictionaries, the feature's index is out of range, or the
            feature differs in no pair.

    Examples:
        >>> controls = fp.random_controls(model, saes[0], pairs, n=50, position="S2", progress=False)
        >>> controls.feature.nodes[0].index, len(controls.random)
        (433, 50)
        >>> controls.share("degradation") < 0.1
        True
    """
    check_numbers(1, n=n)
    check_numbers(0, seed=seed)
    at: Positions = "all" if position == "all" else [position]
    study, found = feature_study(model, saes, pairs, positions=at, directions=directions, metric=metric, batch_rows=batch_rows)
    if len(found) != 1:
        raise FeatpatchError(f"there are {len(found)} SAEs: expected exactly one; call this function once per SAE")
    (dictionary,) = found
    if feature is not None:
        check_numbers(0, feature=feature)
        if feature >= dictionary.d_sae:
            raise FeatpatchError(
                f"feature {feature} of {dictionary.name!r} is out of range: expected 0 to {dictionary.d_sae - 1}"
            )
    single = study.complete(progress=progress).where(kind="feature")
    own = single.top(1) if feature is None else single.where(index=feature)
    if not len(own):
        if feature is None:
            raise FeatpatchError(
                f"no feature of {dictionary.name!r} differs between the runs at {position!r}: expected at least one; choose "
                "another position"
            )
        raise FeatpatchError(
            f"feature {feature} of {dictionary.name!r} is the same in both runs of every pair at {position!r}: expected one "
            "that differs; choose another feature or position"
        )
    part = RandomPart(dictionary, int(own.indices[0]), position, n, seed)
    random = replace(study, parts=[part]).complete(progress=progress)
    if not len(random):
        raise FeatpatchError(
            f"the decoder direction of {own.nodes[0]} is zero: expected a feature that writes something, to compare with "
            "random directions"
        )
    return Controls(own, random)


@dataclass(frozen=True, eq=False)
class RandomPart(DictionaryPart):
    """Random directions in the place of a feature's direction.

    Attributes:
        feature: the index of the feature.
        position: where the feature is patched.
        n: the number of random directions.
        seed: the seed for the random directions.
    """

    feature: int
    position: Position
    n: int
    seed: int

    def count(self, run: PairRuns) -> int:
        """Return the number of directions if the feature differs between the runs, else 0."""
        difference = self.difference(run)
        return self.n * bool((difference.feature[difference.at(run.wanted[self.position])] == self.feature).any())

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair in which the feature differs, and none for other pairs."""
        found = with_directions([self.difference(run) for run in runs])
        units = self._units(next(iter(found[0].value.values())))
        return [self._of_pair(run, difference, units) for run, difference in zip(runs, found, strict=True)]

    def _of_pair(self, run: PairRuns, difference: Difference, units: torch.Tensor) -> list[Block]:
        entries = difference.at(run.wanted[self.position])
        entries = entries[difference.feature[entries] == self.feature]
        own = difference.deltas(entries, torch.zeros_like(entries), 1)
        if not all(len(moves.patch) for moves in own.values()):
            return []
        site, count = self.dictionary.writes, len(entries)
        nodes = tuple(Node(site, "random", number, self.position, self.dictionary.name) for number in range(self.n))
        deltas = {}
        for way, of_way in own.items():
            value = difference.value[way]
            signed = of_way.values().norm(dim=1) * value[entries.to(value.device)].sign()
            deltas[way] = [
                Deltas(
                    patches=self.n,
                    patch=torch.arange(self.n).repeat_interleave(count),
                    position=difference.position[entries].repeat(self.n),
                    direction=torch.arange(self.n).repeat_interleave(count),
                    coefficient=signed.repeat(self.n),
                    directions=units,
                )
            ]
        return as_blocks(run, nodes, {site: deltas})

    def _units(self, like: torch.Tensor) -> torch.Tensor:
        """Draw the random unit vectors, `[n, d]`, with the type and device of `like`."""
        drawn = torch.randn(self.n, self.dictionary.codec.d_out, generator=torch.Generator().manual_seed(self.seed))
        return (drawn / drawn.norm(dim=1, keepdim=True)).to(like)
