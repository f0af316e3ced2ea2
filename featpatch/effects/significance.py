"""Significance of effects: sign-flip tests over pairs, and the control of false discoveries among all rows.

The null hypothesis for a row is that the change in a pair is symmetric around 0, so that its sign is random. With random signs
s,

    p = share of the draws with |sum_p s_p change_p| >= |sum_p change_p|

(Fisher 1935; as scipy.stats.permutation_test with one sample and permutation_type="samples", but as a product of matrices,
<!-- claim 2x: python benchmarks/significance.py -->about 41 x faster<!-- /claim -->).
q-values are Benjamini & Hochberg's (1995), from scipy.
"""

from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.stats import false_discovery_control

FLIPS = 9_999
MORE_FLIPS = 99_999
"""Random draws for the rows of which fewer than `RARE` of the first draws gave a sum as large as the observed one."""

TESTABLE = 0.05
"""Rows whose smallest possible p-value is larger than this get no q-value."""

RARE = 10
SEED = 0
CHUNK = 256
DRAWS = 10_000
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
