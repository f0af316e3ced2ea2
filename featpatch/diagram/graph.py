"""A graph of nodes or edges with their effects, as the content that all output formats share: names, order and layout."""

import math
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.nodes import LOGITS, TOGETHER, Edge, Node, Position, numbered
from featpatch.untrusted import visible

ORDER = (
    "resid_pre", "q", "k", "v", "pattern", "z", "result", "attn_out", "resid_mid", "neurons", "mlp_out", "resid_post",
)  # fmt: skip
"""The components of a layer from bottom to top; other hook points are drawn below the MLP."""

WORDS = {"attn_out": "attention", "mlp_out": "mlp"}
"""The displayed names of components that are not shown under their own."""


def is_group(node: Node) -> bool:
    """Return whether a node stands for several nodes, which may belong to different layers."""
    return node.kind == "set" and node.site.endswith(TOGETHER)


def is_end(node: Node) -> bool:
    """Return whether a node is the embedding or the logits, which belong to no layer."""
    return node.site in (sites.EMBEDDING, LOGITS.site)


def component(node: Node) -> str:
    """Return the component at the hook point of a node, or the end of the hook's name if it is none of `ORDER`."""
    layer = sites.layer_of(node.site)
    return next((name for name in ORDER if sites.component(layer, name) == node.site), sites.within(node.site))


def height(node: Node) -> tuple[float, int, str]:
    """Return a key that sorts nodes from bottom to top and is the same for all nodes of one row.

    Raises:
        FeatpatchError: the hook point belongs to no layer, and is neither the embedding nor the logits.
    """
    if is_end(node):
        return (-1.0 if node.site == sites.EMBEDDING else float("inf")), 0, ""
    if is_group(node):
        return sys.float_info.max, 0, ""  # between the last layer and the logits
    name = component(node)
    return float(sites.layer_of(node.site)), ORDER.index(name if name in ORDER else "resid_mid"), name


def row(node: Node) -> str:
    """Return the name of the row of a node, such as `L1 mlp`."""
    if is_end(node):
        return "embed" if node.site == sites.EMBEDDING else LOGITS.site
    if is_group(node):
        return "groups"
    name = component(node)
    return f"L{sites.layer_of(node.site)} {'heads' if name in ('z', 'result') else WORDS.get(name, name)}"


def short(node: Node) -> str:
    """Return the short name of a node within its row, such as `head 5`."""
    if is_group(node):
        return node.site.removesuffix(TOGETHER)
    if node.kind != "activation":
        return numbered(node.kind.replace("_", " "), node.index)
    name = row(node)
    return name if is_end(node) else name.split(" ", 1)[1]


def label(node: Node) -> str:
    """Return the full name of a node, such as `L3 head 5 @ end` or `L2 feature 121 of blocks.2.hook_resid_pre @ S2`."""
    if is_group(node):
        return f"{short(node)} @ {node.position}"
    where = "" if is_end(node) else f"L{sites.layer_of(node.site)} "
    inside = f"{component(node)} " if node.kind == "head" and row(node).endswith((" q", " k", " v", " pattern")) else ""
    of = f" of {node.sae or node.site}" if node.kind not in ("activation", "head", "neuron") else ""
    at = "" if is_end(node) and node.position == "all" else f" @ {node.position}"
    return f"{where}{inside}{short(node)}{of}{at}"


INPUTS = {"q": "query", "k": "key", "v": "value"}
"""The inputs of a head by the keys of the edges into them, see `graph`."""

POSITIVE, NEGATIVE = "#2166ac", "#c0392b"
"""The colours of positive and negative effects: blue and red."""


@dataclass(frozen=True)
class GraphEdge:
    """An edge with its effect.

    Attributes:
        source, target: the indices of its nodes.
        effect: its effect.
        through: `"q"`, `"k"` or `"v"` for an edge into the query, key or value of a head; empty for other edges.
    """

    source: int
    target: int
    effect: float
    through: str = ""

    def to(self, name: str) -> str:
        """Return the name of the target together with the input of the head that the edge leads to, if any."""
        return f"{name} ({INPUTS[self.through]})" if self.through else name

    @property
    def colour(self) -> str:
        """The colour for the sign of the effect."""
        return NEGATIVE if self.effect < 0 else POSITIVE


@dataclass(frozen=True)
class Content:
    """The content of a graph.

    Attributes:
        nodes: the nodes in the order of the graph.
        effects: the effect of each node; None if it is unknown.
        edges: the edges.
    """

    nodes: tuple[Node, ...]
    effects: tuple[float | None, ...]
    edges: tuple[GraphEdge, ...]

    def width(self, edge: GraphEdge, widest: float) -> float:
        """Return the line width of an edge, proportional to the size of its effect; the largest effect gets `widest`."""
        largest = max(abs(other.effect) for other in self.edges)
        return widest * abs(edge.effect) / largest if largest else 0.0


def content(graph: Any) -> Content:
    """Check a graph and return its content.

    Args:
        graph: a `networkx.DiGraph` or `MultiDiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known,
            on nodes.

    Raises:
        FeatpatchError: it is another kind of graph, it is empty, or an effect is missing or not a finite number.
    """
    if not isinstance(graph, nx.DiGraph):  # nx.MultiDiGraph is one
        raise FeatpatchError(f"graph is a {type(graph).__name__}: expected a networkx.DiGraph whose nodes are fp.Node objects")
    strange = next((node for node in graph if not isinstance(node, Node)), None)
    if strange is not None or not len(graph):
        got = "is empty" if strange is None else f"has a node {strange!r}"
        raise FeatpatchError(f"graph {got}: expected nodes such as fp.Node('blocks.0.hook_mlp_out', 'activation')")
    number = {node: n for n, node in enumerate(graph)}
    effects = tuple(None if value is None else _finite(value, str(node)) for node, value in graph.nodes(data="effect"))
    edges = tuple(
        GraphEdge(number[source], number[target], _finite(value, f"{source} -> {target}"), key if key in INPUTS else "")
        for source, target, key, value in nx.MultiDiGraph(graph).edges(data="effect", keys=True)
    )
    return Content(tuple(graph), effects, edges)


def digits(value: float | None) -> str:
    """Return an effect as text with six digits."""
    return "none" if value is None else f"{value:+.6g}"


def _finite(value: Any, where: str) -> float:
    """Convert an effect to a float, or raise a FeatpatchError if it is not a finite number."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise FeatpatchError(f"the effect of {where} is {value!r}: expected a finite number as the attribute `effect`")
    return number


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
    inner = [layer for layer in dict.fromkeys(layers) if 0 <= layer < float("inf")]
    return [(layers.index(layer), layers.index(layer) + layers.count(layer) - 1) for layer in inner[::2]]


def _ordered(positions: list[Position]) -> list[Position]:
    """Return each position once: token indices in ascending order, then labels in order of appearance."""
    seen = list(dict.fromkeys(positions))
    indices = sorted(position for position in seen if isinstance(position, int))
    return [*indices, *(position for position in seen if not isinstance(position, int))]


def graph(
    items: Sequence[Node], effects: Sequence[float] | NDArray[Any], users: Callable[[Node], Sequence[Node]] | None = None
) -> Any:
    """Make a `networkx.MultiDiGraph` of nodes, or of edges between them, with the attribute `effect`.

    A query, key or value is part of the node of its head, and the key of an edge into it is `"q"`, `"k"` or `"v"`; the key of
    any other edge is `""`. For example, `fp.diagram.graph(effects.nodes, effects.pooled("recovery"))` makes a graph of the rows
    of a table. Nodes alone give a graph without edges, because an effect of a node says nothing about what it acts through.

    Args:
        items: nodes or edges, each once.
        effects: the effect of each.
        users: a function that returns the heads that a receiver is part of, for models in which several heads share a key and
            value; each of these heads gets the edge.

    Raises:
        FeatpatchError: an item is not a node or edge or occurs twice, the numbers of items and effects differ, or an effect is
            not a finite number.

    Examples:
        >>> strongest = components.top(5)
        >>> graph = fp.diagram.graph(strongest.nodes, strongest.pooled("recovery").tolist())
        >>> graph.number_of_nodes()
        5
        >>> head = fp.Node("blocks.1.attn.hook_z", "head", 3)
        >>> inputs = [fp.Node(f"blocks.2.attn.hook_{name}", "head", 0) for name in "qk"]
        >>> list(fp.diagram.graph([fp.Edge.of(head, one) for one in inputs], [0.5, 0.2]).edges(keys=True))[1][2]
        'k'
    """
    known = isinstance(items, Sequence) and all(isinstance(item, Node) for item in items) and len(set(items)) == len(items)
    if not known or not isinstance(effects, (Sequence, np.ndarray)) or len(effects) != len(items):
        raise FeatpatchError(
            f"a graph of {visible(str(items))[:200]} with effects {visible(str(effects))[:200]}: expected a list of nodes or "
            "of edges, each once, and as many effects, such as effects.nodes and effects.pooled('recovery')"
        )
    made = nx.MultiDiGraph()
    for item, value in zip(items, effects, strict=True):
        effect = _finite(value, str(item))
        if not isinstance(item, Edge):
            made.add_node(item, effect=effect)
            continue
        through = item.receiver.site[-1] if _inside(item.receiver) else ""
        for receiver in [_head(item.receiver)] if users is None else users(item.receiver):
            made.add_edge(_head(item.sender), receiver, through, effect=effect)
    return made


def _inside(node: Node) -> bool:
    """Return whether a node is a query, key or value."""
    return sites.is_component(node.site, *INPUTS)


def _head(node: Node) -> Node:
    """Return the head that a query, key or value belongs to, or the node itself if it is none of these."""
    return Node(node.site[:-1] + "z", "head", node.index, node.position) if _inside(node) else node
