"""What denoising and noising say together of a node, decided with the intervals of both effects.

    recovery  degradation
    high      high         necessary and sufficient
    high      low          sufficient but redundant: something else does the job as well (OR, backup)
    low       high         necessary but not sufficient: something else is needed too (AND)
    low       low          irrelevant
    opposing, either       opposing: the corrupted value serves the behaviour better

An effect is high if its interval lies wholly above the threshold, low if wholly within (-threshold, threshold), opposing if
wholly below -threshold; otherwise, and without an interval, it is not decided, and neither is the node.
"""

import numpy as np
from numpy.typing import NDArray

from featpatch.errors import FeatpatchError

THRESHOLD = 0.1
"""Share of the behaviour below which an effect is taken for none."""

UNDECIDED = "undecided"
NAMES = {
    ("high", "high"): "necessary and sufficient",
    ("high", "low"): "sufficient but redundant",
    ("low", "high"): "necessary but not sufficient",
    ("low", "low"): "irrelevant",
}


def check_threshold(threshold: float) -> None:
    """Refuses a threshold that decides nothing.

    Raises:
        FeatpatchError: it is not between 0 and 1.
    """
    if not 0 < threshold < 1:
        raise FeatpatchError(
            f"threshold={threshold}: expected more than 0 and less than 1, the share of the behaviour from which an effect "
            "counts, e.g. 0.1"
        )


def named(recovery: NDArray[np.float64], degradation: NDArray[np.float64], threshold: float = THRESHOLD) -> list[str]:
    """The quadrant of each row from both intervals, `[rows, 2]` each; NaN where there is none."""
    both = zip(_sizes(recovery, threshold), _sizes(degradation, threshold), strict=True)
    return [UNDECIDED if UNDECIDED in sizes else NAMES.get(sizes, "opposing") for sizes in both]


def _sizes(interval: NDArray[np.float64], threshold: float) -> list[str]:
    """How large each effect is: high, low, opposing or undecided."""
    low, high = interval.T
    cases = {"high": low > threshold, "low": (low > -threshold) & (high < threshold), "opposing": high < -threshold}
    found: list[str] = np.select(list(cases.values()), list(cases), UNDECIDED).tolist()
    return found
