"""Sign flips as a product of matrices, beside scipy's permutation test: python benchmarks/significance.py."""

import time

import numpy as np
from scipy.stats import permutation_test

from featpatch.effects.significance import FLIPS, sign_flip

ROWS, PAIRS = 200, 32


def main() -> None:
    """The same question for the rows of a table; CPU seconds of both."""
    change = np.random.default_rng(0).normal(size=(ROWS, PAIRS))
    start = time.process_time()
    ours = sign_flip(change)
    between = time.process_time()
    theirs = permutation_test(
        (change,), lambda x, axis: x.sum(axis=axis), permutation_type="samples", n_resamples=FLIPS, vectorized=True, axis=1,
        rng=np.random.default_rng(1),
    ).pvalue  # fmt: skip
    scipy = time.process_time() - between
    assert np.abs(ours - theirs).max() < 0.05
    print(f"about {scipy / (between - start):.0f} x faster")


if __name__ == "__main__":
    main()
