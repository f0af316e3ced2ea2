"""Exact patching: ranking features, and the operator by hand."""

from featpatch.patching.by_hand import do
from featpatch.patching.features import rank_features
from featpatch.patching.planning import plan

__all__ = ["do", "plan", "rank_features"]
