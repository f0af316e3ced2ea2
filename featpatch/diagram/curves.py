"""Where edges bend, so that they pass beside other nodes and not through them, and can be pointed at one by one."""

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]

BENDS = (0.0, 0.35, -0.35, 0.7, -0.7, 1.05, -1.05, 1.4, -1.4)
"""How far the middle of a curve may be aside of the straight line. The first is taken that meets the fewest other middles,
and of those the fewest nodes."""

NEAR_NODE, NEAR_MIDDLE = 0.3, 0.15
"""How close a curve comes to a node that it meets, and its middle to that of another edge."""

ALONG = np.linspace(0.08, 0.92, 25)[:, None]


def middles(edges: Sequence[tuple[int, int]], points: Sequence[Point]) -> list[Point]:
    """The middle of the curve of each edge.

    Args:
        edges: the numbers of the two points of each.
    """
    chosen: list[Point] = []
    for source, target in edges:
        start, end = np.array(points[source]), np.array(points[target])
        others = np.array([point for n, point in enumerate(points) if n not in (source, target)]).reshape(-1, 2)
        taken = np.array(chosen).reshape(-1, 2)
        aside = np.array([0.0, 1.0]) if start[1] == end[1] else np.array([1.0, 0.0])
        tried = [(start + end) / 2 + bend * aside for bend in BENDS]
        met = [
            (_close(middle[None], taken, NEAR_MIDDLE), _close(_curve(start, middle, end), others, NEAR_NODE))
            for middle in tried
        ]
        best = tried[met.index(min(met))]
        chosen.append((float(best[0]), float(best[1])))
    return chosen


def _curve(start: np.ndarray, middle: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Points on the parabola through the three."""
    control = 2 * middle - (start + end) / 2
    return (1 - ALONG) ** 2 * start + 2 * ALONG * (1 - ALONG) * control + ALONG**2 * end


def _close(curve: np.ndarray, points: np.ndarray, near: float) -> int:
    """How many of the points a curve comes near to."""
    distances = np.linalg.norm(curve[:, None] - points[None], axis=-1)
    return int((distances.min(axis=0) < near).sum())
