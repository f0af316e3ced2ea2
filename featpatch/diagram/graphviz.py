"""A graph in Graphviz's DOT language, through the bridge of networkx to pydot."""

from collections import defaultdict
from typing import Any

import networkx as nx

from featpatch.diagram.content import content
from featpatch.diagram.naming import height, label

WIDEST = 5.0


def dot(graph: Any) -> str:
    """The graph as DOT: `featpatch.diagram.dot(graph)` into a file, then `dot -Tsvg file`.

    Lines are as wide as effects are large, blue where they are positive and red where they are negative; nodes at the same
    hook of a block are side by side, and inputs are below what they act on.

    Args:
        graph: a `networkx.DiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known, on nodes.

    Raises:
        FeatpatchError: the graph is none of these, or an effect is not a finite number.
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
    """A string of DOT that shows this text."""
    lines = text.replace("\\", "\\\\").replace('"', '\\"').splitlines()
    return '"' + "\\n".join(lines) + '"'
