"""The statistics of effects: pooled effects with intervals, significance, and quadrants.

**Effects.** Over many pairs the effect is the ratio of means, mean change over mean gap, with a bootstrap interval over pairs
(Efron & Tibshirani 1993; as scipy.stats.bootstrap with paired=True and method="percentile", and with the same resamples, but as
a product of matrices; percentiles expanded for few pairs, Hesterberg 2015). The ratio of a single pair is computed only if its
gap is not near zero.

**Significance.** Sign-flip tests over pairs, and the control of false discoveries among all rows.

The null hypothesis for a row is that the change in a pair is symmetric around 0, so that its sign is random. With random signs
s,

    p = share of the draws with |sum_p s_p change_p| >= |sum_p change_p|

(Fisher 1935; as scipy.stats.permutation_test with one sample and permutation_type="samples", but as a product of matrices,
<!-- claim 2x: OPENBLAS_NUM_THREADS=1 python benchmarks/significance.py -->about 36 x faster<!-- /claim -->).
q-values are Benjamini & Hochberg's (1995), from scipy.

**Quadrants.** Labels that say in which directions a node has an effect, based on the intervals of both effects.

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
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import false_discovery_control, norm, spearmanr, t

from featpatch.errors import FeatpatchError, is_number

RESAMPLES = 999
"""The number of bootstrap resamples."""

SEED = 0
"""The seed of all resamples and random signs, so that the same table always has the same statistics."""

CONFIDENCE = 0.95
"""The confidence level of intervals."""

CHUNK = 256
"""The number of rows whose resamples or sums are in memory at a time."""


def expanded(pairs: int) -> float:
    """Return the confidence level of the percentile interval that is a 95 % interval over this many pairs.

    The percentile interval of few pairs is too narrow. Hesterberg's expanded percentile interval corrects this as Student's t
    does for the normal distribution: tail alpha' = Phi(-sqrt(n / (n - 1)) t_{1 - alpha/2, n - 1}) (2015, The American
    Statistician 69:371).
    """
    tail = norm.cdf(-np.sqrt(pairs / (pairs - 1)) * t.ppf((1 + CONFIDENCE) / 2, pairs - 1))
    return float(1 - 2 * tail)


def spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the rank correlation of two columns; NaN for fewer than 2 rows, or if one of them is constant."""
    return float(spearmanr(one, other).statistic) if len(one) > 1 and np.ptp(one) and np.ptp(other) else float("nan")


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
    if pairs < 2 or not len(known):
        return result
    drawn = np.random.default_rng(SEED).integers(0, pairs, (RESAMPLES, pairs))
    cells = np.bincount((drawn * RESAMPLES + np.arange(RESAMPLES)[:, None]).ravel(), minlength=pairs * RESAMPLES)
    times = cells.reshape(pairs, RESAMPLES).astype(np.float64)
    tail = (1 - expanded(pairs)) / 2
    with np.errstate(divide="ignore", invalid="ignore"):  # a resample may hold only gaps that cancel, which gives NaN
        gaps = _resampled(gap[None], drawn, times) if gap.ndim == 1 else None
        for some in (known[start : start + CHUNK] for start in range(0, len(known), CHUNK)):
            ratios = _resampled(change[some], drawn, times)
            ratios /= _resampled(gap[some], drawn, times) if gaps is None else gaps
            result[some] = _quantiles(ratios, np.array([tail, 1 - tail]))
    return result


def _resampled(values: NDArray[np.float64], drawn: NDArray[np.int64], times: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of each row over each resample of the pairs, `[rows, resamples]`.

    The product skips the pairs in which a row is 0, and the result of a row does not depend on the other rows.

    Args:
        values: one value per row and pair, `[rows, pairs]`.
        drawn: the pairs of each resample, `[resamples, pairs]`.
        times: how often each pair is in each resample, `[pairs, resamples]`.
    """
    sums: NDArray[np.float64] = csr_array(values) @ times
    infinite = np.isinf(values).any(axis=1)
    sums[infinite] = values[infinite][:, drawn].sum(axis=-1)  # in the product, infinity times 0 would be NaN
    sums /= values.shape[1]
    return sums


def _quantiles(values: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return these quantiles of each row, interpolated linearly, `[rows, shares]`; NaN if a value of the row is missing.

    The values are sorted in place.
    """
    values.sort(axis=1)
    count = values.shape[1]
    rank = shares * count + (1 - shares)
    below = np.floor(rank).astype(np.int64) - 1
    part, above = rank % 1, np.minimum(below + 1, count - 1)
    ends: NDArray[np.float64] = (1 - part) * values[:, below] + part * values[:, above]
    ends[np.isnan(values[:, -1])] = np.nan
    return ends


FLIPS = 9_999
"""The number of random draws of signs for every row."""

MORE_FLIPS, RARE = 99_999, 10
"""The number of draws for rows of which fewer than `RARE` of the first draws gave a sum as large as the observed one."""

DRAWS = 10_000
"""The number of draws that are in memory at a time."""

TESTABLE = 0.05
"""Rows whose smallest possible p-value is larger than this get no q-value."""

ROUNDING = 1e-12
"""Sums that differ by less than this share of the row's absolute changes count as equal, because they can be sums of the same
terms in another order."""


def sign_flip(change: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return two-sided p-values of the mean change of every row, `[rows]`; NaN with a single pair or if values are missing.

    With up to 13 pairs the test is exact over all 2^n signs, and the smallest possible p is 2^(1-n): 8 pairs can't get below
    0.008. With more pairs the signs are drawn with a fixed seed, and p = (draws as large + 1) / (draws + 1) is never below
    1e-5. Rows with a small p are drawn again, more often, and only the second p is kept; p stays valid, P(p <= t) <= t under
    the null hypothesis.

    Args:
        change: the changes, `[rows, pairs]`; pairs that do not change have 0 and do not affect the p-value.
    """
    rows, pairs = change.shape
    if pairs < 2:
        return np.full(rows, np.nan)
    if 2**pairs <= FLIPS:
        every = np.array(list(product((1.0, -1.0), repeat=pairs)))
        p = _as_large(change, every) / len(every)
    else:
        p = (_as_large_of(change, FLIPS, SEED) + 1) / (FLIPS + 1)
        rare = p * (FLIPS + 1) <= RARE
        p[rare] = (_as_large_of(change[rare], MORE_FLIPS, SEED + 1) + 1) / (MORE_FLIPS + 1)
    p[np.isnan(change).any(axis=1)] = np.nan
    return p


def smallest(changed: NDArray[np.int64], pairs: int) -> NDArray[np.float64]:
    """Return the smallest possible p-value of `sign_flip`, given the number of changed pairs, `[rows]`; NaN with one pair.

    It is 2^(1 - changed), since a pair without a change has no sign to flip. Where signs are drawn at random, it is approximate
    and at least 1e-5.
    """
    least = 0.0 if 2**pairs <= FLIPS else 1 / (MORE_FLIPS + 1)
    return np.clip(2.0 ** (1.0 - changed), least, 1.0) if pairs > 1 else np.full(len(changed), np.nan)


def false_discovery(p: NDArray[np.float64], tests: int) -> NDArray[np.float64]:
    """Return Benjamini-Hochberg q-values, `[rows]`.

    The q-value of a row is the expected share of false discoveries if all rows with a p-value up to this one are accepted.

    Args:
        p: the p-values, `[rows]`; rows with NaN are not tested and stay NaN.
        tests: the number of tests that were made; those whose p-value is not given count with p = 1.
    """
    q, tested = np.full(len(p), np.nan), ~np.isnan(p)
    if tested.any():
        given = int(tested.sum())
        q[tested] = np.minimum(false_discovery_control(p[tested]) * ((given + max(tests - len(p), 0)) / given), 1)
    return q


def _as_large_of(change: NDArray[np.float64], draws: int, seed: int) -> NDArray[np.int64]:
    """Return `_as_large` for `draws` rows of random signs, of which at most `DRAWS` are in memory at a time."""
    rng, result = np.random.default_rng(seed), np.zeros(len(change), dtype=np.int64)
    for start in range(0, draws if len(change) else 0, DRAWS):
        signs = rng.choice(np.array([-1.0, 1.0]), (min(DRAWS, draws - start), change.shape[1]))
        result += _as_large(change, signs)
    return result


def _as_large(change: NDArray[np.float64], signs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Count for how many of the signs `[draws, pairs]` the absolute sum of a row is at least the observed one, `[rows]`."""
    least = np.abs(change.sum(axis=1)) - ROUNDING * np.abs(change).sum(axis=1)
    counts = [
        np.count_nonzero(np.abs(change[start : start + CHUNK] @ signs.T) >= least[start : start + CHUNK, None], axis=1)
        for start in range(0, len(change), CHUNK)
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *counts])


THRESHOLD = 0.01
"""The default threshold: a share of the effect of the whole activation at the hook point."""

LEAST = 0.01
"""The smallest effect of a whole activation, as a share of the behaviour, from which thresholds are computed."""

UNDECIDED = "undecided"
QUADRANTS = {
    ("above", "above"): "both directions",
    ("above", "within"): "denoising only",
    ("within", "above"): "noising only",
    ("within", "within"): "below threshold",
}


def check_threshold(threshold: float) -> None:
    """Raise a FeatpatchError unless a threshold is a number between 0 and 1."""
    if not is_number(threshold) or not 0 < threshold < 1:
        raise FeatpatchError(
            f"threshold={threshold!r}: expected a number between 0 and 1, the fraction of the whole activation's effect above "
            f"which an effect counts, e.g. {THRESHOLD}"
        )


def bounds(threshold: float, carried: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the size above which the effect of a row counts, `[rows]`.

    Args:
        threshold: a share of what the whole activation carries.
        carried: the effect of the whole activation at the hook point, `[rows]`.
    """
    return threshold * np.maximum(np.abs(carried), LEAST)


def quadrant_labels(
    intervals: Sequence[NDArray[np.float64]], carried: Sequence[NDArray[np.float64]], threshold: float
) -> list[str]:
    """Return the quadrant label of each row.

    Args:
        intervals: of recovery and of degradation, `[rows, 2]` each; NaN where there is none.
        carried: recovery and degradation of the whole activation at the hook point, `[rows]` each.
        threshold: the share of these above which an effect counts.
    """
    shares = [bounds(threshold, whole) for whole in carried]
    sides = (_sides(interval, share) for interval, share in zip(intervals, shares, strict=True))
    return [UNDECIDED if UNDECIDED in both else QUADRANTS.get(both, "opposing") for both in zip(*sides, strict=True)]


def _sides(interval: NDArray[np.float64], threshold: NDArray[np.float64]) -> list[str]:
    """Return for each effect on which side of its threshold `[rows]` it is: above, within, below or undecided."""
    low, high = interval.T
    cases = {"above": low > threshold, "within": (low >= -threshold) & (high <= threshold), "below": high < -threshold}
    return np.select(list(cases.values()), list(cases), UNDECIDED).tolist()
