"""Weights of a dictionary in one layout, and a module that computes with them what sae-lens has no class for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from featpatch.errors import FeatpatchError
from featpatch.model.facts import TYPES, check_finite

LAYER_OF_CLT = (
    "a single layer of a cross-layer transcoder (CLT), whose features write to several layers: expected the whole of it; load "
    "it with fp.load_sae from the folder or repository with W_enc_N.safetensors and W_dec_N.safetensors for all layers"
)

ARCHITECTURES = {
    ("relu", False, False): "standard",
    ("gated", False, False): "gated",
    ("jumprelu", False, False): "jumprelu",
    ("topk", False, False): "topk",
    ("relu", True, False): "transcoder",
    ("relu", True, True): "skip_transcoder",
    ("jumprelu", True, False): "jumprelu_transcoder",
    ("jumprelu", True, True): "jumprelu_skip_transcoder",
}
"""sae-lens' architecture that computes the same, by activation, whether it is a transcoder, and whether it has a skip path."""


@dataclass(frozen=True)
class Weights:
    """The weights of a dictionary in the layout of sae-lens: f = activation(x W_enc + b_enc), y = f W_dec + b_dec + W_skip x.

    Attributes:
        origin: a description of where the weights come from, for messages.
        tensors: `W_enc` `[d_in, d_sae]`, `W_dec` `[d_sae, d_out]`, `b_dec` and `b_enc`; for the activations "jumprelu" and
            "jump" also `threshold`; for "gated" `b_gate`, `b_mag` and `r_mag` instead of `b_enc`; for a dictionary with a skip
            path `W_skip` `[d_out, d_in]`.
        activation: a key of `ACTIVATIONS`, or "gated".
        k: the number of features that "topk", "signed_topk" and "groupmax" keep.
        centred: whether `b_dec` is subtracted from the input.
        transcoder: whether it predicts an activation other than the one that it reads.
        reads, writes: names of hook points in TransformerLens' spelling, if known.
        model: the model's name, if known.

    Raises:
        FeatpatchError: the shapes do not match, or a weight is not finite.
    """

    origin: str
    tensors: Mapping[str, torch.Tensor]
    activation: str
    k: int | None = None
    centred: bool = False
    transcoder: bool = False
    reads: str | None = None
    writes: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        if any(self.tensors[name].ndim == 3 for name in ("W_enc", "W_dec")):
            raise FeatpatchError(f"{self.origin} is {LAYER_OF_CLT}")
        d_in, d_sae = self.tensors["W_enc"].shape if self.tensors["W_enc"].ndim == 2 else (0, 0)
        d_out = int(self.tensors["b_dec"].numel())
        shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,), "W_skip": (d_out, d_in)}
        for name, tensor in self.tensors.items():
            if tensor.dtype not in TYPES:
                raise FeatpatchError(f"{self.origin}: {name} is {tensor.dtype}: expected one of {', '.join(map(str, TYPES))}")
            if tensor.shape != shapes.get(name, (d_sae,)) or not d_in * d_sae * d_out:
                found = {each: list(other.shape) for each, other in self.tensors.items()}
                raise FeatpatchError(
                    f"{self.origin}: the shapes of the weights do not match ({found}): expected {name} to be "
                    f"{list(shapes.get(name, (d_sae,)))}; download or save the file again"
                )
        check_finite(self.origin, self.tensors)
        if (self.centred and d_in != d_out) or not (self.k is None or 1 <= self.k <= d_sae):
            raise FeatpatchError(
                f"{self.origin}: d_in={d_in}, d_out={d_out}, d_sae={d_sae}, k={self.k}: expected k from 1 to d_sae, and the "
                "same width in and out if b_dec is subtracted from the input"
            )
        if self.activation == "groupmax" and d_sae % (self.k or 1):
            raise FeatpatchError(f"{self.origin}: {d_sae} features in {self.k} groups: expected groups of equal size")

    @property
    def architecture(self) -> str | None:
        """The sae-lens architecture that computes the same; None if there is none."""
        if self.transcoder and self.centred:
            return None
        return ARCHITECTURES.get((self.activation, self.transcoder, "W_skip" in self.tensors))

    def at(self, hook: str | None, hook_out: str | None) -> "Weights":
        """Return the same weights with the hook points that the user names, or else with the known ones.

        Raises:
            FeatpatchError: a hook point is neither named nor known, or an SAE has another width out than in.
        """
        d_in, d_out = self.tensors["W_enc"].shape[0], self.tensors["W_dec"].shape[1]
        if d_in != d_out and not self.transcoder:
            raise FeatpatchError(
                f"{self.origin} reads {d_in} and writes {d_out} values: expected the same width in and out of an SAE; "
                "download or save it again"
            )
        reads = hook or self.reads
        writes = hook_out or (self.writes if hook is None or self.transcoder else hook)
        missing = []
        if reads is None:
            missing.append(f"hook='blocks.N.{'mlp.hook_in' if self.transcoder else 'hook_resid_post'}'")
        if writes is None and self.transcoder:
            missing.append("hook_out='blocks.N.hook_mlp_out'")
        if missing:
            raise FeatpatchError(
                f"{self.origin} does not say at which hook the dictionary {'reads' if reads is None else 'writes'}: pass "
                f"{' and '.join(missing)}, with the hook that it was trained on"
            )
        return replace(self, reads=reads, writes=writes or reads)

    def to(self, dtype: torch.dtype | None, device: str) -> "Weights":
        """Return the same weights on another device and in another dtype; None keeps their own dtype."""
        own = dtype or self.tensors["W_enc"].dtype
        return replace(self, tensors={name: each.to(device=device, dtype=own) for name, each in self.tensors.items()})


def _keep(pre: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the `k` largest values of each row and set the others to zero."""
    top = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter(-1, top.indices, top.values)


def _groupmax(pre: torch.Tensor, k: int) -> torch.Tensor:
    """Keep the largest value of each of `k` groups of adjacent features and set the others to zero."""
    return _keep(pre.unflatten(-1, (k, -1)), 1).flatten(-2)


ACTIVATIONS: dict[str, Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]] = {
    "relu": lambda pre, k, threshold: pre.relu(),
    "jumprelu": lambda pre, k, threshold: pre.relu() * (pre > threshold),
    "jump": lambda pre, k, threshold: pre * (pre > threshold),
    "topk": lambda pre, k, threshold: _keep(pre.relu(), k),
    "signed_topk": lambda pre, k, threshold: _keep(pre, k),
    "groupmax": lambda pre, k, threshold: _groupmax(pre.relu(), k),
}
"""Activation functions of encoders, as functions of `(pre-activation, k, threshold)`."""


class Coder(torch.nn.Module):
    """A dictionary for which sae-lens has no class: any activation function, with or without a skip path.

    It encodes in the dtype of its weights and decodes in float32 at least.
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    b_dec: torch.Tensor
    W_dec: torch.Tensor
    W_skip: torch.Tensor
    threshold: torch.Tensor

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.activation, self.k, self.centred = weights.activation, weights.k or 0, weights.centred
        own = weights.tensors["W_enc"].dtype
        wide = own if own == torch.float64 else torch.float32
        for name in ("W_enc", *sorted(set(weights.tensors) - {"W_enc"})):
            tensor = weights.tensors[name]
            self.register_buffer(name, tensor.to(wide) if name in ("W_dec", "b_dec", "W_skip") else tensor)
        if "threshold" not in weights.tensors:
            self.register_buffer("threshold", torch.zeros_like(self.b_enc))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Return the features, in the dtype of the encoder."""
        centred = x - self.b_dec.to(x) if self.centred else x
        return ACTIVATIONS[self.activation](centred @ self.W_enc + self.b_enc, self.k, self.threshold)

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        """Return the reconstruction without the skip path."""
        return features.to(self.W_dec) @ self.W_dec + self.b_dec

    def skip(self, x: torch.Tensor) -> torch.Tensor:
        """Return the value of the skip path, which is added to the decoded features."""
        return x.to(self.W_skip) @ self.W_skip.T
