"""What came out: the table of metric values, the effects derived from it, their intervals."""

from featpatch.effects.collector import Collector
from featpatch.effects.effects import Effects
from featpatch.effects.statistics import check_gap

__all__ = ["Collector", "Effects", "check_gap"]
