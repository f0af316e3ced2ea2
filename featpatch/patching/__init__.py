"""Exact patching: ranking features, and the operator by hand."""

from featpatch.patching.by_hand import do
from featpatch.patching.features import rank_features

__all__ = ["do", "rank_features"]
