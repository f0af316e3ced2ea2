"""Where nodes are drawn: a row for each hook, upwards; a column for each position; side by side within a cell."""

from collections import defaultdict
from dataclasses import dataclass

from featpatch.diagram.naming import height, is_end, row
from featpatch.patch import Node, Position

Cell = tuple[Position, int]
"""The position and the row of nodes that share a place."""


@dataclass(frozen=True)
class Layout:
    """Of the nodes of a graph; one unit across is the room of one node.

    Attributes:
        x: of each node.
        y: of each node; rows are counted from 0, the lowest.
        rows: their names.
        columns: middle and name of each; the ends of the model at "all" positions are in the middle of all of them.
        borders: between columns, from the left edge to the right one.
        bands: the lowest and the highest row of every other layer.
    """

    x: list[float]
    y: list[int]
    rows: list[str]
    columns: list[tuple[float, str]]
    borders: list[float]
    bands: list[tuple[int, int]]


def layout(nodes: tuple[Node, ...]) -> Layout:
    """The places of nodes: token indices in their order, labels in the order in which they appear."""
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
    """The first and the last place of every other layer of the blocks."""
    blocks = [layer for layer in dict.fromkeys(layers) if 0 <= layer < float("inf")]
    return [(layers.index(layer), layers.index(layer) + layers.count(layer) - 1) for layer in blocks[::2]]


def _ordered(positions: list[Position]) -> list[Position]:
    """Each once."""
    seen = list(dict.fromkeys(positions))
    indices = sorted(position for position in seen if isinstance(position, int))
    return [*indices, *(position for position in seen if not isinstance(position, int))]
