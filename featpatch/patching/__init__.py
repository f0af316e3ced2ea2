"""Exact patching of features, components and sets of nodes, ablation, and `do` for patching by hand."""

from featpatch.patching.ablation import ablate
from featpatch.patching.by_hand import do
from featpatch.patching.components import component_study, rank_components
from featpatch.patching.controls import Controls, random_controls
from featpatch.patching.curves import Curve, cumulative
from featpatch.patching.diagnostics import diagnose
from featpatch.patching.features import feature_study
from featpatch.patching.interaction import interactions
from featpatch.patching.paths.route import Route
from featpatch.patching.paths.study import Nodes, path_study
from featpatch.patching.selection import Selection, select_features
from featpatch.patching.study import Asked, Metrics, Noise, Study, leading

__all__ = [
    "Asked", "Controls", "Curve", "Metrics", "Nodes", "Noise", "Route", "Selection", "Study", "ablate", "component_study",
    "cumulative", "diagnose", "do", "feature_study", "interactions", "leading", "path_study", "random_controls",
    "rank_components", "select_features",
]  # fmt: skip
