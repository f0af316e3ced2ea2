"""A graph in the DOT language of Graphviz, written with networkx and pydot."""

from collections import defaultdict
from typing import Any

import networkx as nx

from featpatch.diagram.content import content
from featpatch.diagram.naming import height, label

WIDEST = 5.0


def dot(graph: Any) -> str:
    """Return a graph in the DOT language, to be written to a file and drawn with `dot -Tsvg file`.

    The width of a line is proportional to the size of the effect, its colour is blue for positive and red for negative effects.
    Nodes at the same hook point are side by side, and senders are below their receivers.

    Args:
        graph: a `networkx.DiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known, on nodes.

    Raises:
        FeatpatchError: the graph is not of this kind, or an effect is not a finite number.
    """
    import pydot

    said = content(graph)
    named, rows = nx.DiGraph(graph={"rankdir": "BT"}), defaultdict(list)
    for n, (node, effect) in enumerate(zip(said.nodes, said.effects, strict=True)):
        tip = label(node) if effect is None else f"{label(node)}: {effect:.6g}"
        named.add_node(f"n{n}", label=quoted(label(node)), tooltip=quoted(tip), shape="box")
        rows[height(node)].append(f"n{n}")
    for edge in said.edges:
        style = {"penwidth": f"{said.width(edge, WIDEST):.4f}", "color": quoted(edge.colour)}
        named.add_edge(f"n{edge.source}", f"n{edge.target}", **style, tooltip=quoted(f"{edge.effect:.6g}"))
    drawn = nx.nx_pydot.to_pydot(named)
    for members in rows.values():
        together = pydot.Subgraph("", rank="same")
        for name in members:
            together.add_node(pydot.Node(name))
        drawn.add_subgraph(together)
    return str(drawn.to_string())


def quoted(text: str) -> str:
    """Return a text as a quoted string of the DOT language."""
    lines = text.replace("\\", "\\\\").replace('"', '\\"').splitlines()
    return '"' + "\\n".join(lines) + '"'
