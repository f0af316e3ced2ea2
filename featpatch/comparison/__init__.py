"""Comparison of features with components: how far the two rankings agree, and which component writes which feature."""

from featpatch.comparison.cells import Agreement
from featpatch.comparison.comparison import Comparison, compare

__all__ = ["Agreement", "Comparison", "compare"]
