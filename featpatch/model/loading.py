"""Load models by name, from a folder, or from memory, with their weights completely or not at all.

By itself, transformers fills missing tensors with random values, drops tensors that the model has no place for, and reads a
pickle if an index names one. At most it logs a message.

How the weights of a model were processed (`processing_steps`) is determined by measurement.
"""

import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import get_ident
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from transformer_lens import HookedTransformer
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformers import PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from featpatch import sites
from featpatch.errors import FeatpatchError, FeatpatchWarning, counted, listed
from featpatch.files import read_json
from featpatch.model.facts import check_finite, dtype_named
from featpatch.model.layer import Norm, norm_of
from featpatch.model.lens import Lens
from featpatch.model.sources import check_device, check_there, folder_with, installing_nothing, not_found, numerically
from featpatch.model.transformer_lens import MERGE, BridgeLens, check_form, uncompiled
from featpatch.untrusted import short

PROCESSED = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
"""Weight processing that TransformerLens does by default; SAEs are trained without it unless their configuration says so."""

EXPECTED = (
    "expected the configuration and the weights of one model, saved together; download or save the model again, or load it "
    "with transformers yourself and pass the model and its tokenizer"
)


class Checkpoint:
    """A replacement for the Hugging Face class with which TransformerLens loads a model (its `model_class`)."""

    @classmethod
    def from_pretrained(cls, source: str, *, config: Any, **options: Any) -> Any:
        """Load the model as TransformerLens would, with the same class and options, and check that its weights are complete.

        Raises:
            FeatpatchError: tensors are missing, surplus or of another shape, or the weights are not in safetensors files inside
                the folder.
        """
        path = _file(source, config)
        shards = _shards(path) if path is not None and path.suffix == ".json" else set()
        kind = get_hf_model_class_for_architecture(determine_architecture_from_hf_config(config))
        with _without_report():
            model, found = kind.from_pretrained(
                source, config=config, output_loading_info=True, use_safetensors=True, ignore_mismatched_sizes=True, **options
            )
        _check_loaded(source, model, found, set() if path is None else _stored(path, shards))
        return model


def _file(source: str, config: Any) -> Path | None:
    """Find the weights file or the index of several; None if the hub can't be reached, which transformers reports.

    Raises:
        FeatpatchError: there are no safetensors files.
    """
    named = getattr(config, "transformers_weights", None)
    if named is not None and _strays(named.removesuffix(".index.json") if isinstance(named, str) else named):
        raise FeatpatchError(f"config.json in {source!r} names the weights file {named!r}: {_INSIDE}")
    names = [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME] if named is None else [named]
    unanswered = False
    for name in names:
        try:
            path = Path(source) / name if Path(source).is_dir() else Path(hf_hub_download(source, name))
        except EntryNotFoundError as error:
            unanswered |= isinstance(error, LocalEntryNotFoundError)
        except Exception:
            return None
        else:
            if path.is_file():
                return path
    if unanswered:
        return None
    raise FeatpatchError(
        f"there is no safetensors file in {source!r} ({' or '.join(names)}): expected the model's weights in this format, "
        "because a pickle (.bin, .pt) can run code when it is read; save the model again with save_pretrained"
    )


_INSIDE = "expected .safetensors files inside this folder; download or save the model again"


def _strays(file: object) -> bool:
    """Return whether a name is anything but that of a safetensors file inside the folder."""
    paths = [kind(file) for kind in (PurePosixPath, PureWindowsPath)] if isinstance(file, str) else []
    return not paths or any(path.suffix != ".safetensors" or path.anchor or ".." in path.parts for path in paths)


def _shards(path: Path) -> set[str]:
    """Read an index and return the files that it names; which tensors each holds is checked later, on the loaded model.

    Raises:
        FeatpatchError: the file is not an index, or names anything but safetensors files inside its folder.
    """
    try:
        index = read_json(path.read_text(encoding="utf-8"))
        files, _ = [*index["weight_map"].values()], index["metadata"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FeatpatchError(
            f"{str(path)!r} can't be read ({type(error).__name__}: {error}): expected an index with metadata and weight_map; "
            "download or save the model again"
        ) from error
    if strays := [repr(file) for file in files if _strays(file)]:
        raise FeatpatchError(f"{str(path)!r} names the weights files {listed(numerically(set(strays)), 5)}: {_INSIDE}")
    return set(files)


def _stored(path: Path, shards: Collection[str]) -> set[str]:
    """Return the names of all tensors in a file, or in all files of an index."""
    stored = set[str]()
    for file in shards or [path.name]:
        with safe_open(path.parent / file, framework="pt") as opened:
            stored.update(opened.keys())
    return stored


def _check_loaded(source: str, model: Any, found: Mapping[str, Any], stored: Collection[str]) -> None:
    """Check that a model received all of its weights, and warn about weights that belong to no part of it.

    Args:
        found: the loading info of transformers.
        stored: the names of all tensors in the files.

    Raises:
        FeatpatchError: weights are missing, of another shape, or left over.
    """
    surplus, ignored = set(found["unexpected_keys"]), model._keys_to_ignore_on_load_unexpected or ()
    dropped = {name for name in stored if any(re.search(pattern, name) for pattern in ignored)}
    misplaced = _misplaced(model, surplus, dropped)
    reshaped = [f"{name} {list(there)} instead of {list(here)}" for name, there, here in found["mismatched_keys"]]
    kinds = (("missing", found["missing_keys"]), ("of another shape", reshaped), ("left over", misplaced))
    wrong = [f"{counted(len(names), 'tensor')} {how} ({listed(numerically(names), 5)})" for how, names in kinds if names]
    if wrong:
        raise FeatpatchError(f"the weights in {source!r} do not match its config.json ({', '.join(wrong)}): {EXPECTED}")
    if surplus:
        warnings.warn(
            f"{len(surplus)} of the weights in {source!r} do not belong to any part of the {type(model).__name__} and are "
            f"ignored: {listed(numerically(surplus), 5)}",
            FeatpatchWarning,
            stacklevel=8,
        )


def _misplaced(model: Any, surplus: Collection[str], dropped: Collection[str]) -> set[str]:
    """Find left-over tensors that the right model would use: those that belong to one of its modules, or to a further layer.

    Args:
        surplus: tensors that transformers reports as unexpected.
        dropped: tensors that transformers drops without a report, because their names match a pattern. A pattern can match too
            much: GPT-2's pattern for old masks, "attn.bias", also matches `attn.c_attn.bias_2`. A whole layer that matches a
            pattern is dropped rightly.
    """
    own, modules = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
    base, found = f"{model.base_model_prefix}.", set()
    for name in (*surplus, *dropped):
        full = (name, base + name, name.removeprefix(base))  # files are written with and without the prefix
        if any(each in own for each in full):
            continue
        owners = [modules[owner] for each in full if (owner := each.rpartition(".")[0]) in modules]
        beside = any(True for owner in owners for _ in owner.parameters(recurse=False))
        further = name in surplus and any(
            isinstance(layers := modules.get(each[: number.start()]), torch.nn.ModuleList) and int(number[1]) >= len(layers)
            for each in full
            for number in re.finditer(r"\.(\d+)\.", each)
        )
        if beside or further:
            found.add(name)
    return found


@contextmanager
def _without_report() -> Iterator[None]:
    """Keep transformers from logging its report of missing and surplus tensors, which are checked here instead."""
    ours, log = get_ident(), logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return record.thread != ours or "LOAD REPORT" not in text or "CONVERSION" in text

    log.addFilter(keep)
    try:
        yield
    finally:
        log.removeFilter(keep)


def load_model(
    source: Any,
    *,
    tokenizer: Any = None,
    device: str = "cpu",
    dtype: str | torch.dtype | None = None,
    processing: Collection[str] | None = None,
    trained: Collection[str] = (),
) -> Any:
    """Load a model as a TransformerBridge; a TransformerLens model is returned as it is.

    Args:
        source: a hub name, a Hugging Face folder, a Hugging Face model in memory, or a TransformerLens model. A compiled model
            is replaced by the module that was passed to torch.compile.
        tokenizer: the tokenizer of a Hugging Face model in memory, or of a model that comes without one.
        device, dtype: the device and the dtype (float32 by default) of a model that is loaded by name or from a folder.
        processing: the weight processing of a TransformerBridge that is made here, from `PROCESSED`; `trained` by default.
            A model in memory is copied first.
        trained: the weight processing with which the SAEs of the model were trained.

    Raises:
        FeatpatchError: there is no such model, it can't be loaded, it can't be patched, or an argument has no use.
    """
    steps = () if processing is None else processing
    if isinstance(steps, str) or not isinstance(steps, Collection) or any(step not in PROCESSED for step in steps):
        raise FeatpatchError(f"processing={processing!r:.60}: expected a list of some of {', '.join(PROCESSED)}")
    check_device(device)
    if isinstance(tokenizer, (str, Path)):
        raise FeatpatchError(
            f"tokenizer={str(tokenizer)!r} is a {type(tokenizer).__name__}: expected the tokenizer itself; pass "
            f"tokenizer=AutoTokenizer.from_pretrained({str(tokenizer)!r}), with AutoTokenizer from transformers"
        )
    if isinstance(source, type):
        raise FeatpatchError(f"{source.__name__} is a class: expected an instance of it")
    source = uncompiled(source)
    check_form(source)
    if isinstance(source, torch.nn.Module):
        check_finite(f"the {type(source).__name__}", getattr(source, "original_model", source))
    if isinstance(source, TransformerBridge | HookedTransformer):
        _check_unused(source, device, dtype=dtype, tokenizer=tokenizer, processing=processing or None)
        return source
    processing = trained if processing is None else processing
    if isinstance(source, PreTrainedModel):
        _check_unused(source, device, dtype=dtype)
        bridge = _around(deepcopy(source) if processing else source, tokenizer)
    elif isinstance(source, str | Path):
        bridge = _booted(str(source), tokenizer, device, dtype_named(dtype) or torch.float32)
    else:
        raise FeatpatchError(
            f"the model is a {type(source).__name__}: expected a name, a folder, a Hugging Face model with its tokenizer, or a "
            "TransformerBridge or HookedTransformer"
        )
    if processing:
        try:
            bridge.enable_compatibility_mode(disable_warnings=True, **{name: name in processing for name in PROCESSED})
        except Exception as error:
            raise FeatpatchError(
                f"the weights can't be processed by {list(processing)} ({short(error)}): expected an architecture whose "
                "weights TransformerLens can process; pass processing=[] to leave the weights unchanged"
            ) from error
        if "center_writing_weights" in processing and "center_writing_weights" not in processing_steps(BridgeLens(bridge)):
            raise FeatpatchError(
                "TransformerLens did not centre the weights of this architecture (it does only where LayerNorm subtracts the "
                "mean): expected processing without 'center_writing_weights'; leave it out"
            )
    return bridge


def _check_unused(model: torch.nn.Module, device: str, **given: Any) -> None:
    """Raise a FeatpatchError if an argument is given that a model in memory has no use for, or a GPU that it is not on."""
    kind, here = type(model).__name__, next(model.parameters()).device
    for name, value in given.items():
        if value is not None:
            raise FeatpatchError(
                f"{name}={value!r:.60} with a {kind}: expected None, because the model is used as it is; leave {name} out, or "
                "change the model before you pass it"
            )
    if torch.device(device).type not in ("cpu", here.type):
        raise FeatpatchError(
            f"device={device!r} with a {kind} on {here}: expected the device of the model; leave device out, or move the model "
            "before you pass it"
        )


def _booted(source: str, tokenizer: Any, device: str, numbers: torch.dtype) -> TransformerBridge:
    check_there("model", source)
    if (Path(source) / "adapter_config.json").is_file():
        raise FeatpatchError(
            f"{source!r} is the folder of an adapter (adapter_config.json) without its base model: expected a complete model; "
            f"{MERGE}; pass that, or save it with save_pretrained"
        )
    if Path(source).exists():
        folder_with(source, "config.json", "model")
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
            f"the model {source!r} has no tokenizer files: expected the model's own tokenizer; save it there, or pass "
            "tokenizer=..."
        )
    bridge.eval()
    return bridge


def _around(model: PreTrainedModel, tokenizer: Any) -> TransformerBridge:
    if tokenizer is None:
        raise FeatpatchError(f"the {type(model).__name__} has no tokenizer: expected the model's own; pass tokenizer=...")
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
            f"TransformerLens can't load the {type(model).__name__} ({type(error).__name__}: {short(error)}): expected an "
            "architecture that it supports"
        ) from error


def _as_it_is(tokenizer: Any) -> Any:
    """Copy a tokenizer and mark it as adding BOS, because TransformerLens reloads other tokenizers from disk or the hub."""
    given = copy(tokenizer)
    given.init_kwargs = {"name_or_path": "", **tokenizer.init_kwargs, "add_bos_token": True}
    return given


CENTRED = 1e-3
"""Maximum mean over coordinates of a residual stream that counts as centred, as a fraction of its root mean square."""


def processing_steps(lens: Lens) -> Sequence[str]:
    """Return the processing steps that the weights have gone through: `fold_ln`, `center_writing_weights`, both or neither."""
    done = []
    if trivial_norms(lens):
        done.append("fold_ln")
    stream = lens.read(torch.tensor([[0, 1, 2]]), [sites.resid_pre(lens.n_layers - 1)])[sites.resid_pre(lens.n_layers - 1)]
    stream = stream.double()
    if bool((stream.mean(-1).abs() <= CENTRED * stream.square().mean(-1).sqrt()).all()):
        done.append("center_writing_weights")
    return done


def trivial_norms(lens: Lens) -> bool:
    """Return whether the norms before attention and MLP have no weight other than 1.

    The weight may be folded, or was never trained.
    """
    norms = _norms(lens)
    return bool(norms) and all(norm.weight is None or bool((norm.weight == 1).all()) for norm in norms)


def folded(lens: Lens) -> bool:
    """Return whether the weights of the norms before attention and MLP are folded into the weights that read their output."""
    gone = all(norm.weight is None for norm in _norms(lens)) or getattr(lens.model, "_weights_processed", False)
    return trivial_norms(lens) and bool(gone)


def _norms(lens: Lens) -> list[Norm]:
    cfg = lens.model.cfg
    found = [norm_of(getattr(block, name, None), cfg) for block in lens.model.blocks for name in ("ln1", "ln2")]
    return [norm for norm in found if norm is not None]
