"""Sets of features that are patched together: interactions of two, and the greedy selection of a small set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm

from featpatch.effects.statistics import interval
from featpatch.effects.table import Effects
from featpatch.engine.patches import Deltas
from featpatch.errors import FeatpatchError, check_kinds, is_integer, is_number
from featpatch.frame import Frame
from featpatch.nodes import DIRECTIONS, EFFECTS, Direction, Effect, Node, Position
from featpatch.pairs.pairs import Pairs
from featpatch.patching.changes import DecoderDirections, Difference, Swap, split_ways
from featpatch.patching.features import single_study
from featpatch.patching.parts import DictionaryPart
from featpatch.patching.readings import Metrics
from featpatch.patching.runs import PairRuns
from featpatch.patching.study import Options

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

    def swaps(self, runs: Sequence[PairRuns]) -> list[list[Swap]]:
        """Return the swaps of each pair, one per position."""
        found = [self.difference(run) for run in runs]
        directions = DecoderDirections.of(self.dictionary, found)
        return [
            [self._of_position(run, difference, directions, position) for position in self.sets if run.wanted.get(position)]
            for run, difference in zip(runs, found, strict=True)
        ]

    def _of_position(self, run: PairRuns, difference: Difference, directions: DecoderDirections, position: Position) -> Swap:
        sets, span = self.sets[position], torch.tensor(run.wanted[position])
        site, name = self.dictionary.writes, self.dictionary.name
        nodes = tuple(Node(site, "set", number, position, name) for number in range(len(sets)))
        if difference.moved is None:
            changes = self._along(difference, directions, sets, span)
        else:
            changes = self._by_definition(run, sets, span)
        return Swap(nodes, {site: {way: _deltas(change, span) for way, change in changes.items()}})

    def _along(
        self,
        difference: Difference,
        directions: DecoderDirections,
        sets: Sequence[Sequence[int]],
        span: Int[torch.Tensor, " span"],
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
        """Return the change that each set S makes, by the definition, see `Dictionary.change`."""
        changes = {}
        for way, (base, source) in split_ways(self.dictionary, run.ways, 0).items():
            number = torch.arange(self.dictionary.d_sae)
            members = [torch.isin(number, torch.tensor(list(some), dtype=torch.long)) for some in sets]
            changes[way] = torch.stack([self.dictionary.change(base, source, features=member)[0, span] for member in members])
        return changes


def _deltas(changes: Float[torch.Tensor, "sets span d"], span: Int[torch.Tensor, " span"]) -> Deltas:
    """Return one patch per set, covering the positions at which the set changes anything."""
    patch, place = (changes != 0).any(2).nonzero(as_tuple=True)
    return Deltas.explicit(patch.cpu(), span[place.cpu()], changes[patch, place], len(changes))


def interactions(
    model: Any,
    sae: Any,
    pairs: Pairs,
    *,
    features: Sequence[int] | None = None,
    top: int | None = None,
    position: Position = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure the exact pairwise interactions of features of one dictionary, and sort them by size, largest first.

    For a positive effect, the interaction is below 0 if either feature is enough (an OR), above 0 if both are needed (an AND).

    Args:
        features: indices of the features; by default the `top` features with the largest effect alone.
        top: how many features to take if `features` is not given; 20 by default.
        model, sae, pairs, position, directions, metric, batch_rows, progress: as in `fp.select_features`.

    Returns:
        One row per combination of two features: `one`, `other` and, for each effect, the effect of both together (`recovery`),
        the `recovery_interaction` and its 95 % bootstrap interval over pairs (`_low`, `_high`).

    Raises:
        FeatpatchError: if the input is unusable, or there are several dictionaries or fewer than two features.

    Examples:
        >>> table = fp.interactions(model, saes[0], pairs, top=3, position="S2", progress=False)
        >>> table[["one", "other", "recovery", "recovery_interaction"]].shape
        (3, 4)
    """
    if features is not None and top is not None:
        raise FeatpatchError(f"top={top!r} with features: expected only one of them; leave top out")
    study, dictionary = single_study(model, sae, pairs, position, Options("all", directions, metric, batch_rows))
    if features is None:
        features = study.complete(progress=progress).top(20 if top is None else top, kind="feature").indices.tolist()
    check_kinds(Sequence, features=features)
    known = range(dictionary.d_sae)
    if len(features) < 2 or not all(is_integer(f) and f in known for f in features) or len(set(features)) < len(features):
        raise FeatpatchError(
            f"features={list(features)}: expected at least two features from 0 to {len(known) - 1}, each once, that differ "
            "between the runs"
        )
    two = list(combinations(range(len(features)), 2))
    sets = [[feature] for feature in features] + [[features[one], features[other]] for one, other in two]
    effects = replace(study, parts=[SetPart(dictionary, {position: sets})]).complete(progress=progress)
    table = Frame({"one": [features[one] for one, _ in two], "other": [features[other] for _, other in two]})
    for effect in effects.directions_run():
        change = np.zeros((len(sets), len(effects.clean)))
        change[effects.indices] = effects.changes(effect).toarray()
        both = change[len(features) :]
        left = both - change[[one for one, _ in two]] - change[[other for _, other in two]]
        table[effect], table[f"{effect}_interaction"] = both.sum(1) / effects.gap.sum(), left.sum(1) / effects.gap.sum()
        table[f"{effect}_interaction_low"], table[f"{effect}_interaction_high"] = interval(left, effects.gap).T
    first = f"{effects.directions_run()[0]}_interaction"
    return table.sort_values(first, key=abs, ascending=False, ignore_index=True)


SHOWN = 16
"""The largest number of features that the `repr` of a selection names."""


@dataclass(frozen=True, repr=False)
class Selection:
    """The result of `select_features`: features chosen one by one, each adding most to those chosen before.

    Attributes:
        features: the features in the order in which they were chosen.
        effects: the effects of the growing sets in both directions; row n (kind `set`) is the first n + 1 features.
        effect, target: the effect and the share of the gap that were to be reached.
        reached: whether the target was reached.

    Examples:
        >>> chosen = fp.select_features(model, saes[0], pairs, candidates=4, most=2, position="S2", progress=False)
        >>> chosen.effect, len(chosen.effects)
        ('recovery', 2)
    """

    features: Sequence[int]
    effects: Effects
    effect: Effect
    target: float
    reached: bool

    def __repr__(self) -> str:
        verb, value = "bring back" if self.effect == "recovery" else "cost", self.effects.pooled(self.effect)[-1]
        short = "" if self.reached else f", short of {self.target:.0%}"
        more = f" and {len(self.features) - SHOWN} more" if len(self.features) > SHOWN else ""
        return f"{len(self.features)} features {verb} {value:.0%}{short}: {', '.join(map(str, self.features[:SHOWN]))}{more}"


def select_features(
    model: Any,
    sae: Any,
    pairs: Pairs,
    *,
    effect: Effect = "recovery",
    target: float = 0.9,
    candidates: int = 64,
    most: int = MOST,
    position: Position = "all",
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    progress: bool = True,
) -> Selection:
    """Select features of one dictionary by greedy forward selection, until together they reach a share of the gap.

    Every step patches each candidate together with the features chosen before, exactly, and takes the best; the selection ends
    when no candidate adds anything. Greedy selection is not optimal, and the effect on the pairs used for selection is too
    optimistic: measure the selected features on other pairs.

    Args:
        effect: the effect to reach, `"recovery"` or `"degradation"`.
        target: the share of the gap to reach; 0.9 is 90 %.
        candidates: how many features take part, those with the largest effect alone. Features that are only needed together (an
            AND) have no effect alone; increase this to include them.
        most: the largest number of features to select.
        position: where the features are patched: `"all"`, a label or an index.
        model, sae, pairs, metric, batch_rows, progress: as in `rank_features`, for one dictionary.

    Returns:
        The features in the order in which they were selected, with the effects of the growing sets in both directions.

    Raises:
        FeatpatchError: if the input is unusable, there are several dictionaries, or no feature differs.

    Examples:
        >>> chosen = fp.select_features(model, saes[0], pairs, candidates=16, most=3, position="S2", progress=False)
        >>> len(chosen.features), chosen.reached
        (3, False)
    """
    check_kinds(str, effect=effect)
    if effect not in EFFECTS or not _fits(target, candidates, most):
        raise FeatpatchError(
            f"effect={effect!r}, target={target}, candidates={candidates}, most={most}: expected effect to be 'recovery' or "
            "'degradation', target above 0 (such as 0.8), and candidates and most 1 or more"
        )
    study, dictionary = single_study(model, sae, pairs, position, Options(metric=metric, batch_rows=batch_rows))
    one_way = replace(study, directions=(EFFECTS[effect],))
    single = one_way.complete(progress=progress)
    pool: list[int] = single.top(candidates, by=effect, kind="feature").indices.tolist()
    if not pool:
        raise FeatpatchError(
            f"no feature of {dictionary.name!r} differs between the runs at {position!r}: expected at least one; choose "
            "another position"
        )
    chosen: list[int] = []
    reached = 0.0
    with tqdm(total=most, unit="feature", desc="selecting", disable=not progress) as bar:
        while pool and len(chosen) < most and (reached < target or not chosen):
            sets = [[*chosen, feature] for feature in pool]
            values = np.zeros(len(pool))
            tried = replace(one_way, parts=[SetPart(dictionary, {position: sets})]).complete(progress=False)
            values[tried.indices] = tried.pooled(effect)
            best = int(values.argmax())
            if chosen and values[best] <= reached:
                break
            reached = float(values[best])
            chosen.append(pool.pop(best))
            bar.update()
    growing = [chosen[: size + 1] for size in range(len(chosen))]
    effects = replace(study, parts=[SetPart(dictionary, {position: growing})]).complete(progress=False)
    return Selection(chosen, effects, effect, target, reached >= target)


def _fits(target: float, candidates: int, most: int) -> bool:
    return is_number(target) and target > 0 and all(is_integer(n) and n > 0 for n in (candidates, most))
