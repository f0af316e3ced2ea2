"""Exact patching: ranking features, and the operator by hand."""

from featpatch.patching.ablation import ablate
from featpatch.patching.by_hand import do
from featpatch.patching.components import rank_components
from featpatch.patching.features import rank_features
from featpatch.patching.noise import Noise
from featpatch.patching.planning import plan

__all__ = ["Noise", "ablate", "do", "plan", "rank_components", "rank_features"]
