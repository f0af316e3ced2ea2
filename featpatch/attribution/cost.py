"""How long estimates take, before they are made."""

import time
from collections.abc import Sequence
from typing import Any

from featpatch.attribution.features import FeaturePart
from featpatch.attribution.gradients import Gradients
from featpatch.errors import FeatpatchError
from featpatch.lens import dictionaries, wrap
from featpatch.metrics import Metric
from featpatch.pairs import Pairs
from featpatch.pairs.spans import Positions, spans
from featpatch.patch import Direction

PAIRS = 4
"""Of so many the time is taken."""


def estimation_time(
    model: Any, saes: Any, pairs: Pairs, positions: Positions, directions: Sequence[Direction], metric: str | Metric
) -> float | None:
    """Seconds that `estimate_features` will take, from a few pairs, run once to warm up and once to measure.

    None for a metric that has no gradient.
    """
    parts = [FeaturePart(dictionary) for dictionary in dictionaries(wrap(model), saes)]
    some, seconds = pairs[:PAIRS], 0.0
    try:
        for _ in range(2):
            start = time.perf_counter()
            gradients = Gradients(model, some, metric=metric, keep=False)
            reads, sites = [hook for part in parts for hook in part.reads], [hook for part in parts for hook in part.sites]
            for of_pair in gradients.of(reads, sites):
                for part in parts:
                    for way in directions:
                        part.found(of_pair, way, spans(of_pair.pair, positions))
            seconds = time.perf_counter() - start
    except FeatpatchError:
        return None
    return seconds * len(pairs) / len(some)
