"""The exact sweep over patches."""

from featpatch.engine.deltas import Deltas, Directional, Explicit
from featpatch.engine.sweep import BATCH_ROWS, Block, measure, sweep

__all__ = ["BATCH_ROWS", "Block", "Deltas", "Directional", "Explicit", "measure", "sweep"]
