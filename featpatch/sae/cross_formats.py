"""Read cross-layer transcoders and crosscoders of other libraries, from their folders or from objects in memory.

| library | files | objects |
|---|---|---|
| circuit-tracer: CLTs | `W_enc_N.safetensors`, `W_dec_N.safetensors`, `config.yaml` | `CrossLayerTranscoder` |
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from featpatch.errors import FeatpatchError
from featpatch.sae.cross import Cross, CrossLayerTranscoder
from featpatch.sae.formats import settings_of, text_of
from featpatch.sae.matrices import Matrix, Stored, stored

KEPT = {"encoders": 2**31, "decoders": 2**27}
"""Maximum number of bytes of all encoders or decoders together that are kept in memory; larger ones are read when needed. Every
activation needs the encoders, and few rows of the decoders."""

SETTINGS = ("config.yaml", "config.json")
"""The files that tell what the weights are."""

FILES = (*SETTINGS, "W_enc_*.safetensors", "W_dec_*.safetensors")
"""All files of a dictionary over several layers that `read` needs."""

LAYER_FILE = re.compile(r"W_(enc|dec)_([0-9]{1,6})")
"""The name, without its ending, of a file of a cross-layer transcoder."""

Hook = str | Sequence[str] | None
"""The hook points that the user names: one, several, or none."""


def read(path: Path, hook: Hook = None, hook_out: Hook = None) -> Cross | None:
    """Read a cross-layer transcoder or a crosscoder from a folder; None if there is none.

    Args:
        path: the folder.
        hook, hook_out: the hook points that it reads and writes, if its files name none or other ones.

    Raises:
        FeatpatchError: a file is missing or damaged, its type is not supported, or the hook points are not known.
    """
    if LAYER_FILE.fullmatch(path.name.removesuffix(".safetensors")) and not path.is_dir():
        if path.is_file() or path.with_name(f"{path.name}.safetensors").is_file():
            raise FeatpatchError(
                f"{str(path)!r} is one layer of a cross-layer transcoder (CLT), whose features write to several layers: "
                f"expected the folder of all layers; load {str(path.parent)!r}"
            )
        return None
    if not path.is_dir():
        return None
    settings = settings_of(path / "config.yaml", yaml.safe_load) if (path / "config.yaml").is_file() else {}
    if settings.get("model_kind") == "cross_layer_transcoder" or any(path.glob("W_enc_*.safetensors")):
        try:
            return _circuit_tracer(path, settings, hook, hook_out)
        except FeatpatchError as error:
            raise error if str(path) in str(error) else FeatpatchError(f"{str(path)!r}: {error}") from error
    return None


def _circuit_tracer(folder: Path, settings: dict[str, Any], hook: Hook, hook_out: Hook) -> CrossLayerTranscoder:
    names = [match for file in folder.glob("W_*.safetensors") if (match := LAYER_FILE.fullmatch(file.stem))]
    layers = range(1 + max((int(match[2]) for match in names), default=-1))
    missing = [f"W_{way}_{layer}.safetensors" for layer in layers for way in ("enc", "dec")
               if not (folder / f"W_{way}_{layer}.safetensors").is_file()]  # fmt: skip
    if missing or not names:
        raise FeatpatchError(
            f"{str(folder)!r} lacks {', '.join(missing[:4]) or 'W_enc_0.safetensors'}: expected W_enc_N.safetensors and "
            f"W_dec_N.safetensors for each layer N of a cross-layer transcoder; download all of them"
        )
    found: dict[str, list[Stored]] = {}
    for layer in layers:
        wanted = [f"{part}_{layer}" for part in ("W_enc", "b_enc", "b_dec")]
        own = stored(folder / f"W_enc_{layer}.safetensors", wanted, [f"threshold_{layer}"])
        own |= stored(folder / f"W_dec_{layer}.safetensors", [f"W_dec_{layer}"])
        for name, each in own.items():
            found.setdefault(name.removesuffix(f"_{layer}"), []).append(each)
    if len(found.get("threshold", layers)) < len(layers):
        raise FeatpatchError(f"{str(folder)!r} has thresholds for some layers only: expected them for all layers, or for none")
    small = {part: _stacked(folder, part, found[part]) for part in ("b_enc", "b_dec", "threshold") if part in found}
    threshold, topk = small.get("threshold"), settings.get("activation") == "topk"
    return CrossLayerTranscoder(
        kept("encoders", found["W_enc"]), kept("decoders", found["W_dec"]), small["b_enc"], small["b_dec"], threshold=threshold,
        activation="topk" if topk else jumping(threshold), k=settings.get("k") if topk else None,
        hook=_known(hook, settings.get("feature_input_hook"), len(layers), "hook", "hook_resid_mid"),
        hook_out=_known(hook_out, settings.get("feature_output_hook"), len(layers), "hook_out", "hook_mlp_out"),
        model=text_of(settings.get("model_name")),
    )  # fmt: skip


def jumping(threshold: torch.Tensor | None) -> str:
    """Return the name of circuit-tracer's activation function, which keeps negative values above a negative threshold."""
    return "relu" if threshold is None else "jump" if bool((threshold < 0).any()) else "jumprelu"


def _stacked(folder: Path, part: str, found: Sequence[Stored]) -> torch.Tensor:
    """Read small tensors of all layers and stack them.

    Raises:
        FeatpatchError: they have different shapes.
    """
    if len({each.shape for each in found}) > 1:
        raise FeatpatchError(f"{str(folder)!r}: {part} has different shapes: expected the same in each layer")
    return torch.stack([each.read() for each in found])


def kept(what: str, found: Sequence[Stored]) -> Sequence[Matrix]:
    """Return matrices in memory, if all of them are small enough together (see `KEPT`), or else as they are.

    Encoders that are not kept are read once, one after the other, to check that they are finite. The rows of decoders are
    checked when they are read.
    """
    if sum(torch.Size(each.shape).numel() * each.dtype.itemsize for each in found) <= KEPT[what]:
        return [each.read() for each in found]
    if what == "encoders":
        for each in found:
            each.read()
    return found


def _known(given: Hook, said: Any, layers: int, way: str, example: str) -> Sequence[str]:
    """Return the hook points that the user names, or else the ones of every layer that the configuration names.

    Raises:
        FeatpatchError: neither names any.
    """
    if given is None and not isinstance(said, str):
        raise FeatpatchError(
            f"the files do not say which hook points the dictionary {'reads' if way == 'hook' else 'writes'}: pass {way}=, a "
            f"list with one for each layer, such as [f'blocks.{{layer}}.{example}' for layer in range({layers})]"
        )
    return [f"blocks.{layer}.{said}" for layer in range(layers)] if given is None else given
