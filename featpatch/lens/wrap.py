"""The lens of a model, by its class."""

from typing import Any

from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from featpatch.errors import FeatpatchError
from featpatch.lens.bridge import BridgeLens
from featpatch.lens.hooked import HookedLens
from featpatch.lens.lens import Lens


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
