"""Read dictionaries of other libraries, from their folders or from objects in memory, and convert them to one layout.

| library | files | objects |
|---|---|---|
| dictionary_learning | `ae.pt`, `config.json` | `AutoEncoder`, `AutoEncoderTopK`, ... |
| sparsify | `sae.safetensors`, `cfg.json` | `SparseCoder` |
| circuit-tracer | `layer_N.safetensors`, `config.yaml` | `SingleLayerTranscoder` |
| Gemma Scope 1 and 2 | `params.npz`; `params.safetensors`, `config.json` | |

Files are read as tensors, numbers and text; no code in them is ever run. Objects are recognised by the name of their module, so
none of these libraries has to be installed.
"""

import errno
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.files import read_json, read_yaml
from featpatch.sae.weights import Weights
from featpatch.untrusted import short

LIBRARIES = {"dictionary_learning": "dictionary_learning", "sparsify": "sparsify", "circuit_tracer": "circuit-tracer"}
"""Names of libraries for messages, by the name of their Python package."""


def library_of(source: Any) -> str | None:
    """Return the name of the library in `LIBRARIES` that defines an object's class; None if none does.

    A subclass that is defined elsewhere is not recognised, because it may compute something else.
    """
    modules = type(source).__module__.split(".")
    return next((name for module, name in LIBRARIES.items() if module in modules), None)


def of_object(source: Any) -> Weights | None:
    """Copy the weights of an object of one of the libraries; None for any other object.

    Raises:
        FeatpatchError: the object is of one of the libraries, but its class is not supported.
    """
    library, kind = library_of(source), type(source).__name__
    if library is None or (library == "dictionary_learning" and kind not in CLASSES):
        return None
    if library == "circuit-tracer" and kind == "TranscoderSet":
        raise FeatpatchError(
            "a TranscoderSet of circuit-tracer holds a transcoder for each layer: expected a single transcoder; adapt one, "
            "such as saes[3]"
        )
    origin = f"the {kind} of {library}"
    if not isinstance(source, torch.nn.Module):
        raise FeatpatchError(f"{origin} is not a torch module with weights: expected a loaded SAE or transcoder of {library}")
    state = {name: value.detach().clone() for name, value in source.state_dict().items()}
    if library == "dictionary_learning":
        subtracts = bool(getattr(source, "apply_b_dec_to_input", False))
        weights = _dictionary_learning(origin, state, kind, None, subtracts)
        groups = getattr(source, "group_indices", None)
        if groups is not None:  # Matryoshka SAEs can switch the last groups off
            active = int(groups[source.active_groups])
            for name in ("W_enc", "b_enc"):
                weights.tensors[name][..., active:] = 0
        return weights
    if library == "sparsify":
        return _sparsify(origin, state, {**vars(source.cfg), "d_in": source.d_in}, None)
    for name in ("W_enc", "W_dec"):  # lazily loaded weights are not in the state
        state.setdefault(name, getattr(source, name).detach())
    return _circuit_tracer(origin, state, source.activation_function)


def read(path: Path) -> Weights | None:
    """Read the weights in a folder or file of one of the libraries; None if it is of none of them.

    Raises:
        FeatpatchError: the file is damaged, or its type is not supported.
    """
    if path.suffix == ".safetensors" and path.name not in READERS:
        return _circuit_tracer_file(path) if path.is_file() else None
    folder = path.parent if path.name in READERS else path
    if not folder.is_dir():
        layer = path.with_name(f"{path.name}.safetensors")
        return _circuit_tracer_file(layer) if layer.is_file() else None
    for file, reader in READERS.items():
        if (folder / file).is_file():
            return reader(folder)
    if (folder / "config.yaml").is_file():
        _circuit_tracer_config(folder)  # raises if the configuration explains why there are no layers
    return None


def tensors_of(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors in a file, by name; no code in it is run.

    Raises:
        FeatpatchError: the file can't be read, or holds something else.
    """
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                state = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        elif path.suffix == ".pt":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_file(path)
    except Exception as error:
        reason = f"{type(error).__name__}: {short(error)}"
        if isinstance(error, OSError) and error.errno == errno.EINVAL:  # torch.load seeks before the start of the file
            reason = f"it is truncated, after {path.stat().st_size} bytes"
        raise FeatpatchError(
            f"{str(path)!r} can't be read ({reason}): expected a complete file with nothing but weights (code in it is never "
            "run); download it again, or save only the state_dict"
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise FeatpatchError(f"{str(path)!r} holds a {type(state).__name__}: expected a state_dict (tensors by name)")
    return {name.removeprefix("_orig_mod."): value for name, value in state.items()}  # torch.compile adds this prefix


def settings_of(path: Path, parse: Callable[[str], Any] = read_json) -> dict[str, Any]:
    """Read the settings in a configuration file.

    Raises:
        FeatpatchError: the file can't be read, or holds something else.
    """
    try:
        value = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise FeatpatchError(
            f"{str(path)!r} can't be read ({reason}): expected the configuration next to the weights"
        ) from error
    if not isinstance(value, dict):
        raise FeatpatchError(f"{str(path)!r} holds a {type(value).__name__}: expected settings by name")
    return value


def _named(
    origin: str, state: Mapping[str, torch.Tensor], names: Mapping[str, str], ignored: Collection[str] = (), skip: str = ""
) -> dict[str, torch.Tensor]:
    """Rename a library's tensors to our names.

    Args:
        names: the library's names and ours; `.T` after ours means that the library stores the transpose.
        ignored: tensors that are not needed.
        skip: the library's name of the skip path, a key of `names` that may be missing from the state.

    Raises:
        FeatpatchError: a tensor is missing, or there is an unknown one.
    """
    there = {name: ours for name, ours in names.items() if name != skip or name in state}
    if missing := [name for name in there if name not in state]:
        raise FeatpatchError(f"{origin} has {', '.join(state)}: expected {', '.join(names)}; {', '.join(missing)} is missing")
    if unknown := [name for name in state if name not in there and name not in ignored]:
        raise FeatpatchError(
            f"{origin} holds {', '.join(unknown)}, whose meaning is unknown: expected only {', '.join(names)}; wrap the "
            "loaded object in an object of your own with encode and decode, and pass that to fp.dictionaries.adapt"
        )
    tensors = {}
    for name, ours in there.items():
        tensor, transposed = state[name], ours.endswith(".T")
        tensors[ours.removesuffix(".T")] = (tensor.mT if transposed and tensor.ndim >= 2 else tensor).contiguous()
    return tensors


def _check_stated(weights: Weights, **stated: Any) -> None:
    """Raise a FeatpatchError unless the widths in a configuration, if it states any, are those of the weights."""
    d_in, d_sae = weights.tensors["W_enc"].shape
    for name, size in stated.items():
        actual = d_in if name in ("d_in", "activation_dim") else d_sae
        if size is not None and (type(size) is not int or size != actual):
            raise FeatpatchError(
                f"{weights.origin}: the configuration says {name}={size!r} and the weights {actual}: expected both to agree; "
                "download or save the folder again"
            )


LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
CLASSES: dict[str, tuple[str, Mapping[str, str]]] = {
    "AutoEncoder": ("relu", {**LINEAR, "bias": "b_dec"}),
    "AutoEncoderNew": ("relu", {**LINEAR, "decoder.bias": "b_dec"}),
    "GatedAutoEncoder": (
        "gated",
        {"encoder.weight": "W_enc.T", "decoder.weight": "W_dec.T", "decoder_bias": "b_dec", "r_mag": "r_mag",
         "gate_bias": "b_gate", "mag_bias": "b_mag"},
    ),
    "JumpReluAutoEncoder": ("jumprelu", {**PLAIN, "threshold": "threshold"}),
    "AutoEncoderTopK": ("topk", {**LINEAR, "b_dec": "b_dec"}),
    "BatchTopKSAE": ("jumprelu", {**LINEAR, "b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("jumprelu", {**PLAIN, "threshold": "threshold"}),
}  # fmt: skip
"""Activation function and tensor names of each class of dictionary_learning. At inference, BatchTopK is a JumpReLU with one
threshold for all features."""


def _dictionary_learning(
    origin: str, state: Mapping[str, torch.Tensor], kind: object, k: Any, subtracts: bool = False
) -> Weights:
    if not isinstance(kind, str) or kind not in CLASSES:
        raise FeatpatchError(f"{origin} is a {str(kind)[:80]!r} of dictionary_learning: expected one of {', '.join(CLASSES)}")
    activation, names = CLASSES[kind]
    stated = state["k"].tolist() if "k" in state else k
    if k is not None and stated != k:
        raise FeatpatchError(
            f"{origin}: the weights say k={str(stated)[:80]} and the configuration k={k}: expected both to agree; download or "
            "save the folder again"
        )
    if activation != "topk":
        stated = None
    elif type(stated) is not int:
        raise FeatpatchError(f"{origin}: k={stated!r}: expected the number of features to keep, in config.json")
    tensors = _named(origin, state, names, ignored=("k", "threshold", "group_sizes"))
    if activation == "jumprelu" and kind != "JumpReluAutoEncoder":
        if tensors["threshold"].ndim:
            raise FeatpatchError(f"{origin}: threshold is {list(tensors['threshold'].shape)}: expected one number")
        tensors["threshold"] = tensors["threshold"].to(tensors["W_enc"].dtype).expand(tensors["b_enc"].shape).contiguous()
    centred = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder") or subtracts
    return Weights(origin, tensors, activation, stated, centred)


def _dictionary_learning_folder(folder: Path) -> Weights:
    settings = settings_of(folder / "config.json")
    given = [settings.get(name) for name in ("trainer", "buffer")]
    trainer, buffer = (value if isinstance(value, dict) else {} for value in given)
    kind = trainer.get("dict_class")
    if kind is None:
        raise FeatpatchError(
            f"{str(folder / 'config.json')!r} does not name the class of ae.pt: expected trainer.dict_class to be one of "
            f"{', '.join(CLASSES)}; add it, or adapt the loaded object with fp.dictionaries.adapt(object, hook)"
        )
    weights = _dictionary_learning(str(folder), tensors_of(folder / "ae.pt"), kind, trainer.get("k"))
    _check_stated(weights, **{name: trainer.get(name) for name in ("activation_dim", "dict_size")})
    if kind == "AutoEncoder":  # its from_pretrained scales every decoder row to norm 1
        norms = weights.tensors["W_dec"].norm(dim=1)
        norms = torch.where(norms > 0, norms, torch.ones_like(norms))
        scaled = {"W_enc": weights.tensors["W_enc"] * norms, "b_enc": weights.tensors["b_enc"] * norms}
        weights = replace(weights, tensors={**weights.tensors, **scaled, "W_dec": weights.tensors["W_dec"] / norms[:, None]})
    place, layer = str(trainer.get("submodule_name") or "resid_post"), trainer.get("layer")
    ending = next((hook for name, hook in (("resid", "hook_resid_post"), ("mlp", "mlp.hook_out"), ("att", "attn.hook_out"))
                   if name in place), None)  # fmt: skip
    if place.startswith("resid_pre"):
        ending = "hook_resid_pre"
    known = ending and type(layer) is int and buffer.get("io", "out") == "out"
    hook = f"blocks.{layer}.{ending}" if known else None
    return replace(weights, reads=hook, writes=hook, model=text_of(trainer.get("lm_name")))


def _sparsify(origin: str, state: Mapping[str, torch.Tensor], cfg: Mapping[str, Any], hookpoint: str | None) -> Weights:
    """Convert sparsify's weights to our layout.

    Args:
        hookpoint: a module of the Hugging Face model; an SAE reads its output, a transcoder reads its input and predicts its
            output.
    """
    activation, k, transcoder = cfg.get("activation", "topk"), cfg.get("k"), cfg.get("transcode", False)
    if activation not in ("topk", "groupmax") or type(k) is not int or type(transcoder) is not bool or cfg.get("signed"):
        raise FeatpatchError(
            f"{origin}: activation={activation!r}, k={k!r}, transcode={transcoder!r}, signed={cfg.get('signed', False)!r}: "
            "expected activation 'topk' or 'groupmax', a number k, transcode true or false, and signed false"
        )
    names = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}
    tensors = _named(origin, state, names, skip="W_skip")
    if ("W_skip" in tensors) != bool(cfg.get("skip_connection", False)) or cfg.get("d_in") != tensors["W_enc"].shape[0]:
        raise FeatpatchError(
            f"{origin}: cfg.json says d_in={cfg.get('d_in')!r}, skip_connection={cfg.get('skip_connection', False)!r} and the "
            f"weights are {', '.join(f'{name} {list(each.shape)}' for name, each in tensors.items())}: expected both to agree"
        )
    weights = Weights(origin, tensors, activation, k, centred=not transcoder, transcoder=transcoder)
    _check_stated(weights, num_latents=cfg.get("num_latents") or None)  # 0 means d_in * expansion_factor
    place = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(mlp|self_attn|attn|attention))?", hookpoint or "")
    if place is None:
        hook = "hook_embed" if hookpoint in ("embed_tokens", "embed_in", "wte") and not transcoder else None
        return replace(weights, reads=hook, writes=hook)
    layer, module = f"blocks.{place[1]}", place[2]
    reads, writes = {None: ("hook_resid_pre", "hook_resid_post"), "mlp": ("mlp.hook_in", "mlp.hook_out")}.get(
        module, ("attn.hook_in", "attn.hook_out")
    )
    return replace(weights, reads=f"{layer}.{reads if transcoder else writes}", writes=f"{layer}.{writes}")


def _sparsify_folder(folder: Path) -> Weights:
    state, cfg = tensors_of(folder / "sae.safetensors"), settings_of(folder / "cfg.json")
    weights = _sparsify(str(folder), state, cfg, folder.resolve().name)
    run = folder.resolve().parent / "config.json"
    return replace(weights, model=text_of(settings_of(run).get("model")) if run.is_file() else None)


def _circuit_tracer(origin: str, state: Mapping[str, torch.Tensor], function: Any = None) -> Weights:
    """Convert circuit-tracer's weights to our layout, without hook points; with no function, JumpReLU or ReLU."""
    names = {**PLAIN, "W_enc": "W_enc.T", "W_skip": "W_skip"}
    name, k = getattr(function, "__name__", type(function).__name__), getattr(function, "k", None)
    activation = {"TopK": "signed_topk", "JumpReLU": "jumprelu", "relu": "relu", "ReLU": "relu"}.get(name)
    if "activation_function.threshold" in state:
        names, activation = {**names, "activation_function.threshold": "threshold"}, "jumprelu"
    elif function is None:
        activation = "relu"
    if activation is None or (activation == "signed_topk" and type(k) is not int):
        raise FeatpatchError(f"{origin} has the activation function {name}: expected relu, JumpReLU or TopK with a number k")
    tensors = _named(origin, state, names, skip="W_skip")
    if activation == "jumprelu" and bool((tensors["threshold"] < 0).any()):
        activation = "jump"  # negative values above a negative threshold are kept
    return Weights(origin, tensors, activation, k if activation == "signed_topk" else None, transcoder=True)


def _circuit_tracer_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a set of transcoders; raise a FeatpatchError if its files are elsewhere."""
    settings = settings_of(folder / "config.yaml", read_yaml)
    files = settings.get("transcoders")
    if isinstance(files, list) and not any(folder.glob("layer_*.safetensors")):
        listed = [str(each.get("filepath") if isinstance(each, dict) else each) for each in files]
        raise FeatpatchError(
            f"{str(folder / 'config.yaml')!r} lists files in other repositories ({', '.join(listed[:3])}, ...): expected the "
            "weights here; load one of those files by its own name, owner/repository/folder, with hook= and hook_out= if its "
            "files do not name the hooks"
        )
    return settings


def _circuit_tracer_file(path: Path) -> Weights:
    settings = _circuit_tracer_config(path.parent) if (path.parent / "config.yaml").is_file() else {}
    weights, layer = _circuit_tracer(str(path), tensors_of(path)), re.search(r"layer_(\d+)$", path.stem)
    reads, writes = (text_of(settings.get(f"feature_{way}_hook")) if layer else None for way in ("input", "output"))
    at = f"blocks.{layer[1]}." if layer else ""
    return replace(
        weights, reads=reads and at + reads, writes=writes and at + writes, model=text_of(settings.get("model_name"))
    )


def _gemma_scope(folder: Path) -> Weights:
    """Read a dictionary for Gemma 2, whose hook point follows from the names of the repository and the folder."""
    path = folder.resolve().as_posix()
    tensors = _named(str(folder), tensors_of(folder / "params.npz"), {**PLAIN, "threshold": "threshold"})
    said = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|mlp|att|transcoders)", path)
    layer = re.search(r"/layer_(\d+)(?:/|$)", path)
    endings = {"res": ("hook_resid_post",) * 2, "mlp": ("hook_mlp_out",) * 2, "att": ("attn.hook_z",) * 2,
               "transcoders": ("mlp.hook_in", "hook_mlp_out")}  # fmt: skip
    reads, writes = [f"blocks.{layer[1]}.{end}" for end in endings[said[3]]] if said and layer else (None, None)
    if said and said[3] == "res" and "/embedding/" in f"{path}/":
        reads = writes = "hook_embed"
    weights = Weights(str(folder), tensors, "jumprelu", reads=reads, writes=writes)
    model = f"gemma-2-{said[1]}{'-it' if said[2] == 'it' else ''}" if said else None
    return replace(weights, transcoder=reads != writes or _changes_width(weights), model=model)


def _gemma_scope_2(folder: Path) -> Weights:
    """Read a dictionary for Gemma 3, whose configuration names the modules that it reads and writes."""
    settings = settings_of(folder / "config.json") if (folder / "config.json").is_file() else {}
    names = {name.lower(): ours for name, ours in PLAIN.items()}
    names |= {"threshold": "threshold", "affine_skip_connection": "W_skip.T"}
    tensors = _named(str(folder), tensors_of(folder / "params.safetensors"), names, skip="affine_skip_connection")
    read = settings.get("hf_hook_point_in")
    hooks = [sites.of_module(str(path)) for path in (read, settings.get("hf_hook_point_out") or read)]
    weights = Weights(str(folder), tensors, "jumprelu", reads=hooks[0], writes=hooks[1])
    named = text_of(settings.get("model_name"))
    return replace(
        weights,
        transcoder=hooks[0] != hooks[1] or _changes_width(weights) or "W_skip" in tensors,
        model=named and named.replace("-v3", "-3"),
    )


def _changes_width(weights: Weights) -> bool:
    return weights.tensors["W_enc"].shape[0] != weights.tensors["W_dec"].shape[1]


def text_of(value: object) -> str | None:
    """Return a setting that is a text; None for an empty or another one."""
    return value if isinstance(value, str) and value else None


READERS: dict[str, Callable[[Path], Weights]] = {
    "ae.pt": _dictionary_learning_folder,
    "sae.safetensors": _sparsify_folder,
    "params.npz": _gemma_scope,
    "params.safetensors": _gemma_scope_2,
}
"""Functions that read a library's folder, by the file that identifies it."""
