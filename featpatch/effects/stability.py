"""Split-half stability of a ranking: do two random halves of the pairs rank the features alike?

The rank correlation is Spearman's (1904), from scipy. Each of the two rankings uses half of the pairs; the ranking over all
pairs is more stable than that.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import spearmanr

from featpatch.errors import FeatpatchError, check_numbers

SPLITS = 100
TOP = 20
LEAST_PAIRS = 4


@dataclass(frozen=True, repr=False)
class Stability:
    """The agreement of two halves of the pairs on the ranking of the features.

    Attributes:
        correlation: Spearman's rank correlation between the halves, mean over the splits; 1 for the same order, 0 for unrelated
            rankings.
        low, high: the range that holds 95 % of the splits' correlations, which is not a confidence interval of the mean.
        overlap: the share of one half's `top` largest features that are also among the other's, mean over the splits; NaN if
            there are no more than `top` features, because it would not depend on the rankings.
        chance: the expected overlap of unrelated rankings, `top / features`.
        top: the number of largest features whose overlap is measured.
        features: the number of features that were ranked.
        pairs: the number of pairs.
        splits: the number of random splits.
    """

    correlation: float
    low: float
    high: float
    overlap: float
    chance: float
    top: int
    features: int
    pairs: int
    splits: int

    def __repr__(self) -> str:
        shared = f"the halves share {self.overlap:.0%} of their top {self.top}, {self.chance:.0%} by chance"
        if np.isnan(self.overlap):
            shared = f"sharing a top {self.top} of {self.features} features would mean nothing"
        return (
            f"rank correlation {self.correlation:.2f} [{self.low:.2f}, {self.high:.2f}] between random halves of "
            f"{self.pairs} pairs, {self.splits} splits; {shared}"
        )


def split_half(change: NDArray[np.float64], gap: NDArray[np.float64], splits: int, top: int, seed: int) -> Stability:
    """Split the pairs into random halves `splits` times and compare the rankings of features by pooled effect.

    The gap of a half is the same for all features and does not change their order, so only the sign of the total gap is used. A
    half in which all features have the same effect gives no order and counts as correlation 0.

    Args:
        change: the changes, `[features, pairs]`; features with missing values are left out.
        gap: the gaps, `[pairs]`.
        splits: the number of splits.
        top: the number of largest features whose overlap is measured.
        seed: the seed of the random splits.

    Raises:
        FeatpatchError: fewer than 4 pairs or 2 features with known values, or `splits` or `top` below 1.
    """
    change = change[~np.isnan(change).any(axis=1)] * np.sign(gap.sum())
    features, pairs = change.shape
    if pairs < LEAST_PAIRS:
        raise FeatpatchError(f"stability of {pairs} pairs: expected at least {LEAST_PAIRS}, two for each half; rank over more")
    if features < 2:
        raise FeatpatchError(
            f"stability of {features} features with known values: expected at least 2 that a ranking can order; choose an "
            "effect that was run, and more positions or SAEs"
        )
    check_numbers(1, splits=splits, top=top)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(pairs), (splits, 1)), axis=1)
    member = np.zeros((pairs, splits))
    np.put_along_axis(member, order[:, : pairs // 2].T, 1, axis=0)
    one, other = change @ member, change @ (1 - member)  # [features, splits]
    correlations = [_spearman(a, b) for a, b in zip(one.T, other.T, strict=True)]
    low, high = np.quantile(correlations, [0.025, 0.975])
    overlap = np.nan
    if features > top:
        first = [np.argsort(-half, axis=0, kind="stable")[:top] for half in (one, other)]
        overlap = float(np.mean([len(np.intersect1d(a, b)) / top for a, b in zip(first[0].T, first[1].T, strict=True)]))
    return Stability(
        correlation=float(np.mean(correlations)),
        low=float(low),
        high=float(high),
        overlap=overlap,
        chance=min(top / features, 1.0),
        top=top,
        features=features,
        pairs=pairs,
        splits=splits,
    )


def _spearman(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return the rank correlation, or 0 if one side is constant."""
    return float(spearmanr(one, other).statistic) if np.ptp(one) and np.ptp(other) else 0.0
