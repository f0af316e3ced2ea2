"""Bounds on what a screened ranking missed, from a random sample of the features that estimates ranked last.

The k features with the largest estimates are run, and n of the other m are drawn at random and run too. Of those n, x exceed a
threshold that does not depend on the draw. Let M be the number of all m that exceed it. M is at most the largest value under
which x or fewer would still be drawn with a probability above 1 - confidence (one-sided and exact: Clopper & Pearson 1934, here
hypergeometric, for a finite population). If the sample was enlarged until a target was met, each interim analysis has an equal
share of 1 - confidence (Bonferroni). A random sample says little about rare features: to prove that none of 1000 exceeds the
threshold, nearly all of them must be run.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from featpatch.errors import FeatpatchError, is_integer, is_number

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Audit:
    """Bounds on what a screened ranking missed, each one-sided at the same confidence.

    Attributes:
        top: the number of largest features that the bounds are about: the `top` largest |effects| of all candidates.
        confidence: the confidence of each bound.
        candidates: the number of features that could be run.
        screened: the number of features that were run because of their estimates.
        sampled: the number of other features that were drawn at random and run.
        threshold: the smallest |effect| of the `top` largest among the screened features.
        beyond: the number of sampled features whose |effect| exceeds the threshold (these are found, not missed).
        missed: the largest possible number of features that were not run whose |effect| exceeds the threshold.
        estimate, recall: the share of the true `top` that was run: estimated from the sample, and its lower bound.
        share, size: at most this share of the features that estimates ranked last has an |effect| above `size`, which is
            infinite if the sample is too small to say.
    """

    top: int
    confidence: float
    candidates: int
    screened: int
    sampled: int
    threshold: float
    beyond: int
    missed: int
    estimate: float
    recall: float
    share: float
    size: float

    @property
    def complete(self) -> bool:
        """Whether all candidates were run, so that nothing can be missed and no confidence is needed."""
        return self.screened + self.sampled == self.candidates

    def __repr__(self) -> str:
        if self.complete:
            return f"All {self.candidates} candidates were patched: none was missed, and the top {self.top} are exact"
        rest = self.candidates - self.screened
        size = f"at most {self.share:.0%} of the other {rest} have an |effect| above {self.size:.3g}"
        if not np.isfinite(self.size):
            size = f"the sample is too small to bound the effects of {1 - self.share:.0%} of the other {rest}"
        return (
            f"{self.screened} of {self.candidates} candidates were patched because of their estimates, and {self.sampled} of "
            f"the other {rest} at random. With {self.confidence:.0%} confidence each: at least {self.recall:.0%} (estimate "
            f"{self.estimate:.0%}) of the true top {self.top} were patched: at most {self.missed} others have an |effect| "
            f"above {self.threshold:.3g}, as {self.beyond} of the sample did; {size}"
        )


def audited(
    screened: Array, sampled: Array, candidates: int, *, top: int, confidence: float, share: float, looks: int
) -> Audit:
    """Compute the bounds of an `Audit`.

    Args:
        screened, sampled: |effects| of the screened features, `[k]`, and of the sampled features, `[n]`.
        candidates: the number of features that could be run.
        top, confidence, share: the attributes of `Audit`.
        looks: the number of sample sizes at which sampling could have stopped.

    Raises:
        FeatpatchError: `top` exceeds the number of screened features, or `confidence` or `share` is not between 0 and 1.
    """
    shares = all(is_number(value) and 0 < value < 1 for value in (confidence, share))
    if not is_integer(top) or not 1 <= top <= len(screened) or not shares:
        raise FeatpatchError(
            f"top={top!r}, confidence={confidence!r}, share={share!r}: expected top from 1 to {len(screened)}, the number of "
            "screened features, and confidence and share between 0 and 1"
        )
    alpha, rest = (1 - confidence) / looks, candidates - len(screened)
    threshold = float(np.sort(screened)[-top])
    beyond = int((sampled > threshold).sum())
    missed = most(rest, len(sampled), beyond, alpha) - beyond
    expected = beyond * (rest - len(sampled)) / max(1, len(sampled))
    return Audit(
        top=top,
        confidence=confidence,
        candidates=candidates,
        screened=len(screened),
        sampled=len(sampled),
        threshold=threshold,
        beyond=beyond,
        missed=missed,
        estimate=max(0.0, 1 - expected / top),
        recall=max(0.0, 1 - missed / top),
        share=share,
        size=_exceeded(sampled, rest, int(share * rest), alpha),
    )


def most(population: int, drawn: int, found: int, alpha: float) -> int:
    """Return an upper confidence bound on the number of marked members of a population.

    It is the largest number under which a draw of `drawn` members holds `found` or fewer marked ones with a probability above
    `alpha`.
    """
    if drawn == population:
        return found
    marked = range(found, population - drawn + found + 1)
    return marked[bisect_left(marked, True, key=lambda m: bool(hypergeom.cdf(found, population, m, drawn) <= alpha)) - 1]


def provable(rest: int, drawn: int, *, top: int, confidence: float, looks: int) -> float:
    """Return the largest recall of the true `top` that a sample of `drawn` out of `rest` features can prove.

    It is reached if no sampled feature exceeds the threshold.
    """
    return max(0.0, 1 - most(rest, drawn, 0, (1 - confidence) / looks) / top)


def needed(rest: int, recall: float, *, top: int, confidence: float, looks: int) -> int:
    """Return the size of the smallest sample out of `rest` features that can prove this recall; see `provable`."""

    def proves(drawn: int) -> bool:
        return provable(rest, drawn, top=top, confidence=confidence, looks=looks) >= recall

    return bisect_left(range(rest), True, key=proves)


def without_estimates(screening: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a screening without its estimates, for a table to which these do not apply.

    Estimates are those of one metric over all pairs.
    """
    return {name: value for name, value in screening.items() if name != "estimates"}


def sample_sizes(first: int, rest: int) -> list[int]:
    """Return the sample sizes at which sampling may stop: `first`, then doubled each time up to all of `rest`."""
    sizes = [min(first, rest)]
    while sizes[-1] < rest:
        sizes.append(min(2 * sizes[-1], rest))
    return sizes


def _exceeded(sampled: Array, rest: int, most_above: int, alpha: float) -> float:
    """Return the smallest sampled value that at most `most_above` of the `rest` features exceed, with confidence 1 - alpha.

    It is infinite if the sample is too small to prove this for any value.
    """
    if not rest:
        return 0.0
    above = np.arange(len(sampled))
    proven = np.flatnonzero(hypergeom.cdf(above, rest, most_above + 1, len(sampled)) <= alpha) if most_above < rest else above
    return float(np.sort(sampled)[::-1][proven[-1]]) if len(proven) else float("inf")
