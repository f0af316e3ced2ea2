"""Exact patching: features, components and sets of them, ablations, and the operator by hand."""

from featpatch.patching.ablation import ablate
from featpatch.patching.by_hand import do
from featpatch.patching.components import rank_components
from featpatch.patching.controls import Controls, random_controls
from featpatch.patching.curves import Curve, cumulative
from featpatch.patching.diagnostics import diagnose
from featpatch.patching.features import feature_study
from featpatch.patching.interaction import interactions
from featpatch.patching.noise import Noise
from featpatch.patching.paths import rank_paths
from featpatch.patching.readings import Metrics, leading
from featpatch.patching.selection import Selection, select_features

__all__ = [
    "Controls", "Curve", "Metrics", "Noise", "Selection", "ablate", "cumulative", "diagnose", "do", "feature_study",
    "interactions", "leading", "random_controls", "rank_components", "rank_paths", "select_features",
]  # fmt: skip
