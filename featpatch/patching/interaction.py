"""Measure whether two features have a larger or smaller effect together than the sum of their effects alone.

interaction = effect(both) - effect(one) - effect(other)
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from featpatch.effects import interval
from featpatch.errors import FeatpatchError, check_kinds
from featpatch.page import Frame
from featpatch.pairs import Pairs
from featpatch.patch import DIRECTIONS, Direction, Position
from featpatch.patching.features import single_study
from featpatch.patching.sets import SetPart
from featpatch.patching.study import Asked, Metrics


def interactions(
    model: Any,
    sae: Any,
    pairs: Pairs,
    *,
    features: Sequence[int] | None = None,
    top: int = 20,
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
        top: how many features to take if `features` is not given.
        model, sae, pairs, position, directions, metric, batch_rows, progress: as in `fp.select_features`.

    Returns:
        One row per combination of two features: `one`, `other` and, for each effect, the effect of both together (`recovery`),
        the `recovery_interaction` and its 95 % bootstrap interval over pairs (`_low`, `_high`).

    Raises:
        FeatpatchError: if the input is unusable, or there are several dictionaries or fewer than two features.
    """
    study, dictionary = single_study(model, sae, pairs, position, Asked("all", directions, metric, batch_rows))
    if features is None:
        features = study.complete(progress=progress).top(top, kind="feature").indices.tolist()
    check_kinds(Sequence, features=features)
    known = range(dictionary.d_sae)
    if len(features) < 2 or not all(type(f) is int and f in known for f in features) or len(set(features)) < len(features):
        raise FeatpatchError(
            f"features={list(features)}: expected at least two different ones, from 0 to {len(known) - 1}, that differ between "
            "the runs"
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
