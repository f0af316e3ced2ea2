"""What was missed where only some features were run: from a random sample of those that estimates put last.

The k features with the largest estimates are run, and n of the other m are drawn at random and run too. Of those n, x lie
beyond a threshold that does not depend on the draw; so the number M of all m that do is at most the largest one under which x
or fewer would still be drawn with a probability above 1 - confidence (one-sided and exact: Clopper & Pearson 1934, here
hypergeometric, for a finite population). Where the sample was enlarged until a target was met, each look has its share of
1 - confidence (Bonferroni). A random sample says little about the rarest: to prove that none of 1000 is beyond, nearly all of
them must be run.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import hypergeom

from featpatch.errors import FeatpatchError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Audit:
    """Bounds on what a screened ranking missed, each one-sided at the same confidence.

    Attributes:
        top: the ranking that is asked about: the `top` largest |effects| of all candidates.
        confidence: of each bound.
        candidates: features that could be run.
        screened: how many were run for their estimates.
        sampled: how many of the others were run, drawn at random.
        threshold: the smallest |effect| of the `top` largest among the screened ones.
        beyond: how many of the sampled ones lie beyond it (these are found, not missed).
        missed: how many of those that were not run lie beyond it, at most.
        estimate, recall: share of the true `top` that is among what was run, as the sample has it, and at least.
        share, size: at most this share of those that estimates put last has an |effect| above `size`; infinite where the
            sample is too small to say.
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

    def __repr__(self) -> str:
        rest = self.candidates - self.screened
        size = f"at most {self.share:.0%} of the {rest} have one above {self.size:.3g}"
        if not np.isfinite(self.size):
            size = f"the sample is too small to say what {self.share:.0%} of the {rest} exceed"
        return (
            f"{self.screened} of {self.candidates} candidates were run for their estimates, {self.sampled} of the other {rest} "
            f"at random. With {self.confidence:.0%} confidence each: at least {self.recall:.0%} (estimate {self.estimate:.0%}) "
            f"of the true top {self.top} were run: at most {self.missed} others have an |effect| above {self.threshold:.3g}, "
            f"which {self.beyond} of the sample had; {size}"
        )


def audited(
    screened: Array, sampled: Array, candidates: int, *, top: int, confidence: float, share: float, looks: int
) -> Audit:
    """The bounds from |effects| of the screened and of the sampled features, `[k]` and `[n]`.

    Args:
        looks: at how many sample sizes it could have been decided to stop.

    Raises:
        FeatpatchError: a ranking longer than what was screened; confidence or share not between 0 and 1.
    """
    shares = all(isinstance(value, float) and 0 < value < 1 for value in (confidence, share))
    if type(top) is not int or not 1 <= top <= len(screened) or not shares:
        raise FeatpatchError(
            f"top={top!r}, confidence={confidence!r}, share={share!r}: expected a top of 1 to {len(screened)}, the number of "
            "screened features, and shares between 0 and 1"
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
    """The largest number of marked ones in a population of which `found` or fewer are drawn with a probability above alpha."""
    if drawn == population:
        return found
    marked = range(found, population - drawn + found + 1)
    return marked[bisect_left(marked, True, key=lambda m: bool(hypergeom.cdf(found, population, m, drawn) <= alpha)) - 1]


def provable(rest: int, drawn: int, *, top: int, confidence: float, looks: int) -> float:
    """The largest recall of the true `top` that a sample of `drawn` of `rest` can prove: with none beyond the threshold."""
    return max(0.0, 1 - most(rest, drawn, 0, (1 - confidence) / looks) / top)


def needed(rest: int, recall: float, *, top: int, confidence: float, looks: int) -> int:
    """The size of the smallest sample of `rest` that can prove this recall; see `provable`."""

    def proves(drawn: int) -> bool:
        return provable(rest, drawn, top=top, confidence=confidence, looks=looks) >= recall

    return bisect_left(range(rest), True, key=proves)


def without_estimates(screening: Mapping[str, Any]) -> dict[str, Any]:
    """What is noted of a screening, for a table of another metric or of some pairs, which the estimates are not of."""
    return {name: value for name, value in screening.items() if name != "estimates"}


def sample_sizes(first: int, rest: int) -> list[int]:
    """The sample sizes at which it is decided whether to go on: twice as many each time, all in the end."""
    sizes = [min(first, rest)]
    while sizes[-1] < rest:
        sizes.append(min(2 * sizes[-1], rest))
    return sizes


def _exceeded(sampled: Array, rest: int, most_above: int, alpha: float) -> float:
    """The smallest sampled value that, at the confidence, no more than `most_above` of the population exceed."""
    if not rest:
        return 0.0
    above = np.arange(len(sampled))
    proven = np.flatnonzero(hypergeom.cdf(above, rest, most_above + 1, len(sampled)) <= alpha) if most_above < rest else above
    return float(np.sort(sampled)[::-1][proven[-1]]) if len(proven) else float("inf")
