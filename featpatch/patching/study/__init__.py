"""Patching experiments, from validated arguments through the runs of every pair and their differences to a table of effects."""

from featpatch.patching.study.asked import Asked
from featpatch.patching.study.noise import Noise
from featpatch.patching.study.part import Part
from featpatch.patching.study.readings import Metrics, leading
from featpatch.patching.study.study import Study

__all__ = ["Asked", "Metrics", "Noise", "Part", "Study", "leading"]
