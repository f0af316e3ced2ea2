"""Labels that say in which directions a node has an effect, based on the intervals of both effects.

    denoising  noising   label              reading
    above      above     both directions    restores part of the behaviour, and part of it is lost without the node
    above      within    denoising only     restores part of it, but hardly any is lost: something else takes over (OR, backup)
    within     above     noising only       part of it is lost, but the node alone hardly restores any (AND)
    within     within    below threshold    at most the threshold in both directions, which need not be zero
    below      any       opposing           the corrupted value serves the behaviour better (in either direction)

With a threshold t, an effect is "above" if its 95 % interval lies entirely above t, "within" if it lies entirely in [-t, t],
and "below" if it lies entirely below -t. If either effect is none of these, or has no interval, the node is "undecided". A
label says nothing about how far an effect exceeds t: "both directions" can be a feature with an effect of 2 %. The intervals
are those of single rows: among thousands of rows some labels are due to chance, see the q-values.

t is a share, 1 % by default, of the effect of the whole activation at the node's hook point and position in that direction. It
is a share of the behaviour for whole activations, and for nodes whose hook point has no such row in the table, such as heads.
Where the effect of the whole activation is smaller than 1 % of the behaviour, t is a share of 1 %, so that rounding errors
decide nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featpatch.errors import FeatpatchError

THRESHOLD = 0.01
"""The default threshold: a share of the effect of the whole activation at the hook point."""

LEAST = 0.01
"""The smallest effect of a whole activation, as a share of the behaviour, from which thresholds are computed."""

UNDECIDED = "undecided"
NAMES = {
    ("above", "above"): "both directions",
    ("above", "within"): "denoising only",
    ("within", "above"): "noising only",
    ("within", "within"): "below threshold",
}


def check_threshold(threshold: float) -> None:
    """Check that a threshold is a share.

    Raises:
        FeatpatchError: it is not a number between 0 and 1.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
        raise FeatpatchError(
            f"threshold={threshold!r}: expected a number between 0 and 1, a share of the whole activation's effect above "
            f"which an effect counts, e.g. {THRESHOLD}"
        )


def named(intervals: Sequence[NDArray[np.float64]], carried: Sequence[NDArray[np.float64]], threshold: float) -> list[str]:
    """Return the quadrant label of each row.

    Args:
        intervals: of recovery and of degradation, `[rows, 2]` each; NaN where there is none.
        carried: recovery and degradation of the whole activation at the hook point, `[rows]` each.
        threshold: the share of these above which an effect counts.
    """
    shares = [threshold * np.maximum(np.abs(whole), LEAST) for whole in carried]
    sides = (_sides(interval, share) for interval, share in zip(intervals, shares, strict=True))
    return [UNDECIDED if UNDECIDED in both else NAMES.get(both, "opposing") for both in zip(*sides, strict=True)]


def _sides(interval: NDArray[np.float64], threshold: NDArray[np.float64]) -> list[str]:
    """Return for each effect on which side of its threshold `[rows]` it is: above, within, below or undecided."""
    low, high = interval.T
    cases = {"above": low > threshold, "within": (low >= -threshold) & (high <= threshold), "below": high < -threshold}
    found: list[str] = np.select(list(cases.values()), list(cases), UNDECIDED).tolist()
    return found
