"""Exact patching: ranking features, and the operator by hand."""

from featpatch.patching.ablation import ablate
from featpatch.patching.by_hand import do
from featpatch.patching.components import rank_components
from featpatch.patching.controls import Controls, random_controls
from featpatch.patching.curves import Curve, cumulative
from featpatch.patching.diagnostics import diagnose
from featpatch.patching.features import rank_features
from featpatch.patching.interaction import interactions
from featpatch.patching.noise import Noise
from featpatch.patching.planning import plan
from featpatch.patching.selection import Selection, select_features

__all__ = [
    "Controls", "Curve", "Noise", "Selection", "ablate", "cumulative", "diagnose", "do", "interactions", "plan",
    "random_controls", "rank_components", "rank_features", "select_features",
]  # fmt: skip
