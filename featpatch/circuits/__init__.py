"""Circuits: find the nodes or edges that together produce a behaviour, and test hypotheses about them by causal scrubbing."""
