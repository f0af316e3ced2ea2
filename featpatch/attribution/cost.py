"""Predict how long gradient estimates take."""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from featpatch.attribution.estimation import by_pair
from featpatch.attribution.features import FeaturePart
from featpatch.attribution.gradients import Gradients
from featpatch.errors import FeatpatchError
from featpatch.lens import dictionaries, wrap
from featpatch.metrics import Metric
from featpatch.pairs import Pairs
from featpatch.pairs.spans import Positions, spans
from featpatch.patch import Direction


def estimation_time(
    model: Any, saes: Any, pairs: Pairs, positions: Positions, directions: Sequence[Direction], metric: str | Metric
) -> float | None:
    """Return the seconds that `estimate_features` will take, extrapolated from one pair after a warm-up.

    The result is None if the metric has no gradient or a gradient of zero.
    """
    parts = [FeaturePart(dictionary) for dictionary in dictionaries(wrap(model), saes)]
    seconds = 0.0
    try:
        for _ in ("warm-up", "timed"):
            start = time.perf_counter()
            gradients = Gradients(model, pairs[:1], metric=metric, keep=False)
            ways = gradients.check_directions(directions)
            deque(by_pair(gradients, parts, [spans(pairs[0], positions)], ways), maxlen=0)
            seconds = time.perf_counter() - start
    except FeatpatchError:
        return None
    return seconds * len(pairs)
