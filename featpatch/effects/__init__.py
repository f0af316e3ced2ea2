"""What came out: the table of metric values, the effects derived from it, their intervals."""

from featpatch.effects.audit import Audit, audited, needed, provable, sample_sizes, without_estimates
from featpatch.effects.collector import Collector
from featpatch.effects.effects import EFFECTS, Effect, Effects
from featpatch.effects.join import joined
from featpatch.effects.material import Material, Portrait, Prompt
from featpatch.effects.quadrants import THRESHOLD
from featpatch.effects.stability import Stability
from featpatch.effects.statistics import check_gap, interval

__all__ = [
    "EFFECTS", "THRESHOLD", "Audit", "Collector", "Effect", "Effects", "Material", "Portrait", "Prompt", "Stability",
    "audited", "check_gap", "interval", "joined", "needed", "provable", "sample_sizes", "without_estimates",
]  # fmt: skip
