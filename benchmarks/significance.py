"""Sign flips as a matrix product against scipy's permutation test: OPENBLAS_NUM_THREADS=1 python benchmarks/significance.py."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.stats import permutation_test

from featpatch.effects.statistics import FLIPS, sign_flip

ROWS, PAIRS = 200, 32


def main() -> None:
    """Compute the p-values of the rows of a table in both ways, and print the CPU seconds, the best of three runs each."""
    change = np.random.default_rng(0).normal(size=(ROWS, PAIRS))
    ours, own_seconds = best(lambda: sign_flip(change))
    theirs, scipy_seconds = best(
        lambda: permutation_test(
            (change,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=FLIPS, vectorized=True, axis=1,
            rng=np.random.default_rng(1),
        ).pvalue
    )  # fmt: skip
    assert np.abs(ours - theirs).max() < 0.05
    print(f"about {scipy_seconds / own_seconds:.0f} x faster")


def best(run: Callable[[], Any]) -> tuple[Any, float]:
    """Return the result of a call, and the CPU seconds of the fastest run."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        found = run()
        seconds.append(time.process_time() - start)
    return found, min(seconds)


if __name__ == "__main__":
    main()
