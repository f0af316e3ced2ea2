"""Gradient estimates of patches, and how far they can be trusted. Never imports `patching`: each is the other's check."""

from featpatch.attribution.calibration import Calibration, calibrate
from featpatch.attribution.features import estimate_features

__all__ = ["Calibration", "calibrate", "estimate_features"]
