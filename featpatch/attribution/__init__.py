"""Gradient estimates of the effects of patches, and their calibration against exact effects.

This package never imports `patching`, so that each is an independent check of the other.
"""

from featpatch.attribution.calibration import Calibration, calibrate
from featpatch.attribution.components import estimate_components
from featpatch.attribution.cost import estimation_time
from featpatch.attribution.features import estimate_features
from featpatch.attribution.gradients import Gradients
from featpatch.attribution.paths import estimate_paths

__all__ = [
    "Calibration",
    "Gradients",
    "calibrate",
    "estimate_components",
    "estimate_features",
    "estimate_paths",
    "estimation_time",
]
