"""What came out: the table of metric values, the effects derived from it, their intervals."""

from featpatch.effects.collector import Collector
from featpatch.effects.effects import EFFECTS, Effect, Effects
from featpatch.effects.quadrants import THRESHOLD
from featpatch.effects.stability import Stability
from featpatch.effects.statistics import check_gap, interval

__all__ = ["EFFECTS", "THRESHOLD", "Collector", "Effect", "Effects", "Stability", "check_gap", "interval"]
