"""The only room that touches TransformerLens and sae-lens."""

from typing import Any

from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from featpatch.errors import FeatpatchError
from featpatch.lens.adapter import Adapted, adapt
from featpatch.lens.bridge import BridgeLens
from featpatch.lens.dictionary import Dictionary, Split, dictionaries, several
from featpatch.lens.hooked import HookedLens
from featpatch.lens.layer import Layer, Stack, UnsupportedError
from featpatch.lens.lens import Fired, Lens
from featpatch.lens.models import load_model
from featpatch.lens.saes import load_sae, wanted_processing
from featpatch.lens.training import Training, official_name
from featpatch.lens.weights import processing

__all__ = [
    "Adapted", "Dictionary", "Fired", "Layer", "Lens", "Split", "Stack", "Training", "UnsupportedError", "adapt",
    "dictionaries", "load_model", "load_sae", "official_name", "processing", "several", "wanted_processing", "wrap",
]  # fmt: skip


def wrap(model: Any) -> Lens:
    """The lens of a model.

    Raises:
        FeatpatchError: the model is neither a TransformerBridge nor a HookedTransformer.
    """
    if isinstance(model, TransformerBridge):
        return BridgeLens(model)
    if isinstance(model, HookedTransformer):
        return HookedLens(model)
    raise FeatpatchError(
        f"the model is a {type(model).__name__}: expected a TransformerBridge or a HookedTransformer; "
        "for a Hugging Face model call TransformerBridge.boot_transformers(name, hf_model=model, tokenizer=tokenizer)"
    )
