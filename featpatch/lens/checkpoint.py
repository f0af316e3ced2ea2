"""Load the weights of a Hugging Face model completely or not at all, from safetensors files only.

By itself, transformers fills missing tensors with random values, drops tensors that the model has no place for, and reads a
pickle if an index names one. At most it logs a message.
"""

import logging
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from threading import get_ident
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import safe_open
from transformer_lens.model_bridge.sources.transformers import (
    determine_architecture_from_hf_config,
    get_hf_model_class_for_architecture,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from featpatch.errors import FeatpatchError, FeatpatchWarning
from featpatch.files import read_json
from featpatch.lens.sources import numerically

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
        raise FeatpatchError(f"config.json of {source!r} names the weights {named!r}: {_INSIDE}")
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
        f"there is no safetensors file in {source!r} ({' or '.join(names)}): expected the model's weights in one, since a "
        "pickle (.bin, .pt) can run code when it is read; save the model again with save_pretrained"
    )


_INSIDE = "expected .safetensors files inside its folder alone; download or save the model again"


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
        raise FeatpatchError(f"{str(path)!r} names the weights {_listed(set(strays))}: {_INSIDE}")
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
    wrong = [f"{len(names)} tensor{'s'[: len(names) - 1]} {how} ({_listed(names)})" for how, names in kinds if names]
    if wrong:
        raise FeatpatchError(f"the weights in {source!r} are not those of its config.json, {', '.join(wrong)}: {EXPECTED}")
    if surplus:
        warnings.warn(
            f"{len(surplus)} of the weights in {source!r} belong to no part of the {type(model).__name__} and are left out: "
            f"{_listed(surplus)}",
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


def _listed(names: Collection[str]) -> str:
    """List the first few names in numerical order."""
    ordered = numerically(names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


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
