"""Curves of edges, bent so that edges do not pass through other nodes and their middles can be pointed at one by one."""

from collections.abc import Sequence

import numpy as np

Point = tuple[float, float]

BENDS = (0.0, 0.35, -0.35, 0.7, -0.7, 1.05, -1.05, 1.4, -1.4)
"""Candidate distances of the middle of a curve from the straight line. The chosen one comes near the fewest middles of other
edges and, among those, the fewest nodes; the first of several equal ones."""

NEAR_NODE, NEAR_MIDDLE = 0.3, 0.15
"""The distances below which a curve counts as near a node, and its middle as near the middle of another edge."""

ALONG = np.linspace(0.08, 0.92, 25)[:, None]


def middles(edges: Sequence[tuple[int, int]], points: Sequence[Point]) -> list[Point]:
    """Return the middle point of the curve of each edge.

    Args:
        edges: the indices of the start and end point of each edge.
        points: the coordinates of the nodes.
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
    """Return points on the parabola through a start, a middle and an end."""
    control = 2 * middle - (start + end) / 2
    return (1 - ALONG) ** 2 * start + 2 * ALONG * (1 - ALONG) * control + ALONG**2 * end


def _close(curve: np.ndarray, points: np.ndarray, near: float) -> int:
    """Count the points that are closer to a curve than `near`."""
    distances = np.linalg.norm(curve[:, None] - points[None], axis=-1)
    return int((distances.min(axis=0) < near).sum())
