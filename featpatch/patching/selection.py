"""Select a small set of features that together reach a share of the effect, by greedy forward selection."""

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
"""The largest number of features that the `repr` of a selection names."""


@dataclass(frozen=True, repr=False)
class Selection:
    """The result of `select_features`: features chosen one by one, each adding most to those chosen before.

    Attributes:
        features: the features in the order in which they were chosen.
        effects: the effects of the growing sets in both directions; row n (kind `set`) is the first n + 1 features.
        effect, target: the effect and the share of the gap that were to be reached.
        reached: whether the target was reached.
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

    Raises:
        FeatpatchError: if the input is unusable, there are several dictionaries, or no feature differs.
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
