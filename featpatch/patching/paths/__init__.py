"""Path patching: measure the effect of a sender through a receiver, with the components in between frozen."""

from featpatch.patching.paths.route import Route
from featpatch.patching.paths.study import Nodes, path_study

__all__ = ["Nodes", "Route", "path_study"]
