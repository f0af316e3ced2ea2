"""Access to models and SAEs: the only package that uses TransformerLens and sae-lens."""

from featpatch.lens.adapter import Adapted, adapt
from featpatch.lens.added import added
from featpatch.lens.baselines import identity, neurons, pca
from featpatch.lens.dictionary import Dictionary, Split, dictionaries, dictionaries_if_any, several
from featpatch.lens.layer import Layer, Stack, UnsupportedError
from featpatch.lens.lens import Differentiated, Fired, Lens
from featpatch.lens.models import load_model
from featpatch.lens.nodes import check_nodes
from featpatch.lens.provenance import provenance
from featpatch.lens.saes import load_sae, wanted_processing
from featpatch.lens.sources import loading_quietly
from featpatch.lens.training import Training, official_name
from featpatch.lens.vocabulary import check_tokens
from featpatch.lens.weights import processing
from featpatch.lens.wrap import wrap

__all__ = [
    "Adapted", "Dictionary", "Differentiated", "Fired", "Layer", "Lens", "Split", "Stack", "Training", "UnsupportedError",
    "adapt", "added", "check_nodes", "check_tokens", "dictionaries", "dictionaries_if_any", "identity", "load_model",
    "load_sae", "loading_quietly", "neurons", "official_name", "pca", "processing", "provenance", "several",
    "wanted_processing", "wrap",
]  # fmt: skip
