"""Codecs for the SAEs and transcoders of sae-lens. A codec uses views of the weights and does not change the user's object.

An SAE in half precision encodes in its own dtype, so that its features are the user's. Activations are decoded, and
subtracted from one another, in float32, because the rounding of a whole activation would hide what one feature adds.

Facts about sae-lens 6.54 that this module relies on: `decode` consumes what the last `encode` left on the object (norms,
means), and reads the heads' width there; a skip transcoder's `decode` leaves the skip path out, and a temporal SAE's the
predicted codes; `expected_average_only_in` is folded into the weights by `from_pretrained`, not by `load_from_disk`.

The hook point in an SAE's metadata can stand for different activations: before or after a norm, with or without the norm's
weight, or with or without the embedding of positions. `hook_of` finds the one that the SAE was trained on.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, TemporalSAE, Transcoder

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.facts import digest
from featpatch.model.lens import Lens
from featpatch.model.loading import PROCESSED, folded, trivial_norms
from featpatch.sae.codec import Code, Codec, State
from featpatch.sae.weights import LAYER_OF_CLT

SCALED = "expected_average_only_in"
"""The normalisation of activations by one factor, which is not always folded into the weights."""
NORMS = ("x_norm_coeff", "ln_mu", "ln_std")
"""Attributes in which a normalising SAE keeps a token's statistics between `encode` and `decode`."""


SIZES = (
    "d_in",
    "d_sae",
    "d_out",
    "d_head",
    "k",
    "kval_topk",
    "n_heads",
    "n_attn_layers",
    "bottleneck_factor",
    "max_iterations",
)
"""Settings that are counts and must be 1 or more."""


def check_sizes(settings: Mapping[str, Any]) -> None:
    """Raise a FeatpatchError unless every count in a configuration is positive and `k` at most `d_sae`."""
    sizes = {name: settings[name] for name in SIZES if isinstance(settings.get(name), (int, float))}
    for name, size in sizes.items():
        most = sizes.get("d_sae", size) if name in ("k", "kval_topk") else size
        if not 1 <= size <= most:
            end = f" to d_sae={most}" if most != size else " or more"
            raise FeatpatchError(f"the SAE's configuration says {name}={size}: expected a whole number of 1{end}")


class SaeCodec(Codec):
    """The codec for a sae-lens object, including normalisation, skip paths and predicted codes.

    Raises:
        FeatpatchError: the object is a layer of a cross-layer transcoder, a size is below 1, a normalisation is neither folded
            in nor known, or the weights have another dtype than the SAE's own `dtype`.
    """

    def __init__(self, sae: SAE[Any], like: torch.Tensor) -> None:
        if _is_summed(sae):
            raise FeatpatchError(
                f"the transcoder of {sae.cfg.metadata.neuronpedia_id or sae.cfg.metadata.hook_name!r}, whose decoders sae-lens "
                f"has summed so that it reconstructs no layer's activation, is {LAYER_OF_CLT}, or "
                "by its name in sae-lens' registry"
            )
        if isinstance(sae, BatchTopKTrainingSAE):
            raise FeatpatchError(
                f"a {type(sae).__name__} encodes a row by its rank in the batch, so differently when other rows are present: "
                "expected an SAE for inference; save it with save_inference_model and load it again"
            )
        check_sizes(vars(sae.cfg))
        held = next((p.dtype for p in sae.parameters()), sae.dtype)
        if held != sae.dtype:
            raise FeatpatchError(
                f"the weights of the SAE of {sae.cfg.metadata.hook_name!r} are {held} and its dtype is {sae.dtype}, to which "
                f"it casts its input: expected the same dtype; convert the SAE with sae.to(dtype={held}), not with .half() or "
                ".float()"
            )
        self.sae, self.dtype = sae, sae.dtype
        self._encoder = self._decoder = _flat(copy(sae))
        if sae.dtype in (torch.bfloat16, torch.float16):
            self._decoder = _flat(deepcopy(sae).to(dtype=torch.float32))
        self.kind = type(sae).__name__
        self.d_in, self.d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
        self.d_out = int(getattr(sae.cfg, "d_out", self.d_in))
        self.scale = _scale(sae)

    @staticmethod
    def hooks(source: Any) -> tuple[str, str] | None:
        """Return the hook points in the SAE's metadata; None for any other object.

        Raises:
            FeatpatchError: the metadata names no hook point, or a single head.
        """
        if not isinstance(source, SAE):
            return None
        metadata = source.cfg.metadata
        if not isinstance(metadata.hook_name, str) or not isinstance(metadata.hook_name_out or "", str):
            raise FeatpatchError(
                "the metadata of an SAE names no hook point: expected the one that it reads; set sae.cfg.metadata.hook_name, "
                "or load it with fp.load_sae(folder, hook=...)"
            )
        if metadata.hook_head_index is not None:
            raise FeatpatchError(
                f"the SAE of {metadata.hook_name!r} reads only head {metadata.hook_head_index}: expected an SAE of the whole "
                "activation; adapt it with fp.dictionaries.adapt, with an encode that picks the head and a decode that fills "
                "the others with zeros"
            )
        return metadata.hook_name, metadata.hook_name_out or metadata.hook_name

    def encode(self, x: torch.Tensor) -> Code:
        """Return the features (a temporal SAE's novel codes) and, as the state, norms, means, skip path and predicted codes."""
        sae, wide = self._encoder, self._decoder.dtype
        scaled = x.to(device=sae.device, dtype=sae.dtype) * self.scale
        state = {}
        if isinstance(sae, TemporalSAE):
            features, state["predicted"] = sae.encode_with_predictions(scaled)
        else:
            features = sae.encode(scaled)
        state |= {name: sae.__dict__.pop(name) for name in NORMS if name in sae.__dict__}
        if hasattr(sae, "W_skip"):
            state["skip"] = x.to(self._decoder.W_skip) @ self._decoder.W_skip.T
        features = features.to_dense() if features.is_sparse else features
        return Code(features.to(wide), {name: value.to(wide) for name, value in state.items()})

    def decode(self, features: torch.Tensor, state: State) -> torch.Tensor:
        """Return the full reconstruction, including the skip path and predicted codes that sae-lens' `decode` leaves out."""
        decoder = self._decoder
        decoder.__dict__.update({name: state[name] for name in NORMS if name in state})
        with _quiet():
            decoded = decoder.decode(features + state["predicted"] if "predicted" in state else features)
        return decoded / self.scale + state["skip"] if "skip" in state else decoded / self.scale

    def rows(self, features: torch.Tensor) -> torch.Tensor | None:
        """Return rows of the decoder's weights; None if there is no matrix of the expected shape."""
        weights = getattr(self._decoder, "W_dec", None)
        if not isinstance(weights, torch.Tensor) or weights.shape != (self.d_sae, self.d_out):
            return None
        return weights[features.to(weights.device)] / self.scale

    def encoders(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the encoder's vectors and biases, see `Codec.encoders`; None for other encoders and norms at run time."""
        sae, weight, bias = self.sae, getattr(self.sae, "W_enc", None), getattr(self.sae, "b_enc", None)
        known = isinstance(weight, torch.Tensor) and isinstance(bias, torch.Tensor)
        if not known or sae.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            return None
        at, wide = features.to(sae.device), self._decoder.dtype
        rows, biases = sae.W_enc.detach()[:, at].T.to(wide), sae.b_enc.detach()[at].to(wide)
        if sae.cfg.apply_b_dec_to_input and not isinstance(sae, Transcoder):
            biases = biases - rows @ sae.b_dec.detach().to(wide)
        if getattr(sae.cfg, "rescale_acts_by_decoder_norm", False):
            norms = sae.W_dec.detach()[at].to(wide).norm(dim=-1)
            rows, biases = rows * norms[:, None], biases * norms
        return rows * self.scale, biases

    def pull_skip(self, gradient: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient through the skip path of a skip transcoder."""
        if not hasattr(self._decoder, "W_skip"):
            return None
        weight: torch.Tensor = self._decoder.W_skip.detach()
        return gradient @ weight.to(gradient)

    def digest(self) -> str:
        """Return a digest of the weights and the configuration."""
        settings = json.dumps(self.sae.cfg.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(f"{digest(self.sae)} {settings}".encode()).hexdigest()


def _flat(sae: Any) -> Any:
    """Make an SAE, which must be a copy, take flat activations and keep its own statistics; return it."""
    for name in NORMS:
        sae.__dict__.pop(name, None)
    sae._setup_activation_normalization()  # its functions keep statistics on the object they were made for
    sae.turn_off_forward_pass_hook_z_reshaping()
    return sae


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the warning of sae-lens about predicted codes, which are added here, until the context ends."""
    log = logging.getLogger("sae_lens")
    log.addFilter(_silence)
    try:
        yield
    finally:
        log.removeFilter(_silence)


def _silence(record: logging.LogRecord) -> bool:
    """Return False for the warning that a temporal SAE's `decode` leaves the predicted codes out; they are added here."""
    return "only decodes x_novel" not in record.getMessage()


def _is_summed(sae: Any) -> bool:
    """Return whether a transcoder is one layer of a cross-layer transcoder, with the decoders of all layers summed.

    sae-lens has no field that says so. It can be recognised by the name on Neuronpedia, by weights that still have a layer
    axis, or by the metadata that sae-lens' loader for these transcoders leaves: in the form before version 6 and without the
    training prompts, which all others have.
    """
    said = sae.cfg.metadata
    if re.search(r"\bclts?\b", f"{said.neuronpedia_id} {said.model_name} {said.hook_name} {said.hook_name_out}".lower()):
        return True
    if any(weight.ndim > 2 for weight in sae.parameters()) or isinstance(said.hook_name_out, (list, tuple)):
        return True
    without_prompts = not {"context_size", "dataset_path"} & set(said.keys()) and "neuronpedia_id" in said
    return isinstance(sae, Transcoder) and without_prompts and said.model_from_pretrained_kwargs == {"fold_ln": False}


def _scale(sae: Any) -> float:
    """Return the factor on activations that is not folded into the weights.

    Raises:
        FeatpatchError: the factor is not known, or whitening is not folded in.
    """
    normalisation = sae.cfg.normalize_activations
    if normalisation == "covariance_whitening":
        raise FeatpatchError(
            f"{type(sae).__name__} has normalize_activations='covariance_whitening' and its whitening is not folded into its "
            "weights: expected folded weights; call sae.fold_activation_whitening with the statistics of its training, or "
            "load its folder with fp.load_sae"
        )
    if normalisation != SCALED:
        return 1.0
    scale = sae.cfg.metadata.norm_scaling_factor
    if scale is None:
        raise FeatpatchError(
            f"{type(sae).__name__} has normalize_activations={SCALED!r} and its scale is not folded into its "
            "weights, so its features are wrong on raw activations: expected folded weights; load it with fp.load_sae(path, "
            "norm_scaling_factor=...), or call sae.fold_activation_norm_scaling_factor(scale) with the scale from its "
            "training"
        )
    return float(scale)


@dataclass(frozen=True)
class Training:
    """The known facts about the training of an SAE; None or empty means unknown.

    Attributes:
        known: whether the SAE has a configuration, as sae-lens objects have.
        model: the model's name.
        processing: the processing of the model's weights, from `PROCESSED`.
        explained_variance: the explained variance that the configuration or the registry claims.
        folded: whether the weights of norms were folded. This is what the configuration says; if it does not say, but names a
            model or a module, they count as not folded, because sae-lens leaves weights as they are.
        module: the hook point that holds the input or output of the Hugging Face module that the configuration names.
        context_size: the number of tokens of a training prompt.
        prepend_bos: whether training prompts began with BOS.
    """

    known: bool = False
    model: str | None = None
    processing: tuple[str, ...] = ()
    explained_variance: float | None = None
    folded: bool | None = None
    module: str | None = None
    context_size: int | None = None
    prepend_bos: bool = False

    @classmethod
    def of(cls, sae: Any) -> "Training":
        """Read the metadata of a sae-lens object; nothing is known about any other object."""
        if not isinstance(sae, SAE):
            return cls()
        said = sae.cfg.metadata
        options = said.model_from_pretrained_kwargs if isinstance(said.model_from_pretrained_kwargs, dict) else {}
        model = said.model_name if isinstance(said.model_name, str) else None
        module = sites.of_module(said.hf_hook_name) if isinstance(said.hf_hook_name, str) else None
        return cls(
            known=True,
            model=model,
            processing=tuple(name for name in PROCESSED if options.get(name)),
            explained_variance=_share(said.explained_variance),
            folded=bool(options.get("fold_ln")) if "fold_ln" in options or model or module else None,
            module=module,
            context_size=said.context_size if isinstance(said.context_size, int) else None,
            prepend_bos=bool(said.prepend_bos),
        )


def _share(claim: object) -> float | None:
    """Return a claimed explained variance as a fraction, even if it is given in per cent; None if the claim is not valid."""
    if not isinstance(claim, (int, float)) or not 0 < claim <= 100:
        return None
    return float(claim) if claim <= 1 else claim / 100


def hook_of(lens: Lens, said: Training, name: str) -> str:
    """Return the hook point of the model that holds what a dictionary was trained on, from the name in its configuration.

    Raises:
        FeatpatchError: there is no such hook point, or the name is ambiguous.
    """
    if said.known and sites.is_mlp_in(name):
        if said.module is None:
            layer = sites.layer_of(name)
            stream = sites.component(layer, "resid_mid")
            stream = stream if stream in lens.hook_points else sites.resid_pre(layer)
            raise FeatpatchError(
                f"the SAE names the hook {name!r}, which is the residual stream before the norm in TransformerLens and the "
                "norm's output for transcoders of Gemma Scope 2, and its metadata has no hf_hook_name that tells which: "
                f"expected an unambiguous name; set sae.cfg.metadata.hook_name to {stream!r} or to "
                f"{sites.read_by_mlp(layer)!r}"
            )
        name = said.module
    weighted = sites.weighted(name) if said.known and said.folded is None else None
    if weighted is not None and weighted in lens.hook_points and not folded(lens) and not trivial_norms(lens):
        raise FeatpatchError(
            f"the SAE names the hook {name!r}, which is the norm's output without the norm's weight, and its metadata does not "
            "say whether it was trained without the weight (as Gemma Scope 1 was) or with it: if with, set "
            f"sae.cfg.metadata.hook_name to {weighted!r}; if without, set metadata.model_name, or "
            "metadata.model_from_pretrained_kwargs = {'fold_ln': True}"
        )
    if name == sites.EMBEDDING and name in lens.hook_points:
        return _embedding(lens)
    return _after_norm(lens, said, name) if sites.after_norm(name) else lens.site(name)


def _embedding(lens: Lens) -> str:
    """Return the hook point at the input of the first layer; raise a FeatpatchError unless it holds the embedding."""
    entry = sites.resid_pre(0)
    both = lens.read(torch.tensor([[0, 1, 2]]), [sites.EMBEDDING, entry])
    if not torch.equal(both[sites.EMBEDDING], both[entry]):
        raise FeatpatchError(
            f"the SAE reads {sites.EMBEDDING!r}, to which this model adds positions, or which it scales or normalises, before "
            f"the first layer: expected an SAE of a layer's hook point; {entry!r} holds the result, but this SAE was not "
            "trained on it"
        )
    return entry


def _after_norm(lens: Lens, said: Training, name: str) -> str:
    """Return the hook point for a dictionary of a norm's output, which includes the norm's weight unless that is folded.

    Raises:
        FeatpatchError: the weight was folded in the training but is not in this model, or the other way round.
    """
    is_folded = folded(lens)
    was_folded = is_folded if said.folded is None else said.folded
    if name not in lens.hook_points and sites.normalized(name) in lens.hook_points:
        if is_folded and was_folded:
            return sites.normalized(name)
        raise FeatpatchError(
            f"the model has no hook {name!r}, and none that holds the norm's output with its weight: expected a "
            "HookedSAETransformer or a TransformerBridge with unprocessed weights; use fp.load, or "
            "HookedSAETransformer.from_pretrained_no_processing"
        )
    if is_folded and not was_folded:
        raise FeatpatchError(
            f"the SAE of {name!r} was trained with the weight of the norm, which in this model is folded into the MLP or "
            "attention: expected weights processed as in its training; load the model with processing=[]"
        )
    if was_folded and not is_folded and not trivial_norms(lens):
        raise FeatpatchError(
            f"the SAE of {name!r} was trained without the weight of the norm, which in this model is not folded: expected "
            "weights processed as in its training; load the model with processing=['fold_ln'], or set "
            f"sae.cfg.metadata.hook_name to {sites.normalized(name)!r}, which holds the same values"
        )
    return lens.site(name)
