"""Graphs of nodes and effects, such as circuits, as DOT, figures, HTML pages and the JSON of attribution-graph viewers."""

from featpatch.diagram.draw import dot, figure
from featpatch.diagram.graph import graph
from featpatch.diagram.viewers import viewer_json, interactive, sections

__all__ = ["viewer_json", "dot", "figure", "graph", "interactive", "sections"]
