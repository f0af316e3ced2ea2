"""Graphs of nodes and effects, such as circuits, as DOT, figures, HTML pages and the JSON of attribution-graph viewers."""

from featpatch.diagram.browsing import interactive, sections
from featpatch.diagram.drawing import figure
from featpatch.diagram.graph import graph
from featpatch.diagram.graphviz import dot
from featpatch.diagram.viewers import attribution_graph

__all__ = ["attribution_graph", "dot", "figure", "graph", "interactive", "sections"]
