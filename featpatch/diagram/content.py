"""The checked content of a graph, its nodes and edges with their effects, which all output formats share."""

import math
from dataclasses import dataclass
from typing import Any

import networkx as nx

from featpatch.errors import FeatpatchError
from featpatch.patch import Node

POSITIVE, NEGATIVE = "#2166ac", "#c0392b"
"""The colours of positive and negative effects: blue and red."""


@dataclass(frozen=True)
class Edge:
    """An edge with its effect; `source` and `target` are indices of nodes."""

    source: int
    target: int
    effect: float

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
    edges: tuple[Edge, ...]

    def width(self, edge: Edge, widest: float) -> float:
        """Return the line width of an edge, proportional to the size of its effect; the largest effect gets `widest`."""
        largest = max(abs(other.effect) for other in self.edges)
        return widest * abs(edge.effect) / largest if largest else 0.0


def content(graph: Any) -> Content:
    """Check a graph and return its content.

    Args:
        graph: a `networkx.DiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known, on nodes.

    Raises:
        FeatpatchError: it is another kind of graph, it is empty, or an effect is missing or not a finite number.
    """
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise FeatpatchError(f"graph is a {type(graph).__name__}: expected a networkx.DiGraph whose nodes are featpatch.Node")
    strange = next((node for node in graph if not isinstance(node, Node)), None)
    if strange is not None or not len(graph):
        got = "is empty" if strange is None else f"has a node {strange!r}"
        raise FeatpatchError(f"graph {got}: expected nodes such as Node('blocks.0.hook_mlp_out', 'activation')")
    number = {node: n for n, node in enumerate(graph)}
    effects = tuple(None if value is None else _finite(value, str(node)) for node, value in graph.nodes(data="effect"))
    edges = tuple(
        Edge(number[source], number[target], _finite(value, f"{source} -> {target}"))
        for source, target, value in graph.edges(data="effect")
    )
    return Content(tuple(graph), effects, edges)


def digits(value: float | None) -> str:
    """Return an effect as text with six digits."""
    return "none" if value is None else f"{value:+.6g}"


def _finite(value: Any, where: str) -> float:
    """Convert an effect to a float.

    Raises:
        FeatpatchError: it is not a finite number.
    """
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise FeatpatchError(f"the effect of {where} is {value!r}: expected a finite number as the attribute `effect`")
    return number
