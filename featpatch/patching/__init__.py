"""Exact patching: ranking features, and the operator by hand."""

from featpatch.patching.do import do
from featpatch.patching.features import rank_features

__all__ = ["do", "rank_features"]
