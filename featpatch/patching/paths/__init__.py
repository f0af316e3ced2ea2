"""Path patching: what a sender does through a receiver, and nothing on the way."""

from featpatch.patching.paths.route import Route
from featpatch.patching.paths.study import Nodes, path_study

__all__ = ["Nodes", "Route", "path_study"]
