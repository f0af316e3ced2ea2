"""Sparse autoencoders of sae-lens, as pairs of functions between an activation and its features.

    x = decode(f) + e,   f = encode(x)        features f [d_sae] and error e always travel together

A dictionary reads at one hook and writes at another; for an autoencoder both are the same, for a transcoder they are
not. Activations are taken flat: `[..., d_in]`, with the heads of `hook_z` side by side.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int

from featpatch.errors import FeatpatchError
from featpatch.lens.digest import digest
from featpatch.lens.lens import Lens

PROBED = 256
"""Decoder directions that are probed together."""

STATELESS = ("none",)
"""Values of `normalize_activations` for which decoding does not depend on the encoded activation."""


@dataclass(frozen=True)
class Split:
    """Activations `x` of one site, split by a dictionary.

    Attributes:
        features: `[..., d_sae]`.
        error: `[..., d_out]`, what the dictionary does not reconstruct.
    """

    features: torch.Tensor
    error: torch.Tensor


@dataclass(frozen=True)
class Dictionary:
    """A sae-lens SAE or transcoder at its hooks.

    Attributes:
        name: unique among the dictionaries of a call.
        reads, writes: hook names in TransformerLens' spelling.
        shape: shape of one activation at `writes`, e.g. `(n_heads, d_head)` for `hook_z`.
    """

    name: str
    sae: Any
    reads: str
    writes: str
    shape: tuple[int, ...]

    @property
    def d_sae(self) -> int:
        """The number of features."""
        return int(self.sae.cfg.d_sae)

    @torch.no_grad()
    def split(self, read: torch.Tensor, written: torch.Tensor) -> Split:
        """Features of the activation at `reads` and the error at `writes`, both `[batch, pos, ...]`, in the SAE's type."""
        heads_apart = self.sae.cfg.reshape_activations == "hook_z"
        features = self.sae.encode(self._moved(read) if heads_apart else self._moved(read).flatten(2))
        error = self._moved(written).flatten(2) - self._decode(features)
        if not torch.isfinite(features).all() or not torch.isfinite(error).all():
            raise FeatpatchError(
                f"{self.name} gives NaN or infinite features or errors: expected finite numbers; check the SAE's weights"
            )
        return Split(features, error)

    @torch.no_grad()
    def decode(self, features: Float[torch.Tensor, "*rows d_sae"]) -> Float[torch.Tensor, "*rows d_out"]:
        """The reconstruction, flat."""
        return self._decode(features)

    @torch.no_grad()
    def directions(self, features: Int[torch.Tensor, " n"]) -> Float[torch.Tensor, "n d_out"]:
        """What one unit of a feature adds to the activation, probed from `decode` (never read from `W_dec`)."""
        chunks = [self._probe(chunk) for chunk in features.split(PROBED)]
        return torch.cat(chunks) if chunks else self._probe(features)

    def digest(self) -> str:
        """SHA-256 of the weights and of the configuration."""
        settings = json.dumps(self.sae.cfg.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(f"{digest(self.sae)} {settings}".encode()).hexdigest()

    def _probe(self, features: torch.Tensor) -> torch.Tensor:
        units = torch.zeros(len(features) + 1, 1, self.d_sae, dtype=self.sae.dtype, device=self.sae.device)
        units[torch.arange(len(features)), 0, features.to(self.sae.device)] = 1
        decoded = self._decode(units)[:, 0]
        return decoded[:-1] - decoded[-1]

    def _decode(self, features: torch.Tensor) -> torch.Tensor:
        return self.sae.decode(features).reshape(*features.shape[:-1], prod(self.shape))

    def _moved(self, activation: torch.Tensor) -> torch.Tensor:
        return activation.to(device=self.sae.device, dtype=self.sae.dtype)


@torch.no_grad()
def dictionaries(lens: Lens, saes: Any) -> list[Dictionary]:
    """Dictionaries of a model, checked against it.

    Args:
        saes: one sae-lens object or several; several may share a hook.

    Raises:
        FeatpatchError: an SAE names no hook or one that the model lacks, has another width than the activation there,
            or decodes in a way that is not a fixed linear map.
    """
    saes = list(saes) if isinstance(saes, Iterable) and not isinstance(saes, torch.nn.Module) else [saes]
    if not saes:
        raise FeatpatchError("there are no SAEs: expected at least one sae-lens SAE or transcoder")
    sites = [_hooks(lens, sae) for sae in saes]
    shapes = _shapes(lens, {hook for pair in sites for hook in pair})
    made: list[Dictionary] = []
    for sae, (reads, writes) in zip(saes, sites, strict=True):
        name = writes if reads == writes else f"{reads} -> {writes}"
        repeated = sum(re.sub(r"#\d+$", "", other.name) == name for other in made)
        name = f"{name}#{repeated + 1}" if repeated else name
        _check_width(name, "reads", reads, prod(shapes[reads]), int(sae.cfg.d_in))
        _check_width(name, "writes", writes, prod(shapes[writes]), int(getattr(sae.cfg, "d_out", sae.cfg.d_in)))
        dictionary = Dictionary(name, sae, reads, writes, shapes[writes])
        _check_linear(dictionary, shapes[reads])
        made.append(dictionary)
    return made


def _hooks(lens: Lens, sae: Any) -> tuple[str, str]:
    metadata = getattr(getattr(sae, "cfg", None), "metadata", None)
    if metadata is None or not hasattr(sae, "encode") or not hasattr(sae, "decode"):
        raise FeatpatchError(f"{type(sae).__name__} is not a sae-lens SAE: expected an object such as SAE.load_from_disk gives")
    if metadata.hook_name is None:
        raise FeatpatchError("an SAE's metadata names no hook: set sae.cfg.metadata.hook_name to the hook that it reads")
    reads = lens.site(metadata.hook_name)
    return reads, lens.site(metadata.hook_name_out) if metadata.hook_name_out else reads


def _shapes(lens: Lens, hooks: set[str]) -> dict[str, tuple[int, ...]]:
    activations = lens.read(torch.zeros(1, 1, dtype=torch.long), sorted(hooks))
    return {hook: tuple(activation.shape[2:]) for hook, activation in activations.items()}


def _check_width(name: str, verb: str, hook: str, found: int, expected: int) -> None:
    if found != expected:
        raise FeatpatchError(
            f"SAE {name!r} {verb} {expected} values and the activation at {hook!r} has {found}: expected an SAE trained on "
            "this hook of this model; load the one that belongs to it"
        )


def _check_rows(dictionary: Dictionary, shape: tuple[int, ...]) -> None:
    """Refuses encoders that look at several rows at once, such as BatchTopK in training: no feature has a value of its own."""
    sae, generator = dictionary.sae, torch.Generator().manual_seed(0)
    read = torch.randn(1, 8, *shape, generator=generator).to(sae.device, sae.dtype)
    written = torch.ones(1, 8, *dictionary.shape, dtype=sae.dtype, device=sae.device)
    together = dictionary.split(read, written).features[0]
    apart = torch.cat([dictionary.split(read[:, row : row + 1], written[:, :1]).features[0] for row in range(8)])
    if not torch.allclose(together, apart, rtol=1e-2, atol=1e-2 * float(together.abs().max())):
        raise FeatpatchError(
            f"SAE {dictionary.name!r} ({type(sae).__name__}) encodes a row differently beside others: expected one that treats "
            "every row alone; save a training SAE with save_inference_model and load it again"
        )


def _check_linear(dictionary: Dictionary, shape: tuple[int, ...]) -> None:
    """Refuses decoders that are no fixed linear map of the features, because one feature has no fixed direction there."""
    sae, normalisation = dictionary.sae, dictionary.sae.cfg.normalize_activations
    if normalisation == "expected_average_only_in":
        raise FeatpatchError(
            f"SAE {dictionary.name!r} has normalize_activations='expected_average_only_in' and its scale is not folded in, so "
            "that its features are wrong on raw activations: call sae.fold_activation_norm_scaling_factor(scale) with the "
            "scale from its training (SAE.from_pretrained does so itself)"
        )
    architecture = sae.cfg.architecture()
    if normalisation not in STATELESS or "skip" in architecture or architecture == "temporal":
        raise FeatpatchError(
            f"SAE {dictionary.name!r} ({architecture}, normalize_activations={normalisation!r}) decodes with more than its "
            "features: expected a decoder that is a fixed linear map; use an SAE without run-time normalisation or skip path"
        )
    _check_rows(dictionary, shape)
    some = torch.tensor([0, dictionary.d_sae - 1])
    both = torch.zeros(1, 1, dictionary.d_sae, dtype=sae.dtype, device=sae.device)
    together = dictionary.decode(both.index_fill(2, some.to(sae.device), 2.0)) - dictionary.decode(both)
    apart = 2 * dictionary.directions(some.unique()).sum(0)
    tolerance = 64 * torch.finfo(sae.dtype).eps * max(1.0, dictionary.decode(both).abs().max().item())
    if not torch.allclose(together[0, 0], apart, rtol=64 * torch.finfo(sae.dtype).eps, atol=tolerance):
        raise FeatpatchError(
            f"SAE {dictionary.name!r} ({architecture}) has a decoder that is not linear: expected decode(a + b) - decode(a) "
            "not to depend on a; use another SAE"
        )
