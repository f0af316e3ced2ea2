"""A study from the checked question to the table: both runs of every pair, what differs, what is swapped, what is read."""

from featpatch.patching.study.asked import Asked
from featpatch.patching.study.noise import Noise
from featpatch.patching.study.part import Part
from featpatch.patching.study.readings import Metrics, leading
from featpatch.patching.study.study import Study

__all__ = ["Asked", "Metrics", "Noise", "Part", "Study", "leading"]
