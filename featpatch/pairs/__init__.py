"""Pairs of a clean and a corrupted prompt, with their answers and labelled positions."""

from featpatch.pairs.align import changed_span
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs, check_pairs
from featpatch.pairs.tokens import PairsWarning

__all__ = ["Pair", "Pairs", "PairsWarning", "changed_span", "check_pairs"]
