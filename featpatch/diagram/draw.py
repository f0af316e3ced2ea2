"""A graph as a plotly figure, with hook points from bottom to top and positions from left to right, and in the DOT language.

Edges are curves, bent so that they do not pass through other nodes and their middles can be pointed at one by one.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import networkx as nx
import numpy as np

from featpatch.diagram.graph import INPUTS, NEGATIVE, POSITIVE, Content, Layout, content, digits, height, label, layout, short
from featpatch.errors import check_kinds
from featpatch.untrusted import in_figure

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


WIDEST, THINNEST = 7.0, 0.6
SYMBOLS = {"feature": "circle", "error": "diamond", "head": "square", "activation": "hexagon2", "neuron": "triangle-up"}


def figure(graph: Any, *, title: str = "") -> Any:
    """Draw a graph as a `plotly.graph_objects.Figure`.

    Rows are the hook points of the model from the embedding up to the logits, columns are positions. The width of a line is
    proportional to the size of the effect, its colour is blue for positive and red for negative effects. Tooltips at nodes and
    at the middle of edges show the numbers with six digits.

    Args:
        graph: a `networkx.DiGraph` or `MultiDiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known,
            on nodes.
        title: the title of the figure.

    Raises:
        FeatpatchError: the graph is not of this kind, an effect is not a finite number, or the title is not a string.

    Examples:
        >>> strongest = components.top(5)
        >>> graph = fp.diagram.graph(strongest.nodes, strongest.pooled("recovery").tolist())
        >>> fp.diagram.figure(graph).write_html(folder / "graph.html")
    """
    import plotly.graph_objects as go  # type: ignore[import-untyped]

    check_kinds(str, title=title)
    said = content(graph)
    places = layout(said.nodes)
    drawn = go.Figure(layout={"title": in_figure(title)})
    _edges(drawn, said, places)
    _nodes(drawn, said, places)
    _axes(drawn, places)
    return drawn


def _edges(drawn: Any, said: Content, places: Layout) -> None:
    """Add a curve for each edge, the widest on top, with an invisible point in its middle whose tooltip shows its effect."""
    points = [(x, float(y)) for x, y in zip(places.x, places.y, strict=True)]
    edges = sorted(said.edges, key=lambda edge: abs(edge.effect))
    middle = middles([(edge.source, edge.target) for edge in edges], points)
    for edge, (x, y) in zip(edges, middle, strict=True):
        (x0, y0), (x1, y1) = points[edge.source], points[edge.target]
        width = max(THINNEST, said.width(edge, WIDEST))
        line = {"color": edge.colour, "width": width, "shape": "spline", "smoothing": 1.3}
        drawn.add_scatter(
            x=[x0, x, x1], y=[y0, y, y1], mode="lines", line=line, opacity=0.65, hoverinfo="skip", showlegend=False
        )
    names = [in_figure(label(node)) for node in said.nodes]
    drawn.add_scatter(
        x=[x for x, _ in middle],
        y=[y for _, y in middle],
        mode="markers",
        marker={"size": 14, "opacity": 0},
        hovertext=[
            f"{names[edge.source]}<br>→ {edge.to(names[edge.target])}<br>effect {digits(edge.effect)}" for edge in edges
        ],
        hoverinfo="text",
        showlegend=False,
    )
    for name, colour in (("positive effect", POSITIVE), ("negative effect", NEGATIVE)):
        drawn.add_scatter(x=[None], y=[None], mode="lines", line={"color": colour, "width": 4}, name=name)


def _nodes(drawn: Any, said: Content, places: Layout) -> None:
    """Add a marker for each node, with a shape for its kind, a colour for its effect, and its index as customdata."""
    known = [effect for effect in said.effects if effect is not None]
    if known:
        largest = max(map(abs, known)) or 1.0
        scale = [[0, NEGATIVE], [0.5, "#f7f7f7"], [1, POSITIVE]]
        bar = {"title": "effect of<br>a node", "thickness": 12, "len": 0.5}
        drawn.update_layout(coloraxis={"colorscale": scale, "cmin": -largest, "cmax": largest, "colorbar": bar})
    drawn.add_scatter(
        x=places.x,
        y=places.y,
        mode="markers+text",
        marker={
            "symbol": [symbol(node.kind) for node in said.nodes],
            "color": [0.0 if effect is None else effect for effect in said.effects] if known else "#f7f7f7",
            "coloraxis": "coloraxis" if known else None,
            "size": 20,
            "line": {"color": ["#b0bec5" if effect is None else "#37474f" for effect in said.effects], "width": 1.5},
        },
        text=[in_figure(short(node)) for node in said.nodes],
        textposition="middle right",
        textfont={"size": 12, "shadow": "0 0 2px white, 0 0 2px white, 0 0 4px white, 0 0 4px white"},
        hovertext=[_about(said, n) for n in range(len(said.nodes))],
        hoverinfo="text",
        customdata=list(range(len(said.nodes))),
        showlegend=False,
    )
    for kind in dict.fromkeys(node.kind for node in said.nodes):
        marker = {"symbol": symbol(kind), "size": 12, "color": "#cfd8dc", "line": {"color": "#37474f", "width": 1.5}}
        drawn.add_scatter(x=[None], y=[None], mode="markers", marker=marker, name=kind.replace("_", " "))


def symbol(kind: str) -> str:
    """Return the marker symbol for a kind of node; a circle by default."""
    return SYMBOLS.get(kind, "circle")


def _about(said: Content, n: int) -> str:
    """Return the tooltip of a node."""
    arriving, leaving = (sum(getattr(edge, end) == n for edge in said.edges) for end in ("target", "source"))
    name = in_figure(label(said.nodes[n]))
    return f"{name}<br>effect {digits(said.effects[n])}<br>edges: {arriving} in, {leaving} out"


def _axes(drawn: Any, places: Layout) -> None:
    """Add the names of rows and columns, bands for layers, and lines between columns."""
    left, right = places.borders[0], max(places.borders[-1], 1.0)
    for low, high in places.bands:
        drawn.add_hrect(low - 0.5, high + 0.5, fillcolor="#eef3f7", line_width=0, layer="below")
    for border in places.borders[1:-1]:
        drawn.add_vline(border, line={"color": "#b0bec5", "width": 1, "dash": "dot"}, layer="below")
    drawn.update_layout(
        height=180 + 72 * len(places.rows), hovermode="closest", legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"}
    )
    drawn.update_xaxes(
        title="position",
        tickvals=[middle for middle, _ in places.columns],
        ticktext=[in_figure(name) for _, name in places.columns],
        range=[min(left, *places.x) - 0.6, max(right, *places.x) + 0.6],
        showgrid=False,
        zeroline=False,
    )
    drawn.update_yaxes(
        showgrid=False,
        tickvals=list(range(len(places.rows))),
        ticktext=[in_figure(name) for name in places.rows],
        range=[-0.6, len(places.rows) - 0.5],
        zeroline=False,
    )


WIDEST_LINE = 5.0


def dot(graph: Any) -> str:
    """Return a graph in the DOT language, to be written to a file and drawn with `dot -Tsvg file`.

    The width of a line is proportional to the size of the effect, its colour is blue for positive and red for negative effects.
    Nodes at the same hook point are side by side, and senders are below their receivers.

    Args:
        graph: a `networkx.DiGraph` or `MultiDiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known,
            on nodes.

    Raises:
        FeatpatchError: the graph is not of this kind, or an effect is not a finite number.

    Examples:
        >>> strongest = components.top(5)
        >>> graph = fp.diagram.graph(strongest.nodes, strongest.pooled("recovery").tolist())
        >>> text = fp.diagram.dot(graph)
        >>> "digraph" in text, text.count("head")
        (True, 10)
    """
    import pydot

    said = content(graph)
    named, rows = nx.MultiDiGraph(graph={"rankdir": "BT"}), defaultdict(list)
    for n, (node, effect) in enumerate(zip(said.nodes, said.effects, strict=True)):
        tip = label(node) if effect is None else f"{label(node)}: {effect:.6g}"
        named.add_node(f"n{n}", label=quoted(label(node)), tooltip=quoted(tip), shape="box")
        rows[height(node)].append(f"n{n}")
    for edge in said.edges:
        style = {"penwidth": f"{said.width(edge, WIDEST_LINE):.4f}", "color": quoted(edge.colour)}
        style |= {"label": quoted(INPUTS[edge.through])} if edge.through else {}
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
