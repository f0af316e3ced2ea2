"""What to run: pairs of a clean and a corrupted prompt, their answers and their labelled positions."""

from featpatch.pairs.align import changed_span
from featpatch.pairs.each import SkippedPairsWarning
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs, check_pairs

__all__ = ["Pair", "Pairs", "SkippedPairsWarning", "changed_span", "check_pairs"]
