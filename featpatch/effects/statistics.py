"""Pooled effects, their uncertainty and related statistics.

Over many pairs the effect is the ratio of means, mean change over mean gap, with a bootstrap interval over pairs
(Efron & Tibshirani 1993, from scipy; percentiles expanded for few pairs, Hesterberg 2015). The ratio of a single pair is
computed only if its gap is not near zero.
"""

import warnings
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, bootstrap, norm, t

from featpatch.errors import FeatpatchError

NEAR_ZERO = 1e-3
"""A mean gap below this share of the metric's size is refused, and a pair with such a gap has no ratio of its own."""

RESAMPLES = 999
SEED = 0
CONFIDENCE = 0.95
CHUNK = 256

_one_at_a_time = Lock()
"""Held while warnings are silenced, because that affects all threads: two overlapping uses would leave them silenced."""


def size(clean: NDArray[np.float64], corrupted: NDArray[np.float64]) -> float:
    """Return the size of the metric: the mean of its absolute values in the clean or corrupted runs, the larger one."""
    return float(max(np.abs(clean).mean(), np.abs(corrupted).mean()))


def with_gap(clean: NDArray[np.float64], corrupted: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return a mask of the pairs whose gap is large enough for a ratio, `[pairs]`."""
    result: NDArray[np.bool_] = np.abs(clean - corrupted) > NEAR_ZERO * size(clean, corrupted)
    return result


def check_gap(metric: str, clean: NDArray[np.float64], corrupted: NDArray[np.float64]) -> None:
    """Check that the mean gap is large enough for a ratio.

    Raises:
        FeatpatchError: the mean of `clean - corrupted` is near zero.
    """
    gap = float(np.mean(clean - corrupted))
    if abs(gap) <= NEAR_ZERO * size(clean, corrupted):
        raise FeatpatchError(
            f"{metric} is {clean.mean():.6g} on clean and {corrupted.mean():.6g} on corrupted prompts, a mean gap of "
            f"{gap:.3g}: expected a gap that a recovery can be a share of; choose corruptions that change the answer"
        )


def ratio_of_means(change: NDArray[np.float64], gap: NDArray[np.float64], axis: int = -1) -> NDArray[np.float64]:
    """Return the mean change over the mean gap along the axis of the pairs."""
    result: NDArray[np.float64] = change.mean(axis) / gap.mean(axis)
    return result


def expanded(pairs: int) -> float:
    """Return the confidence level to pass to the percentile bootstrap for a 95 % interval over this many pairs.

    The percentile interval of few pairs is too narrow. Hesterberg's expanded percentile interval corrects this as Student's t
    does for the normal distribution: tail alpha' = Phi(-sqrt(n / (n - 1)) t_{1 - alpha/2, n - 1}) (2015, The American
    Statistician 69:371).
    """
    tail = norm.cdf(-np.sqrt(pairs / (pairs - 1)) * t.ppf((1 + CONFIDENCE) / 2, pairs - 1))
    return float(1 - 2 * tail)


def interval(change: NDArray[np.float64], gap: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the 95 % bootstrap interval of the ratio of means; NaN with a single pair or if values are missing.

    With fewer than 5 pairs it extends at most from one extreme pair to the other, which covers less than 95 %: 75 % with 3.

    Args:
        change: the changes, `[rows, pairs]`.
        gap: the gaps, `[pairs]`, or `[rows, pairs]` if the rows are about different pairs.

    Returns:
        The lower and upper end of each row's interval, `[rows, 2]`.
    """
    rows, pairs = change.shape
    result, known = np.full((rows, 2), np.nan), np.flatnonzero(~np.isnan(change).any(axis=1))
    if pairs < 2:
        return result
    for some in (known[start : start + CHUNK] for start in range(0, len(known), CHUNK)):
        part = change[some]
        part_gap = np.broadcast_to(gap if gap.ndim == 1 else gap[some], part.shape)
        with _one_at_a_time, np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", DegenerateDataWarning)  # a resample may hold only gaps that cancel, which gives NaN
            found = bootstrap(
                (part, part_gap),
                ratio_of_means,
                paired=True,
                vectorized=True,
                axis=-1,
                n_resamples=RESAMPLES,
                confidence_level=expanded(pairs),
                method="percentile",
                rng=np.random.default_rng(SEED),
            )
        result[some] = np.stack([found.confidence_interval.low, found.confidence_interval.high], -1)
    return result
