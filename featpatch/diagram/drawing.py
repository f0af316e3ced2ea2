"""A graph as a plotly figure, with hook points from bottom to top and positions from left to right."""

from typing import Any

from featpatch.diagram.content import NEGATIVE, POSITIVE, Content, content, digits
from featpatch.diagram.curves import middles
from featpatch.diagram.layout import Layout, layout
from featpatch.diagram.naming import label, short
from featpatch.untrusted import in_figure

WIDEST, THINNEST = 7.0, 0.6
SYMBOLS = {"feature": "circle", "error": "diamond", "head": "square", "activation": "hexagon2", "neuron": "triangle-up"}


def figure(graph: Any) -> Any:
    """Draw a graph as a `plotly.graph_objects.Figure`.

    Rows are the hook points of the model from the embedding up to the logits, columns are positions. The width of a line is
    proportional to the size of the effect, its colour is blue for positive and red for negative effects. Tooltips at nodes and
    at the middle of edges show the numbers with six digits.

    Args:
        graph: a `networkx.DiGraph` of `featpatch.Node`, with the attribute `effect` on edges and, if known, on nodes.

    Raises:
        FeatpatchError: the graph is not of this kind, or an effect is not a finite number.
    """
    import plotly.graph_objects as go  # type: ignore[import-untyped]

    said = content(graph)
    places = layout(said.nodes)
    drawn = go.Figure()
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
        hovertext=[f"{names[edge.source]}<br>→ {names[edge.target]}<br>effect {digits(edge.effect)}" for edge in edges],
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
