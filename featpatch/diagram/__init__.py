"""Graphs of nodes and effects, such as circuits, as DOT, figures, HTML pages and the JSON of attribution-graph viewers."""

from featpatch.diagram.draw import dot, figure
from featpatch.diagram.graph import graph
from featpatch.diagram.viewers import interactive, sections, viewer_json

__all__ = ["dot", "figure", "graph", "interactive", "sections", "viewer_json"]
