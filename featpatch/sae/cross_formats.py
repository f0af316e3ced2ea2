"""Read cross-layer transcoders (CLTs) and crosscoders, from the folders of several libraries or from objects in memory.

| library | files | objects |
|---|---|---|
| circuit-tracer | `W_enc_N.safetensors`, `W_dec_N.safetensors`, `config.yaml` | `CrossLayerTranscoder` |
| dictionary_learning | `ae.pt` or `model.safetensors`, `config.json` | `CrossCoder`, `BatchTopKCrossCoder` |
| OpenMOSS | `sae_weights.safetensors`, `config.json` | |
| featpatch, by `Crosscoder.save` | `crosscoder.safetensors`, `crosscoder.json` | |

Nothing is installed or run for it: files are read as tensors, numbers and text, and objects are recognised by their attributes.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from featpatch.errors import FeatpatchError
from featpatch.files import read_json, read_yaml
from featpatch.sae.clt import CrossLayerTranscoder
from featpatch.sae.cross import Cross
from featpatch.sae.crosscoder_formats import CROSSCODERS, Hook, Hooks, dictionary_learning, learned, open_moss, own_format
from featpatch.sae.formats import library_of, settings_of, text_of
from featpatch.sae.matrices import Matrix, Stored, stored
from featpatch.sae.weights import LAYER_OF_CLT
from featpatch.untrusted import short

KEPT = {"encoders": 2**31, "decoders": 2**27}
"""Maximum number of bytes of all encoders or decoders of a CLT that are kept in memory; larger ones are read when needed. Every
activation needs the encoders, but few rows of the decoders."""

SETTINGS = ("config.yaml", "config.json", "crosscoder.json")
"""The files that tell what the weights are."""

MARKS = ("W_enc_0.safetensors", "crosscoder.safetensors")
"""Files that only these dictionaries have."""

LAYER_FILE = re.compile(r"W_(enc|dec)_([0-9]{1,6})")
"""The name, without its ending, of a file of a CLT."""


def files_of(folder: Path) -> list[str]:
    """List the patterns of the files with the weights, according to `SETTINGS`; none if these tell of another dictionary."""
    kind = _kind(folder)
    return list(FORMATS[kind][0]) if kind else []


def _kind(folder: Path) -> str | None:
    """Return the format of a folder, a key of `FORMATS`, or None."""
    traced = _settings(folder, "config.yaml").get("model_kind") == "cross_layer_transcoder"
    if traced or any(folder.glob("W_enc_*.safetensors")):
        return "circuit-tracer"
    if (folder / "crosscoder.json").is_file():
        return "featpatch"
    settings = _settings(folder, "config.json")
    trainer = settings.get("trainer")
    if isinstance(trainer, dict) and trainer.get("dict_class") in CROSSCODERS:
        return "dictionary_learning"
    if {"activation_dim", "dict_size", "num_layers"} <= settings.keys():
        return "dictionary_learning on the hub"
    return "OpenMOSS" if settings.get("sae_type") is not None else None


def _settings(folder: Path, name: str) -> dict[str, Any]:
    """Return the settings in a file; none if it is not there or, since it may belong to another dictionary, not readable."""
    try:
        return settings_of(folder / name, read_yaml if name.endswith(".yaml") else read_json)
    except FeatpatchError:
        return {}


def read(path: Path, hooks: Hooks = (None, None)) -> Cross | None:
    """Read a CLT or a crosscoder from a folder; None if there is none.

    Args:
        path: the folder, or the file with the weights of a crosscoder.
        hooks: the hook points that it reads and writes, if its files name none or other ones.

    Raises:
        FeatpatchError: a file is missing or damaged, its type is not supported, or the hook points are not known.
    """
    if LAYER_FILE.fullmatch(path.name.removesuffix(".safetensors")) and not path.is_dir():
        if path.is_file() or path.with_name(f"{path.name}.safetensors").is_file():
            raise FeatpatchError(f"{str(path)!r} is {LAYER_OF_CLT}, here {str(path.parent)!r}")
        return None
    files = [file for patterns, _ in FORMATS.values() for file in patterns]
    folder = path.parent if path.name in files else path
    kind = _kind(folder)
    if kind is None:
        return None
    try:
        return FORMATS[kind][1](folder, hooks)
    except FeatpatchError as error:
        raise error if str(folder) in str(error) else FeatpatchError(f"{str(folder)!r}: {error}") from error
    except Exception as error:  # of torch or Python, where shapes, dtypes or settings do not go together
        raise FeatpatchError(
            f"{str(folder)!r} holds weights or settings that do not go together ({short(error)}): expected those of a {kind} "
            "dictionary; download or save them again"
        ) from error


def of_object(source: Any, hooks: Hooks, name: str = "") -> Cross | None:
    """Convert a CLT of circuit-tracer or a crosscoder of dictionary_learning in memory; None for any other object.

    The weights are shared with the object.

    Raises:
        FeatpatchError: its activation function is not supported, or the hook points are not known.
    """
    wanted = ("n_layers", "d_transcoder", "feature_input_hook", "feature_output_hook", "b_enc", "b_dec", "activation_function")
    if isinstance(source, torch.nn.Module) and all(hasattr(source, part) for part in wanted):
        made: Cross = _traced(source, hooks)
    elif library_of(source) == "dictionary_learning" and type(source).__name__ in CROSSCODERS:
        state = {part: value.detach() for part, value in source.state_dict().items()}
        alphas = [getattr(source, f"code_normalization_alpha_{way}", None) for way in ("sae", "cc")]
        made = learned(state, alphas, getattr(source.encoder, "encoder_layers", None), hooks)
    else:
        return None
    made.name = name
    return made


def _circuit_tracer(folder: Path, hooks: Hooks) -> CrossLayerTranscoder:
    settings = settings_of(folder / "config.yaml", read_yaml) if (folder / "config.yaml").is_file() else {}
    names = [match for file in folder.glob("W_*.safetensors") if (match := LAYER_FILE.fullmatch(file.stem))]
    layers = range(1 + max((int(match[2]) for match in names), default=-1))
    missing = [f"W_{way}_{layer}.safetensors" for layer in layers for way in ("enc", "dec")
               if not (folder / f"W_{way}_{layer}.safetensors").is_file()]  # fmt: skip
    if isinstance(settings.get("transcoders"), list) and not names:
        raise FeatpatchError(
            f"{str(folder / 'config.yaml')!r} lists files in other places ({', '.join(map(str, settings['transcoders'][:2]))}, "
            "...): expected W_enc_N.safetensors and W_dec_N.safetensors here; save the CLT with circuit-tracer's to_safetensors"
        )
    if missing or not names:
        raise FeatpatchError(
            f"{str(folder)!r} lacks {', '.join(missing[:4]) or 'W_enc_0.safetensors'}: expected W_enc_N.safetensors and "
            "W_dec_N.safetensors for each layer N of a cross-layer transcoder; download all of them"
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
    small = {part: _stacked(part, found[part]) for part in ("b_enc", "b_dec", "threshold") if part in found}
    threshold, topk = small.get("threshold"), settings.get("activation") == "topk"
    return CrossLayerTranscoder(
        _kept("encoders", found["W_enc"]), _kept("decoders", found["W_dec"]), small["b_enc"], small["b_dec"],
        threshold=threshold, activation="topk" if topk else _jumping(threshold), k=settings.get("k") if topk else None,
        hook=_by_layer(hooks[0], settings.get("feature_input_hook"), len(layers), "hook", "hook_resid_mid"),
        hook_out=_by_layer(hooks[1], settings.get("feature_output_hook"), len(layers), "hook_out", "hook_mlp_out"),
        model=text_of(settings.get("model_name")),
    )  # fmt: skip


def _traced(source: Any, hooks: Hooks) -> CrossLayerTranscoder:
    """Convert a CLT of circuit-tracer, whose encoders or decoders may have stayed in its files."""
    layers, folder = int(source.n_layers), getattr(source, "clt_path", None)
    held: dict[str, Any] = {name: getattr(source, name, None) for name in ("W_enc", "W_dec")}
    for name, values in held.items():
        if values is None:
            files = [Path(str(folder)) / f"{name}_{layer}.safetensors" for layer in range(layers)]
            own = [stored(file, [file.stem], [f"{part}_{layer}" for part in ("b_enc", "b_dec", "threshold")])[file.stem]
                   for layer, file in enumerate(files)]  # fmt: skip
            values = [each.to(dtype=source.b_enc.dtype, device=str(source.b_enc.device)) for each in own]
        held[name] = list(values)
    function = source.activation_function
    called = getattr(function, "__name__", type(function).__name__)
    threshold, k = getattr(function, "threshold", None), getattr(function, "k", None)
    if threshold is None and called not in ("relu", "ReLU") and not (called == "TopK" and isinstance(k, int)):
        raise FeatpatchError(
            f"the CrossLayerTranscoder has the activation function {called}: expected relu, JumpReLU or TopK with a number k"
        )
    skip = getattr(source, "W_skip", None)
    return CrossLayerTranscoder(
        held["W_enc"], held["W_dec"], source.b_enc, source.b_dec,
        threshold=None if threshold is None else threshold.detach().reshape(layers, -1),
        activation="topk" if called == "TopK" else _jumping(threshold), k=k if called == "TopK" else None,
        skip=None if skip is None else skip.mT,  # there, the matrices are on the right of the activations
        hook=_by_layer(hooks[0], source.feature_input_hook, layers, "hook", "hook_resid_mid"),
        hook_out=_by_layer(hooks[1], source.feature_output_hook, layers, "hook_out", "hook_mlp_out"),
    )  # fmt: skip


def _jumping(threshold: torch.Tensor | None) -> str:
    """Return the name of circuit-tracer's activation function, which keeps negative values above a negative threshold."""
    return "relu" if threshold is None else "jump" if bool((threshold < 0).any()) else "jumprelu"


def _stacked(part: str, found: Sequence[Stored]) -> torch.Tensor:
    """Read small tensors of all layers and stack them; raise a FeatpatchError if their shapes differ."""
    if len({each.shape for each in found}) > 1:
        raise FeatpatchError(f"{part} has the shapes {[list(each.shape) for each in found]}: expected the same in each layer")
    return torch.stack([each.read() for each in found])


def _kept(what: str, found: Sequence[Stored]) -> Sequence[Matrix]:
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


def _by_layer(given: Hook, said: Any, layers: int, way: str, example: str) -> Any:
    """Return the hook points that the user names, else those of the configuration; raise a FeatpatchError if neither does."""
    if given is None and not isinstance(said, str):
        raise FeatpatchError(
            f"the files do not say which hook points the dictionary {'reads' if way == 'hook' else 'writes'}: pass {way}=, a "
            f"list with one for each layer, such as [f'blocks.{{layer}}.{example}' for layer in range({layers})]"
        )
    return [f"blocks.{layer}.{said}" for layer in range(layers)] if given is None else given


FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Path, Hooks], Cross]]] = {
    "circuit-tracer": (("W_enc_*.safetensors", "W_dec_*.safetensors"), _circuit_tracer),
    "featpatch": (("crosscoder.safetensors",), own_format),
    "dictionary_learning": (("ae.pt",), dictionary_learning),
    "dictionary_learning on the hub": (("model.safetensors",), dictionary_learning),
    "OpenMOSS": (("sae_weights.safetensors",), open_moss),
}
"""The files with the weights and the reader of each format."""
