"""A graph as an HTML page with a figure, the numbers of the node that is clicked, and a table of all edges."""

from typing import Any

import pandas as pd

from featpatch.diagram.content import Content, content, digits
from featpatch.diagram.drawing import figure
from featpatch.diagram.naming import label
from featpatch.page import Section, block, page, table
from featpatch.page import figure as shown


def interactive(graph: Any, title: str) -> str:
    """Return a graph as one HTML file that needs no network; a click on a node shows its effect and those of its edges.

    Args:
        graph: a `networkx.DiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known, on nodes.
        title: the title of the page as plain text.

    Returns:
        The content of the file.

    Raises:
        FeatpatchError: the graph is not of this kind, or an effect is not a finite number.
    """
    said = content(graph)
    return page(title, f"{len(said.nodes)} nodes, {len(said.edges)} edges", sections(graph))


def sections(graph: Any) -> list[Section]:
    """Return two sections of a page: the figure with the panel of numbers, and the table of all edges."""
    said = content(graph)
    names = [label(node) for node in said.nodes]
    edges = pd.DataFrame(
        [(names[edge.source], names[edge.target], edge.effect) for edge in _largest_first(said)],
        columns=["from", "to", "effect"],
    )
    return [
        Section(
            "graph",
            "Graph",
            "Hooks of the model upwards, positions across. Lines are as wide as effects are large, blue where positive, red "
            "where negative. A click on a node shows its numbers below the figure.",
            [shown(figure(graph)), block("nodes.html", nodes=_numbers(said, names))],
        ),
        Section("edges", "Edges", "All edges, by the size of their effect.", [table(edges)]),
    ]


def _largest_first(said: Content) -> list[Any]:
    return sorted(said.edges, key=lambda edge: -abs(edge.effect))


def _numbers(said: Content, names: list[str]) -> list[dict[str, Any]]:
    """Return the name, effect and edges that the page shows for each node, in the order of the nodes."""
    about: list[dict[str, Any]] = [
        {"name": name, "effect": digits(effect), "arriving": [], "leaving": []}
        for name, effect in zip(names, said.effects, strict=True)
    ]
    for edge in _largest_first(said):
        about[edge.target]["arriving"].append({"node": f"from {names[edge.source]}", "effect": digits(edge.effect)})
        about[edge.source]["leaving"].append({"node": f"to {names[edge.target]}", "effect": digits(edge.effect)})
    return about
