"""What a graph says: its nodes and edges with their effects, checked once for every form that it is shown in."""

import math
from dataclasses import dataclass
from typing import Any

import networkx as nx

from featpatch.errors import FeatpatchError
from featpatch.patch import Node

POSITIVE, NEGATIVE = "#2166ac", "#c0392b"
"""Colours of effects by sign: blue raises, red lowers."""


@dataclass(frozen=True)
class Edge:
    """From `source` to `target`, both by their number among the nodes."""

    source: int
    target: int
    effect: float

    @property
    def colour(self) -> str:
        """By sign."""
        return NEGATIVE if self.effect < 0 else POSITIVE


@dataclass(frozen=True)
class Content:
    """The nodes in the order of the graph, the effect of each (None where there is none), and the edges."""

    nodes: tuple[Node, ...]
    effects: tuple[float | None, ...]
    edges: tuple[Edge, ...]

    def width(self, edge: Edge, widest: float) -> float:
        """Of the line of an edge: proportional to the size of its effect; the largest gets `widest`."""
        largest = max(abs(other.effect) for other in self.edges)
        return widest * abs(edge.effect) / largest if largest else 0.0


def content(graph: Any) -> Content:
    """The content of a `networkx.DiGraph`.

    Args:
        graph: nodes are `featpatch.Node`, with an `effect` or none; every edge has an `effect`.

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
    """An effect as text, to six digits."""
    return "none" if value is None else f"{value:+.6g}"


def _finite(value: Any, where: str) -> float:
    """The number; raises FeatpatchError if it is none."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise FeatpatchError(f"the effect of {where} is {value!r}: expected a finite number as the attribute `effect`")
    return number
