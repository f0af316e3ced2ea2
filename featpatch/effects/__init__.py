"""The table of metric values of patched runs, with the effects and intervals derived from it."""

from featpatch.effects.audit import Audit, audited, needed, provable, sample_sizes, without_estimates
from featpatch.effects.collector import Collector
from featpatch.effects.effects import By, Effects
from featpatch.effects.join import joined
from featpatch.effects.material import Material, Portrait, Prompt
from featpatch.effects.stability import Stability
from featpatch.effects.statistics import check_gap, interval
from featpatch.patch import EFFECTS, Effect

__all__ = [
    "EFFECTS", "Audit", "By", "Collector", "Effect", "Effects", "Material", "Portrait", "Prompt", "Stability", "audited",
    "check_gap", "interval", "joined", "needed", "provable", "sample_sizes", "without_estimates",
]  # fmt: skip
