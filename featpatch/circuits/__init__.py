"""Circuits: find the nodes or edges that together produce a behaviour, and test hypotheses about them by causal scrubbing."""

from featpatch.circuits.circuit import Circuit
from featpatch.circuits.curve import FaithfulnessCurve
from featpatch.circuits.edges import EdgeGraph
from featpatch.circuits.finding import find_circuit
from featpatch.circuits.graph import Graph
from featpatch.circuits.nodes import NodeGraph
from featpatch.circuits.scrubbing import Hypothesis, Scrubbed, scrub

__all__ = ["Circuit", "EdgeGraph", "FaithfulnessCurve", "Graph", "Hypothesis", "NodeGraph", "Scrubbed", "find_circuit", "scrub"]
