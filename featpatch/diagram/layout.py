"""The layout of nodes: a row for each hook point from bottom to top, a column for each position, side by side in a cell."""

from collections import defaultdict
from dataclasses import dataclass

from featpatch.diagram.naming import height, is_end, row
from featpatch.patch import Node, Position

Cell = tuple[Position, int]
"""A position and a row, which several nodes may share."""


@dataclass(frozen=True)
class Layout:
    """The coordinates of the nodes of a graph; one horizontal unit is the width of one node.

    Attributes:
        x: the horizontal coordinate of each node; embedding and logits at "all" positions are centred over all columns.
        y: the row of each node, counted from 0, the lowest.
        rows: the names of the rows.
        columns: the middle and the name of each column.
        borders: the borders between columns, including the left and the right edge.
        bands: the lowest and the highest row of every other layer.
    """

    x: list[float]
    y: list[int]
    rows: list[str]
    columns: list[tuple[float, str]]
    borders: list[float]
    bands: list[tuple[int, int]]


def layout(nodes: tuple[Node, ...]) -> Layout:
    """Lay out nodes, with columns for token indices in ascending order and then for labels in order of appearance."""
    heights = sorted({height(node) for node in nodes})
    y = [heights.index(height(node)) for node in nodes]
    names = {height(node): row(node) for node in nodes}
    spread = [is_end(node) and node.position == "all" for node in nodes]
    cells: dict[Cell, list[int]] = defaultdict(list)
    for n, node in enumerate(nodes):
        cells[("all" if spread[n] else node.position), y[n]].append(n)
    positions = _ordered([node.position for node, everywhere in zip(nodes, spread, strict=True) if not everywhere])
    borders, columns = [0.0], []
    for position in positions:
        wide = max(len(members) for (other, _), members in cells.items() if other == position)
        columns.append((borders[-1] + wide / 2, str(position)))
        borders.append(borders[-1] + wide)
    middles = {position: middle for position, (middle, _) in zip(positions, columns, strict=True)}
    x = [0.0] * len(nodes)
    for (position, _), members in cells.items():
        middle = borders[-1] / 2 if spread[members[0]] else middles[position]
        for place, n in enumerate(members):
            x[n] = middle + place - (len(members) - 1) / 2
    return Layout(x, y, [names[level] for level in heights], columns, borders, _bands([level for level, _, _ in heights]))


def _bands(layers: list[float]) -> list[tuple[int, int]]:
    """Return the first and the last row of every other layer, given the layer of each row."""
    blocks = [layer for layer in dict.fromkeys(layers) if 0 <= layer < float("inf")]
    return [(layers.index(layer), layers.index(layer) + layers.count(layer) - 1) for layer in blocks[::2]]


def _ordered(positions: list[Position]) -> list[Position]:
    """Return each position once: token indices in ascending order, then labels in order of appearance."""
    seen = list(dict.fromkeys(positions))
    indices = sorted(position for position in seen if isinstance(position, int))
    return [*indices, *(position for position in seen if not isinstance(position, int))]
