"""In which directions a node has an effect, decided with the intervals of both effects.

    denoising  noising   label              reading
    above      above     both directions    restores the behaviour, and the behaviour depends on it
    above      within    denoising only     restores it, but something else does the job as well (OR, backup)
    within     above     noising only       needed, but not enough without something else (AND)
    within     within    below threshold    smaller than the threshold in both directions, which is not the same as zero
    below      any       opposing           the corrupted value serves the behaviour better (either direction)

An effect is above if its interval lies wholly above the threshold t, within if wholly in [-t, t], and below if wholly below -t.
Otherwise, and without an interval, the node is undecided. The labels do not depend on the size of an effect beyond t: "both
directions" of a feature that carries 2 % says that these 2 % are certainly there.

t is a share, 1 % by default, of what the whole activation at the node's hook point and position carries in that direction. It
is a share of the behaviour for whole activations, and for nodes whose hook point has no such row in the table, such as heads.
A hook point that carries less than 1 % of the behaviour counts as one that carries 1 %, so that rounding decides nothing.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featpatch.errors import FeatpatchError

THRESHOLD = 0.01
"""The share of what the hook point carries up to which an effect counts as small."""

LEAST = 0.01
"""The share of the behaviour that a hook point counts as carrying, at least."""

UNDECIDED = "undecided"
NAMES = {
    ("above", "above"): "both directions",
    ("above", "within"): "denoising only",
    ("within", "above"): "noising only",
    ("within", "within"): "below threshold",
}


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is not a share.

    Raises:
        FeatpatchError: it is not between 0 and 1.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
        raise FeatpatchError(
            f"threshold={threshold!r}: expected a number between 0 and 1, the share of what the hook point carries above which "
            f"an effect counts, e.g. {THRESHOLD}"
        )


def named(intervals: Sequence[NDArray[np.float64]], carried: Sequence[NDArray[np.float64]], threshold: float) -> list[str]:
    """Label each row.

    Args:
        intervals: of recovery and of degradation, `[rows, 2]` each; NaN where there is none.
        carried: recovery and degradation of the whole hook point, `[rows]` each.
        threshold: the share of it above which an effect counts.
    """
    shares = [threshold * np.maximum(np.abs(whole), LEAST) for whole in carried]
    sides = (_sides(interval, share) for interval, share in zip(intervals, shares, strict=True))
    return [UNDECIDED if UNDECIDED in both else NAMES.get(both, "opposing") for both in zip(*sides, strict=True)]


def _sides(interval: NDArray[np.float64], threshold: NDArray[np.float64]) -> list[str]:
    """Say on which side of its threshold `[rows]` each effect is: above, within, below or undecided."""
    low, high = interval.T
    cases = {"above": low > threshold, "within": (low >= -threshold) & (high <= threshold), "below": high < -threshold}
    found: list[str] = np.select(list(cases.values()), list(cases), UNDECIDED).tolist()
    return found
