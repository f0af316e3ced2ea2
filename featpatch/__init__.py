"""featpatch: which SAE features cause this behaviour?"""

from featpatch.checkpoints import Demo, load_demo
from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.pairs import Pair, Pairs
from featpatch.patch import Node, Patch
from featpatch.patching import do, rank_features

__all__ = ["Demo", "Effects", "FeatpatchError", "Node", "Pair", "Pairs", "Patch", "do", "load_demo", "rank_features"]
