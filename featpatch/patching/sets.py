"""Sets of features that are patched together: interactions of two, and the greedy selection of a small set.

Sets of one dictionary at one hook point are patches there (`SetPart`); sets across dictionaries, or of features that write to
several hook points, are joint patches, as in `rank_nodes`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from tqdm.auto import tqdm
from typing_extensions import Unpack

from featpatch.effects.statistics import interval
from featpatch.effects.table import Effects
from featpatch.engine.patches import Block, Deltas
from featpatch.engine.sweep import announcing
from featpatch.errors import FeatpatchError, check_choices, check_fractions, check_numbers, counted, decimal, is_integer, listed
from featpatch.frame import Frame
from featpatch.metrics import Metrics
from featpatch.nodes import DIRECTIONS, EFFECTS, Combine, Direction, Effect, Node, Patch, Position, check_directions
from featpatch.pairs.pairs import Pairs
from featpatch.patching.changes import Difference, as_blocks, split_ways, with_directions
from featpatch.patching.features import DictionaryPart, feature_study
from featpatch.patching.joint import node_study
from featpatch.patching.runs import PairRuns
from featpatch.patching.study import Options, Study
from featpatch.sae.dictionary import Dictionary
from featpatch.sae.nodes import check_nodes

MOST = 64
"""The default number of features in the largest set."""


@dataclass(frozen=True, eq=False)
class SetPart(DictionaryPart):
    """Sets of features of one dictionary, at one position or several; the error and the other features are kept.

    Attributes:
        sets: the sets of features at each position.
    """

    sets: Mapping[Position, Sequence[Sequence[int]]]

    def count(self, run: PairRuns) -> int:
        """Return the number of sets, including those in which nothing differs."""
        return sum(len(sets) for position, sets in self.sets.items() if run.wanted.get(position))

    def blocks(self, runs: Sequence[PairRuns]) -> list[list[Block]]:
        """Return the patches of each pair by position."""
        found = with_directions([self.difference(run) for run in runs])
        return [
            [block for at in self.sets if run.wanted.get(at) for block in self._of_position(run, difference, at)]
            for run, difference in zip(runs, found, strict=True)
        ]

    def _of_position(self, run: PairRuns, difference: Difference, position: Position) -> list[Block]:
        sets, span = self.sets[position], torch.tensor(run.wanted[position])
        site, name = self.dictionary.writes, self.dictionary.name
        nodes = tuple(Node(site, "set", number, position, name) for number in range(len(sets)))
        if difference.directions is not None:
            changes = self._along(difference, sets, span)
        else:
            changes = self._by_definition(run, sets, span)
        return as_blocks(run, nodes, {site: {way: [_deltas(change, span)] for way, change in changes.items()}})

    def _along(
        self, difference: Difference, sets: Sequence[Sequence[int]], span: Int[torch.Tensor, " span"]
    ) -> dict[Direction, Float[torch.Tensor, "sets span d"]]:
        """Return the change that each set makes, as a sum of multiples of feature directions."""
        assert difference.directions is not None
        directions, row, _ = difference.directions
        entries = difference.at(span.tolist())
        feature, place = difference.feature[entries], torch.searchsorted(span, difference.position[entries])
        rows = directions[row[entries].to(directions.device)]
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
    deltas = Deltas.nonzero(changes)
    return replace(deltas, position=span[deltas.position])


@dataclass(frozen=True)
class Sets:
    """Features of some dictionaries at one position, from which sets are made, and how these are measured.

    Attributes:
        study: the experiment in which each feature is patched alone.
        found: the dictionaries.
        ask: makes the experiment of some joint patches, given directions.
        position: the position.
    """

    study: Study
    found: Sequence[Dictionary]
    ask: Callable[[Sequence[Patch], Sequence[Direction]], Study]
    position: Position

    @classmethod
    def of(
        cls, model: Any, saes: Any, pairs: Pairs, position: Position, combine: Combine | None, **options: Unpack[Options]
    ) -> "Sets":
        """Make the experiment, after checking the input; `position` replaces `positions`."""
        asked: Options = {**options, "positions": "all" if position == "all" else [position]}
        study, found = feature_study(model, saes, pairs, combine=combine, joint=True, **asked)

        def ask(patches: Sequence[Patch], directions: Sequence[Direction]) -> Study:
            along: Options = {**options, "directions": directions}
            return node_study(model, saes, pairs, patches, combine=combine, **along)[0]

        return cls(study, found, ask, position)

    @property
    def alone(self) -> bool:
        """Whether all features belong to one dictionary, which writes at a single hook point."""
        return len(self.found) == 1 and len(self.found[0].outputs) == 1

    def shown(self, node: Node) -> int | Node:
        """Return how a feature is shown: its index if there is one dictionary at a single hook point, else its node."""
        return node.index if self.alone and node.index is not None else node

    def measured(self, sets: Sequence[Sequence[Node]], directions: Sequence[Direction], *, progress: bool) -> Effects:
        """Return the exact effects of sets, one row of kind `set` for each in which anything differs, by its number."""
        if self.alone:
            (dictionary,) = self.found
            part = SetPart(dictionary, {self.position: [[dictionary.number(node) for node in some] for some in sets]})
            study = replace(self.study, parts=[part], directions=check_directions(directions))
        else:
            study = self.ask([Patch(tuple(some)) for some in sets], directions)
        effects = study.complete(progress=progress)
        return effects.take(effects.indices.argsort())  # sets at one hook point are patched apart from those at several


def interactions(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    features: Sequence[int] | Sequence[Node] | Effects | None = None,
    top: int | None = None,
    position: Position = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    combine: Combine | None = None,
    batch_rows: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure the exact pairwise interactions of features, and sort them by size, largest first.

    For a positive effect, the interaction is below 0 if either feature is enough (an OR), above 0 if both are needed (an AND).
    Features of different dictionaries and layers are patched together as in `rank_nodes`.

    Args:
        features: the features: indices for a single SAE, or nodes, such as those of a table of effects; by default the `top`
            features with the largest effect alone.
        top: how many features to take if `features` is not given; 20 by default.
        position: where the features are patched; the positions of nodes that are given must be the same.
        model, saes, pairs, directions, metric, combine, batch_rows, progress: as in `fp.select_features`.

    Returns:
        One row per combination of two features: `one`, `other` (indices for a single SAE, otherwise nodes) and, for each
        effect, the effect of both together (`recovery`), the `recovery_interaction` and its 95 % bootstrap interval over pairs
        (`_low`, `_high`).

    Raises:
        FeatpatchError: the input is unusable, or there are fewer than two features.

    Examples:
        >>> table = fp.interactions(model, saes[0], pairs, top=3, position="S2", progress=False)
        >>> table[["one", "other", "recovery", "recovery_interaction"]].shape
        (3, 4)
        >>> across = fp.interactions(model, saes, pairs, features=effects.top(3, kind="feature"), position="S2", progress=False)
        >>> str(across["one"][0])
        'blocks.1.hook_resid_pre feature 433 @ S2'
    """
    if features is not None and top is not None:
        raise FeatpatchError(f"top={top!r} with features: expected only one of them; leave top out")
    if top is not None:
        check_numbers(2, top=top)
    asked = Sets.of(model, saes, pairs, position, combine, directions=directions, metric=metric, batch_rows=batch_rows)
    if features is None:
        single = asked.study.complete(progress=progress)
        nodes: Sequence[Node] = single.top(20 if top is None else top, kind="feature").nodes
    else:
        nodes = _given(asked, features)
    if len(nodes) < 2 or len(set(nodes)) < len(nodes):
        raise FeatpatchError(
            f"features={list(map(asked.shown, nodes))}: expected at least two features, each once, that differ between the runs"
        )
    two = list(combinations(range(len(nodes)), 2))
    sets = [[node] for node in nodes] + [[nodes[one], nodes[other]] for one, other in two]
    effects = asked.measured(sets, directions, progress=progress)
    table = Frame(
        {"one": [asked.shown(nodes[one]) for one, _ in two], "other": [asked.shown(nodes[other]) for _, other in two]}
    )
    for effect in effects.directions_run():
        change = np.zeros((len(sets), len(effects.clean)))
        change[effects.indices] = effects.changes(effect).toarray()
        both = change[len(nodes) :]
        left = both - change[[one for one, _ in two]] - change[[other for _, other in two]]
        table[effect], table[f"{effect}_interaction"] = both.sum(1) / effects.gap.sum(), left.sum(1) / effects.gap.sum()
        table[f"{effect}_interaction_low"], table[f"{effect}_interaction_high"] = interval(left, effects.gap).T
    first = f"{effects.directions_run()[0]}_interaction"
    return table.sort_values(first, key=abs, ascending=False, ignore_index=True)


def _given(asked: Sets, features: Any) -> list[Node]:
    """Return the nodes of features that the user names; raise a FeatpatchError if one is unknown or at another position."""
    given: list[Any] | None = None
    if isinstance(features, (Sequence, Effects)):
        given = list(features.nodes if isinstance(features, Effects) else features)
    first = asked.found[0]
    if given is not None and asked.alone and all(is_integer(each) and each in range(first.d_sae) for each in given):
        return [first.node(int(each), asked.position) for each in given]
    if given is None or not all(isinstance(each, Node) and each.kind == "feature" for each in given):
        expected = f"indices from 0 to {first.d_sae - 1}, or nodes" if asked.alone else "nodes"
        raise FeatpatchError(
            f"features={given if given is not None else features!r}: expected at least two features, as {expected} of kind "
            "'feature', such as effects.top(10, kind='feature')"
        )
    if other := next((node for node in given if node.position != asked.position), None):
        raise FeatpatchError(
            f"{str(other)!r} with position={asked.position!r}: expected features at this position; pass "
            f"position={other.position!r}"
        )
    return check_nodes(asked.study.lens, given, asked.found, "features")


SHOWN = 16
"""The largest number of features that the `repr` of a selection names."""


@dataclass(frozen=True, repr=False)
class Selection:
    """The result of `select_features`: features chosen one by one, each adding most to those chosen before.

    Attributes:
        features: the features in the order in which they were chosen: indices for a single SAE, otherwise nodes.
        nodes: the nodes of these features.
        effects: the effects of the growing sets in both directions; row n (kind `set`) is the first n + 1 features.
        effect, target: the effect and the share of the gap that were to be reached.
        reached: whether the target was reached.

    Examples:
        >>> chosen = fp.select_features(model, saes[0], pairs, candidates=4, most=2, position="S2", progress=False)
        >>> chosen.effect, len(chosen.effects)
        ('recovery', 2)
    """

    features: Sequence[int] | Sequence[Node]
    nodes: Sequence[Node]
    effects: Effects
    effect: Effect
    target: float
    reached: bool

    def __repr__(self) -> str:
        value, s = self.effects.pooled(self.effect)[-1], "s" * (len(self.features) == 1)
        verb = f"bring{s} back" if self.effect == "recovery" else f"cost{s}"
        short = "" if self.reached else f", short of {self.target:.0%}"
        share, shown = f"{decimal(value, '.0%')}{short}", listed(list(map(str, self.features)), SHOWN)
        return f"{counted(len(self.features), 'feature')} {verb} {share}: {shown}"


def select_features(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    effect: Effect = "recovery",
    target: float = 0.9,
    candidates: int = 64,
    most: int = MOST,
    position: Position = "all",
    metric: Metrics = "logit_diff",
    combine: Combine | None = None,
    batch_rows: int | None = None,
    progress: bool = True,
) -> Selection:
    """Select features by greedy forward selection, until together they reach a share of the gap.

    Every step patches each candidate together with the features chosen before, exactly, and takes the best; the selection ends
    when no candidate adds anything. Greedy selection is not optimal, and the effect on the pairs used for selection is too
    optimistic: measure the selected features on other pairs.

    Args:
        saes: one SAE, or several, whose features are then selected together, in any layers.
        effect: the effect to reach, `"recovery"` or `"degradation"`.
        target: the share of the gap to reach; 0.9 is 90 %.
        candidates: how many features take part, those with the largest effect alone. Features that are only needed together (an
            AND) have no effect alone; increase this to include them.
        most: the largest number of features to select.
        position: where the features are patched: `"all"`, a label or an index.
        combine: what a patch of features at several hook points means, as in `rank_nodes`.
        model, pairs, metric, batch_rows, progress: as in `rank_features`.

    Returns:
        The features in the order in which they were selected, with the effects of the growing sets in both directions.

    Raises:
        FeatpatchError: the input is unusable, or no feature differs.

    Examples:
        >>> chosen = fp.select_features(model, saes[0], pairs, candidates=16, most=3, position="S2", progress=False)
        >>> len(chosen.features), chosen.reached
        (3, False)
    """
    check_choices(tuple(EFFECTS), effect=effect)
    check_fractions(target=target)
    check_numbers(1, candidates=candidates, most=most)
    asked = Sets.of(model, saes, pairs, position, combine, metric=metric, batch_rows=batch_rows)
    way = (EFFECTS[effect],)
    single = replace(asked.study, directions=way).complete(progress=progress)
    pool = list(single.top(candidates, by=effect, kind="feature").nodes)
    if not pool:
        names = ", ".join(repr(dictionary.name) for dictionary in asked.found)
        raise FeatpatchError(
            f"no feature of {names} differs between the runs at {position!r}: expected at least one; choose another position"
        )
    chosen: list[Node] = []
    reached = 0.0
    tries = len(asked.study.pairs) * sum(range(max(len(pool) - most, 0) + 1, len(pool) + 1))
    with tqdm(total=tries, unit="patch", desc="selecting, at most", disable=not progress) as bar:
        done = announcing(bar)
        done(0)
        while pool and len(chosen) < most and (reached < target or not chosen):
            values = np.zeros(len(pool))
            tried = asked.measured([[*chosen, node] for node in pool], way, progress=False)
            values[tried.indices] = tried.pooled(effect)
            best = int(values.argmax())
            if chosen and values[best] <= reached:
                break
            reached = float(values[best])
            chosen.append(pool.pop(best))
            done(len(asked.study.pairs) * len(values))
    effects = asked.measured([chosen[: size + 1] for size in range(len(chosen))], DIRECTIONS, progress=False)
    features: Any = list(map(asked.shown, chosen))
    return Selection(features, chosen, effects, effect, target, reached >= target)
