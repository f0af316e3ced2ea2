"""The exact sweep over patches."""

from featpatch.engine.deltas import Deltas, Directional, Explicit
from featpatch.engine.sweep import Block, measure, sweep

__all__ = ["Block", "Deltas", "Directional", "Explicit", "measure", "sweep"]
