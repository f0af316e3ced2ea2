"""Dictionaries that are not SAEs of sae-lens: your own encoder and decoder, and baselines that need no training."""

from featpatch.sae.adapted import adapt
from featpatch.sae.baselines import identity, neurons, pca

__all__ = ["adapt", "identity", "neurons", "pca"]
