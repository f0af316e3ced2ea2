"""Rank features and paths exactly, either all of them or those with the largest estimates, with an audit of the others."""

from featpatch.ranking.features import rank_features
from featpatch.ranking.paths import rank_paths
from featpatch.ranking.planning import plan

__all__ = ["plan", "rank_features", "rank_paths"]
