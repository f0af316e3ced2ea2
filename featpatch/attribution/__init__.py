"""Gradient estimates of the effects of patches, and their calibration against exact effects."""
