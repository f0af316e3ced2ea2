"""Graphs of nodes and effects, such as circuits, as DOT, figures, HTML pages and the JSON of attribution-graph viewers."""

from featpatch.diagram.draw import dot, figure
from featpatch.diagram.graph import graph
from featpatch.diagram.viewers import attribution_graph, interactive, sections

__all__ = ["attribution_graph", "dot", "figure", "graph", "interactive", "sections"]
