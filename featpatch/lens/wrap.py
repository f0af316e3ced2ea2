"""Choose the lens for a model by its class, and reject models that can't be patched."""

from collections.abc import Iterable
from typing import Any

from transformer_lens import HookedTransformer
from transformer_lens.model_bridge import TransformerBridge

from featpatch.errors import FeatpatchError
from featpatch.lens.bridge import BridgeLens
from featpatch.lens.hooked import HookedLens
from featpatch.lens.lens import Lens

MERGE = "merge it first: PeftModel.from_pretrained(base_model, adapter).merge_and_unload() gives the whole model"
"""The advice for an adapter that is not merged into the model, for error messages."""


def wrap(model: Any) -> Lens:
    """Return the lens of a model; for a compiled model, that of the module that was passed to torch.compile.

    Raises:
        FeatpatchError: the model is neither a TransformerBridge nor a HookedTransformer, or it can't be patched.
    """
    model = uncompiled(model)
    check_form(model)
    if isinstance(model, TransformerBridge):
        return BridgeLens(model)
    if isinstance(model, HookedTransformer):
        return HookedLens(model)
    raise FeatpatchError(
        f"the model is a {type(model).__name__}: expected a TransformerBridge or a HookedTransformer; "
        "for a Hugging Face model take fp.load(model, tokenizer=tokenizer).model"
    )


def uncompiled(model: Any) -> Any:
    """Return the module that was passed to torch.compile, or any other object as it is."""
    return getattr(model, "_orig_mod", model)


def check_form(model: Any) -> None:
    """Check that a model is a decoder with all of its own weights in place.

    Raises:
        FeatpatchError: the model has an encoder, an adapter that is not merged, or offloaded weights.
    """
    own = getattr(model, "original_model", model)
    name, config = type(own).__name__, getattr(own, "config", None)
    encodes = name in ("HookedEncoder", "HookedEncoderDecoder") or bool(getattr(config, "is_encoder_decoder", False))
    if encodes or (isinstance(model, TransformerBridge) and not hasattr(model, "blocks")):
        raise FeatpatchError(
            f"the model is a {name}, which has an encoder: expected a decoder alone, such as GPT-2 or Llama, "
            "whose blocks write to one residual stream; encoder-decoder models such as T5 can't be patched"
        )
    modules: Iterable[Any] = getattr(model, "modules", tuple)()
    if hasattr(model, "peft_config") or any(type(module).__module__.split(".")[0] == "peft" for module in modules):
        raise FeatpatchError(f"the {name} has an adapter (PEFT) beside its weights: expected a model without one; {MERGE}")
    absent = [path for path, parameter in getattr(model, "named_parameters", tuple)() if parameter.is_meta]
    if absent:
        raise FeatpatchError(
            f"{len(absent)} weights of the {name} ({absent[0]!r}, ...) are offloaded to CPU or disk, or were never loaded: "
            "expected all on a device; load the model without device_map, on devices with room for it, or in a smaller dtype"
        )
