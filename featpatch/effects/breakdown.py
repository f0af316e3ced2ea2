"""Effects for each value of a tag of the pairs, to see whether a feature matters under every template and corruption."""

from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from featpatch.effects import statistics
from featpatch.errors import FeatpatchError
from featpatch.patch import Node

if TYPE_CHECKING:
    from featpatch.effects.effects import Effects
    from featpatch.patch import Effect


def pairs_by_value(effects: "Effects", tag: str) -> dict[str, NDArray[np.int64]]:
    """Return the indices of the pairs with each value of a tag, in order of appearance; pairs without the tag are left out.

    Raises:
        FeatpatchError: no pair has the tag, or all have the same value of it.
    """
    tags = effects.metadata.get("tags", [])
    values = [of_pair.get(tag) for of_pair in tags]
    found: list[str] = [value for value in dict.fromkeys(values) if value is not None]
    if not found:
        known = sorted({name for of_pair in tags for name in of_pair})
        raise FeatpatchError(
            f"no pair has a tag {tag!r}: expected one of {known or '(the pairs have no tags)'}; give the pairs tags "
            "before they are ranked, e.g. by fp.tasks or Pair(tags={'corruption': ...})"
        )
    if len(found) < 2:
        raise FeatpatchError(
            f"tag {tag!r} is {found[0]!r} in all pairs that have it: expected at least 2 values to compare; rank pairs of "
            "several together, or choose another tag"
        )
    return {value: np.flatnonzero([other == value for other in values]) for value in found}


def by_tag(effects: "Effects", tag: str, effect: "Effect") -> pd.DataFrame:
    """Return the pooled effect for each value of a tag, one row per node.

    The columns for a value, for example `swap_s2` with `recovery`, are `recovery_swap_s2`, `recovery_swap_s2_low` and `_high`
    (95 % bootstrap interval over these pairs) and `recovery_swap_s2_rank` (1 is the largest of all features that were ranked).
    All are NaN for a value whose pairs have a mean gap near zero; the interval is also NaN for a value with a single pair.

    `depends` is True for a feature whose intervals under two values do not overlap. It is not a test with a controlled error
    rate: intervals over a few pairs are too narrow, and among thousands of features some intervals do not overlap by chance.

    Raises:
        FeatpatchError: no pair has the tag, or all have the same value of it.
    """
    table = pd.DataFrame({name: [getattr(node, name) for node in effects.nodes] for name in Node.__dataclass_fields__})
    table["index"] = table["index"].astype("Int64")
    change, rows, ranked = effects.whole.changes(effect).toarray(), effects.rows_in_whole(), effects.whole.ranked
    intervals = []
    for value, pairs in pairs_by_value(effects, tag).items():
        name, gap = f"{effect}_{value}", effects.gap[pairs]
        stands = abs(gap.mean()) > statistics.NEAR_ZERO * statistics.size(effects.clean[pairs], effects.corrupted[pairs])
        part = change[:, pairs] if stands else np.full((len(change), len(pairs)), np.nan)
        pooled, ranks = part.mean(axis=1) / gap.mean() if stands else part.mean(axis=1), np.full(len(change), np.nan)
        ranks[ranked] = rankdata(-pooled[ranked], method="min", nan_policy="omit")
        intervals.append(statistics.interval(part[rows], gap) if stands else np.full((len(rows), 2), np.nan))
        table[name], (table[f"{name}_low"], table[f"{name}_high"]) = pooled[rows], intervals[-1].T
        table[f"{name}_rank"] = pd.array(ranks[rows], dtype="Int64")
    table["depends"] = effects.ranked & _apart(intervals)
    return table


def _apart(intervals: list[NDArray[Any]]) -> NDArray[np.bool_]:
    """Return a mask of the rows in which some two of the intervals `[rows, 2]` do not overlap.

    Intervals that touch overlap, and NaN overlaps everything.
    """
    apart = [(one[:, 0] > other[:, 1]) | (other[:, 0] > one[:, 1]) for one, other in combinations(intervals, 2)]
    result: NDArray[np.bool_] = np.any(apart, axis=0)
    return result
