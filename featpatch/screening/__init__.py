"""Ranking features: all of them by patched runs, or those that estimates put first, with an audit of the others."""

from featpatch.screening.path_ranking import rank_paths
from featpatch.screening.planning import plan
from featpatch.screening.ranking import rank_features

__all__ = ["plan", "rank_features", "rank_paths"]
