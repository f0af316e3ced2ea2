"""Load models by name, from a folder, or from memory."""

from collections.abc import Collection
from copy import copy, deepcopy
from pathlib import Path
from typing import Any

import torch
from transformer_lens import HookedTransformer
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from featpatch.errors import FeatpatchError
from featpatch.lens.bridge import BridgeLens
from featpatch.lens.checkpoint import Checkpoint
from featpatch.lens.finite import check_finite
from featpatch.lens.sources import check_device, check_there, folder_with, installing_nothing, not_found
from featpatch.lens.training import PROCESSED
from featpatch.lens.weights import processing as processed
from featpatch.lens.wrap import MERGE, check_form, uncompiled
from featpatch.untrusted import short


def load_model(
    source: Any, *, tokenizer: Any = None, device: str = "cpu", dtype: str = "float32", processing: Collection[str] = ()
) -> Any:
    """Load a model as a TransformerBridge; a TransformerLens model is returned as it is.

    Args:
        source: a hub name, a Hugging Face folder, a Hugging Face model in memory, or a TransformerLens model. A compiled model
            is replaced by the module that was passed to torch.compile.
        tokenizer: the tokenizer of a Hugging Face model in memory, or of a model that comes without one.
        device, dtype: the device and the dtype of a model that is loaded by name or from a folder.
        processing: the weight processing of a TransformerBridge that is made here, from `training.PROCESSED`; none by default.
            A model in memory is copied first.

    Raises:
        FeatpatchError: there is no such model, it can't be loaded, or it can't be patched.
    """
    source = uncompiled(source)
    check_form(source)
    if isinstance(source, torch.nn.Module):
        check_finite(f"the {type(source).__name__}", getattr(source, "original_model", source))
    if isinstance(source, TransformerBridge | HookedTransformer):
        return source
    if isinstance(source, PreTrainedModel):
        bridge = _around(deepcopy(source) if processing else source, tokenizer)
    elif isinstance(source, str | Path):
        bridge = _booted(str(source), tokenizer, device, dtype)
    else:
        raise FeatpatchError(
            f"the model is a {type(source).__name__}: expected a name, a folder, a Hugging Face model with its tokenizer, or a "
            "TransformerBridge or HookedTransformer"
        )
    unknown = set(processing) - set(PROCESSED)
    if unknown:
        raise FeatpatchError(f"processing={list(processing)}: expected some of {', '.join(PROCESSED)}")
    if processing:
        try:
            bridge.enable_compatibility_mode(disable_warnings=True, **{name: name in processing for name in PROCESSED})
        except Exception as error:
            raise FeatpatchError(
                f"the weights can't be processed by {list(processing)} ({short(error)}): expected an architecture for which "
                "TransformerLens can; pass processing=[] for the weights as they are"
            ) from error
        if "center_writing_weights" in processing and "center_writing_weights" not in processed(BridgeLens(bridge)):
            raise FeatpatchError(
                "TransformerLens has not centred the weights of this architecture (it does where LayerNorm takes out a mean): "
                "expected processing without 'center_writing_weights'"
            )
    return bridge


def _booted(source: str, tokenizer: Any, device: str, dtype: str) -> TransformerBridge:
    check_device(device)
    numbers = getattr(torch, dtype, None)
    if not isinstance(numbers, torch.dtype):
        raise FeatpatchError(f"dtype {dtype!r} is unknown: expected float32, bfloat16, float16 or float64")
    check_there("model", source)
    if (Path(source) / "adapter_config.json").is_file():
        raise FeatpatchError(
            f"{source!r} is the folder of an adapter (adapter_config.json), without the model: expected a whole model; "
            f"{MERGE}, and pass that or save it with save_pretrained"
        )
    if Path(source).exists():
        folder_with(source, "config.json")
    try:
        with installing_nothing():
            bridge: TransformerBridge = TransformerBridge.boot_transformers(
                source, tokenizer=tokenizer, device=device, dtype=numbers, model_class=Checkpoint
            )
    except FeatpatchError:
        raise
    except Exception as error:
        raise not_found("model", source, error) from error
    check_form(bridge)
    check_finite(f"the model {source!r}", bridge.original_model)
    if bridge.tokenizer is None or len(bridge.tokenizer) <= 1:
        raise FeatpatchError(
            f"the model {source!r} comes without the files of a tokenizer: save the model's own there, or pass tokenizer=..."
        )
    bridge.eval()
    return bridge


def _around(model: PreTrainedModel, tokenizer: Any) -> TransformerBridge:
    if tokenizer is None:
        raise FeatpatchError(f"the {type(model).__name__} has no tokenizer with it: pass tokenizer=..., the model's own")
    name, device = model.config.name_or_path or type(model).__name__, next(model.parameters()).device
    known = [each.__name__ for each in type(model).__mro__ if each.__name__ in SUPPORTED_ARCHITECTURES][:1]
    try:
        with installing_nothing():
            return TransformerBridge.boot_transformers(
                name,
                hf_model=model.eval(),
                tokenizer=_as_it_is(tokenizer),
                device=device,
                dtype=model.dtype,
                hf_config_overrides={"architectures": known} if known else None,
            )
    except Exception as error:
        raise FeatpatchError(
            f"TransformerLens can't take the {type(model).__name__} ({type(error).__name__}: {short(error)}): expected an "
            "architecture that it knows"
        ) from error


def _as_it_is(tokenizer: Any) -> Any:
    """Copy a tokenizer and mark it as adding BOS, because TransformerLens reloads other tokenizers from disk or the hub."""
    given = copy(tokenizer)
    given.init_kwargs = {"name_or_path": "", **tokenizer.init_kwargs, "add_bos_token": True}
    return given
