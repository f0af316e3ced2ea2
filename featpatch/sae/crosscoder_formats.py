"""Convert crosscoders of dictionary_learning and OpenMOSS, and read featpatch's own, to one layout."""

from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import torch

from featpatch import sites
from featpatch.errors import FeatpatchError, is_finite
from featpatch.model.facts import TYPES
from featpatch.sae.crosscoder import Crosscoder
from featpatch.sae.formats import settings_of, tensors_of, text_of

Hook = str | Sequence[str] | None
Hooks = tuple[Hook, Hook]
"""The hook points that are read and written according to the user: one, several, or None for those that the files name."""

CROSSCODERS = ("CrossCoder", "BatchTopKCrossCoder")
"""dictionary_learning's classes of crosscoders."""


def dictionary_learning(folder: Path, hooks: Hooks) -> Crosscoder:
    """Read a crosscoder as dictionary_learning's trainer saves it, or as its `save_pretrained` does."""
    settings = settings_of(folder / "config.json")
    trained = isinstance(settings.get("trainer"), dict)
    own = settings["trainer"] if trained else settings
    state = tensors_of(folder / ("ae.pt" if trained else "model.safetensors"))
    alphas = [own.get(f"code_normalization_alpha_{way}") for way in ("sae", "cc")]
    layers = own.get("encoder_layers")
    made = learned(state, alphas, layers, hooks)
    made.model = text_of(own.get("lm_name"))
    return made


def learned(state: Mapping[str, torch.Tensor], alphas: Sequence[Any], layers: Any, hooks: Hooks) -> Crosscoder:
    """Convert the weights of a crosscoder of dictionary_learning.

    It normalises activations by a mean and a scale of each hook point, which are folded into the weights. A BatchTopK
    crosscoder compares its features, times the norms of their decoders, with a threshold.

    Args:
        alphas: the factors of two norms in a mixed norm, or None for the library's own.
        layers: the numbers of the hook points that are read, or None for all.
    """
    wanted = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    known = (*wanted, "code_normalization_id", "target_rms", "activation_mean", "activation_std", "activation_global_scale",
             "k", "threshold")  # fmt: skip
    if not set(wanted) <= state.keys() <= set(known) or state["encoder.weight"].ndim != 3 or state["decoder.weight"].ndim != 3:
        raise FeatpatchError(
            f"the crosscoder has {', '.join(f'{name} {list(value.shape)}' for name, value in state.items())}: expected "
            f"{', '.join(wanted)} and perhaps {', '.join(known[4:])}"
        )
    _check_dtypes(state, wanted)
    encoder, bias, decoder, b_dec = (state[name] for name in wanted)
    if isinstance(layers, (list, tuple)) and len(layers) == len(encoder):
        encoder = encoder[sorted(range(len(layers)), key=layers.__getitem__)]
    norms = _norms(decoder, int(state["code_normalization_id"]) if "code_normalization_id" in state else 1, alphas)
    parts = [state.get(f"activation_{part}") for part in ("mean", "std", "global_scale")]
    mean, deviation, scale = parts
    if mean is not None and deviation is not None and scale is not None:
        unknown = torch.isnan(torch.cat([mean, deviation]))
        if unknown.any() and not unknown.all():
            raise FeatpatchError(
                f"{int(unknown.sum())} of {unknown.numel()} values of activation_mean and activation_std are NaN: expected "
                "all, for a crosscoder that does not normalise its activations, or none; download or save it again"
            )
    elif any(part is not None for part in parts):
        raise FeatpatchError("the crosscoder lacks one of activation_mean, _std and _global_scale: expected all, or none")
    if mean is not None and scale is not None and not torch.isnan(mean).any():
        if not len(mean) == len(scale) == len(encoder) == len(decoder):
            raise FeatpatchError(
                f"the crosscoder reads {len(encoder)} hook points, writes {len(decoder)} and normalises {len(mean)}: expected "
                "equal numbers for a crosscoder that normalises its activations"
            )
        factor = scale[:, None, None]
        encoder = encoder * factor
        bias = bias - torch.einsum("ld,ldf->f", mean, encoder)
        decoder, b_dec = decoder / (factor + 1e-8), b_dec / (factor[..., 0] + 1e-8) + mean  # as the library divides
    threshold = state.get("threshold")
    if threshold is not None:
        threshold = threshold.to(encoder.dtype)[..., None].expand(norms.shape)
    return Crosscoder(
        encoder, decoder, bias, b_dec, threshold=threshold, scale=None if threshold is None else norms,
        hook=_listed(hooks[0], "hook", len(encoder)), hook_out=_listed(hooks[1] or hooks[0], "hook_out", len(decoder)),
    )  # fmt: skip


def _norms(decoder: torch.Tensor, kind: int, alphas: Sequence[Any]) -> torch.Tensor:
    """Return the norms of a decoder `[outputs, features, d]` by feature, or by output and feature (the last kind).

    Args:
        kind: dictionary_learning's number of its `CodeNormalization`.
        alphas: as in `learned`.
    """
    by_output, together = decoder.norm(dim=2), decoder.norm(dim=(0, 2))
    alpha, beta = (default if value is None else value for value, default in zip(alphas, (1.0, 0.1), strict=True))
    if not is_finite(alpha) or not is_finite(beta):
        raise FeatpatchError(f"the factors of the mixed norm are {alpha!r:.40} and {beta!r:.40}: expected finite numbers")
    kinds = [by_output.sum(0), together, alpha * together + beta * by_output.sum(0), torch.ones_like(together), by_output]
    if not 1 <= kind <= len(kinds):
        raise FeatpatchError(f"code_normalization_id is {kind}: expected 1 to {len(kinds)}")
    return kinds[kind - 1]


def _check_dtypes(state: Mapping[str, torch.Tensor], names: Sequence[str]) -> None:
    """Raise a FeatpatchError unless weights are floating-point numbers, before arithmetic on them makes them so."""
    for name in names:
        if state[name].dtype not in TYPES:
            raise FeatpatchError(f"{name} is {state[name].dtype}: expected one of {', '.join(map(str, TYPES))}")


def _listed(given: Hook, way: str, count: int) -> Any:
    """Return the hook points that the user names; raise a FeatpatchError if there are none."""
    if given is None:
        raise FeatpatchError(
            f"the files do not say which hook points the crosscoder {'reads' if way == 'hook' else 'writes'}: pass {way}=, a "
            f"list of {count} names in the order of the weights, such as {sites.resid_post(0)!r}"
        )
    return given


def open_moss(folder: Path, hooks: Hooks) -> Crosscoder:
    """Read a crosscoder of OpenMOSS' Language-Model-SAEs.

    It multiplies activations by a factor for each hook point and divides what it decodes by the same, which is folded into the
    weights. It applies its activation function to pre-activations times the norms of the decoder at a hook point, so that a
    feature can be on at one of them and off at another.
    """
    cfg = settings_of(folder / "config.json")
    names, kind, norm = cfg.get("hook_points"), cfg.get("act_fn", "relu"), cfg.get("norm_activation", "dataset-wise")
    by_norm = cfg.get("sparsity_include_decoder_norm", True)
    named = isinstance(names, list) and all(isinstance(name, str) for name in names)
    if cfg.get("sae_type") != "crosscoder" or not named or names is None or not isinstance(by_norm, bool):
        raise FeatpatchError(
            f"sae_type={cfg.get('sae_type')!r}, hook_points={names!r}, sparsity_include_decoder_norm={by_norm!r}: expected a "
            "'crosscoder' of OpenMOSS, the names of its hook points, and true or false; wrap another dictionary with "
            "fp.dictionaries.adapt"
        )
    if kind not in ("relu", "jumprelu", "topk") or norm not in ("dataset-wise", "inference"):
        raise FeatpatchError(
            f"act_fn={kind!r}, norm_activation={norm!r}: expected 'relu', 'jumprelu' or 'topk', and 'dataset-wise' or "
            "'inference'; others depend on the other prompts of the batch, or on the token; save the crosscoder for inference"
        )
    state = tensors_of(folder / "sae_weights.safetensors")
    log_threshold = "activation_function.log_jumprelu_threshold"
    wanted = ["W_E", "b_E", "W_D", "b_D", *([log_threshold] if kind == "jumprelu" else [])]
    averages = [f"dataset_average_activation_norm.{name}" for name in names]
    needed = [*wanted, *(averages if norm == "dataset-wise" else [])]
    if not set(needed) <= state.keys() <= {*wanted, *averages}:
        raise FeatpatchError(f"the weights are {', '.join(sorted(state))}: expected {', '.join(needed)}")
    sizes = {"W_E": 3, "W_D": 3, "b_E": 2, "b_D": 2}
    if any(state[name].ndim != ndim or len(state[name]) != len(names) for name, ndim in sizes.items()):
        shapes = {name: list(state[name].shape) for name in sizes}
        raise FeatpatchError(
            f"the weights are {shapes}: expected one matrix and one bias of each for each of the {len(names)} hook points"
        )
    _check_dtypes(state, needed)
    order = sorted(range(len(names)), key=lambda at: sites.layer_of(names[at]))
    encoder, decoder, b_dec = (state[name][order] for name in ("W_E", "W_D", "b_D"))
    norms = decoder.norm(dim=2)
    if norm == "dataset-wise":
        means = torch.stack([state[averages[at]] for at in order]).to(encoder.dtype)
        factor = (sqrt(encoder.shape[1]) / means)[:, None, None]
        encoder, decoder, b_dec = encoder * factor, decoder / factor, b_dec / factor[..., 0]
    known = [names[at] for at in order]
    return Crosscoder(
        encoder, decoder, state["b_E"].sum(0), b_dec, activation=kind, k=cfg.get("top_k", 50) if kind == "topk" else None,
        threshold=state[log_threshold].exp() if kind == "jumprelu" else None,
        scale=None if kind == "relu" or not by_norm else norms,
        hook=known if hooks[0] is None else hooks[0], hook_out=known if hooks[1] is None else hooks[1],
    )  # fmt: skip


def own_format(folder: Path, hooks: Hooks) -> Crosscoder:
    """Read a crosscoder as `Crosscoder.save` writes it."""
    settings = settings_of(folder / "crosscoder.json")
    names = ("hook", "hook_out", "activation", "k", "name", "model")
    if unknown := sorted(set(settings) - set(names)):
        raise FeatpatchError(f"crosscoder.json has {', '.join(unknown)}: expected {', '.join(names)}")
    state = tensors_of(folder / "crosscoder.safetensors")
    wanted, optional = ("W_enc", "W_dec", "b_enc", "b_dec"), ("threshold", "scale")
    if not set(wanted) <= state.keys() <= {*wanted, *optional}:
        raise FeatpatchError(f"the weights are {', '.join(sorted(state))}: expected {', '.join((*wanted, *optional))}")
    given = {way: hook for way, hook in zip(("hook", "hook_out"), hooks, strict=True) if hook is not None}
    options: dict[str, Any] = {**state, **settings, **given}
    return Crosscoder(**options)
