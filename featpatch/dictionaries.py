"""Dictionaries that are not SAEs of sae-lens: your own encoder and decoder, dictionaries over several layers, and baselines."""

from featpatch.sae.adapted import adapt
from featpatch.sae.baselines import identity, neurons, pca
from featpatch.sae.clt import CrossLayerTranscoder
from featpatch.sae.crosscoder import Crosscoder

__all__ = ["CrossLayerTranscoder", "Crosscoder", "adapt", "identity", "neurons", "pca"]
