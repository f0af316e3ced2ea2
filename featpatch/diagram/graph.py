"""Conversion of nodes or edges with their effects to a graph."""

from collections.abc import Callable, Sequence
from typing import Any

import networkx as nx

from featpatch import sites
from featpatch.patch import Edge, Node


def graph(items: Sequence[Node], effects: Sequence[float], users: Callable[[Node], Sequence[Node]] | None = None) -> Any:
    """Make a `networkx.DiGraph` of nodes, or of edges between them, with the attribute `effect`.

    A query, key or value is drawn as part of its head, and the effects of edges into several of these are added up. For
    example, `fp.diagram.graph(effects.nodes, effects.pooled("recovery"))` makes a graph of the rows of a table.

    Args:
        items: nodes or edges.
        effects: the effect of each.
        users: a function that returns the heads that a receiver is part of, for models in which several heads share a key and
            value; each of these heads gets the edge.
    """
    made = nx.DiGraph()
    for item, effect in zip(items, effects, strict=True):
        if not isinstance(item, Edge):
            made.add_node(item, effect=float(effect))
            continue
        sender = _head(item.sender)
        for receiver in [_head(item.receiver)] if users is None else users(item.receiver):
            known = made.get_edge_data(sender, receiver, {"effect": 0.0})["effect"]
            made.add_edge(sender, receiver, effect=known + float(effect))
    return made


def _head(node: Node) -> Node:
    """Return the head that a query, key or value belongs to, or the node itself if it is none of these."""
    inside = sites.is_component(node.site, "q", "k", "v")
    return Node(node.site[:-1] + "z", "head", node.index, node.position) if inside else node
