"""The fewest features that reach a share of the behaviour together, by greedy forward selection."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from featpatch.effects import EFFECTS, Effect, Effects
from featpatch.errors import FeatpatchError, check_kinds
from featpatch.pairs import Pairs
from featpatch.patch import Position
from featpatch.patching.features import single_study
from featpatch.patching.sets import MOST, SetPart
from featpatch.patching.study import Asked, Metrics

SHOWN = 16
"""The largest number of features that the text form of a selection names."""


@dataclass(frozen=True, repr=False)
class Selection:
    """Features chosen one after the other, each the one that adds most to those before.

    Attributes:
        features: in the order in which they were chosen.
        effects: the growing sets, in both directions: row n (kind `set`) is the first n + 1 features.
        effect, target: what was to be reached.
        reached: whether it was.
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
    """Greedy forward selection among the features of one dictionary, until they reach a share of the gap together.

    Every step runs each candidate together with those chosen before, exactly, and takes the best; it ends where none adds
    anything. Greedy is not optimal, and selecting on the same pairs flatters: measure what is chosen on others.

    Args:
        effect: what to reach, `"recovery"` or `"degradation"`.
        target: how much of it, 0.9 = 90 % of the gap.
        candidates: how many of the features with the largest effect alone take part. Of an AND none has any effect alone; then
            take more.
        most: features after which it ends.
        position: where they are swapped: `"all"`, a label or an index.
        model, sae, pairs, metric, batch_rows, progress: as in `rank_features`, for one dictionary.

    Raises:
        FeatpatchError: unusable input, several dictionaries, or no feature that differs.
    """
    check_kinds(str, effect=effect)
    if effect not in EFFECTS or not _fits(target, candidates, most):
        raise FeatpatchError(
            f"effect={effect!r}, target={target}, candidates={candidates}, most={most}: expected 'recovery' or "
            "'degradation', a target above 0 such as 0.8, and 1 or more of the others"
        )
    study, dictionary = single_study(model, sae, pairs, position, Asked(metric=metric, batch_rows=batch_rows))
    one_way = replace(study, directions=(EFFECTS[effect],))
    single = one_way.complete(progress=progress)
    pool: list[int] = single.top(candidates, by=effect, kind="feature").indices.tolist()
    if not pool:
        raise FeatpatchError(f"no feature of {dictionary.name!r} differs at {position!r}: expected some to choose among")
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
    return isinstance(target, (int, float)) and target > 0 and all(isinstance(n, int) and n > 0 for n in (candidates, most))
