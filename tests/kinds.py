"""Every kind of dictionary, small, random and in float64, for any pair of hooks.

BatchTopK and Matryoshka SAEs are trained for a few steps and saved, since sae-lens has no inference class of their own.
"""

import tempfile
from collections.abc import Callable
from typing import Any

import libraries
import sae_lens as sl
import torch
from sae_lens.saes.sae import TrainStepInput
from small import FEATURES, Small, at, randomised

import featpatch as fp

Builder = Callable[..., Any]


def autoencoder(sae_class: type, config_class: type, **settings: Any) -> Builder:
    def build(hook: str, width: int, seed: int = 0, **options: Any) -> Any:
        config = config_class(width, FEATURES, "float64", metadata=at(hook), **{**settings, **options})
        return positive_thresholds(randomised(sae_class(config), seed))

    return build


def transcoder(sae_class: type, config_class: type) -> Builder:
    def build(hook: str, width: int, hook_out: str, width_out: int, seed: int = 0, **options: Any) -> Any:
        config = config_class(
            width, FEATURES, "float64", d_out=width_out, apply_b_dec_to_input=False, metadata=at(hook, hook_out), **options
        )
        return positive_thresholds(randomised(sae_class(config), seed))

    return build


def trained(sae_class: type, config_class: type, **settings: Any) -> Builder:
    def build(hook: str, width: int, seed: int = 0, **options: Any) -> Any:
        torch.manual_seed(seed)
        config = config_class(width, FEATURES, "float64", metadata=at(hook), k=6.0, **{**settings, **options})
        sae = sae_class(config)
        optimizer = torch.optim.Adam(sae.parameters(), lr=0.01)
        for step in range(20):
            x = torch.randn(64, width, dtype=torch.float64)
            output = sae.training_forward_pass(TrainStepInput(x, {}, None, step, False))
            optimizer.zero_grad()
            output.loss.backward()
            optimizer.step()
        with tempfile.TemporaryDirectory() as folder:
            sae.save_inference_model(folder)
            return sl.SAE.load_from_disk(folder)

    return build


def matching_pursuit(hook: str, width: int, seed: int = 0, **options: Any) -> Any:
    sae = autoencoder(sl.MatchingPursuitSAE, sl.MatchingPursuitSAEConfig, max_iterations=5)(hook, width, seed, **options)
    sae.W_dec.data /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae


def temporal(hook: str, width: int, seed: int = 0, **options: Any) -> Any:
    config = sl.TemporalSAEConfig(
        width, FEATURES, "float64", n_heads=2, bottleneck_factor=2, kval_topk=8, tied_weights=False, metadata=at(hook), **options
    )  # fmt: skip
    return randomised(sl.TemporalSAE(config), seed)


def positive_thresholds(sae: Any) -> Any:
    if hasattr(sae, "threshold"):
        sae.threshold.data.abs_()
    return sae


READS = ("blocks.0.hook_resid_post", 16)
"""Where transcoders read in the matrix: before everything that they write."""
SITES = {
    "resid_pre": ("blocks.1.hook_resid_pre", 16),
    "resid_mid": ("blocks.1.hook_resid_mid", 16),
    "resid_post": ("blocks.1.hook_resid_post", 16),
    "attn_out": ("blocks.1.hook_attn_out", 16),
    "mlp_out": ("blocks.1.hook_mlp_out", 16),
    "hook_z": ("blocks.1.attn.hook_z", 16),
    "mlp.hook_pre": ("blocks.1.mlp.hook_pre", 32),
    "mlp.hook_post": ("blocks.1.mlp.hook_post", 32),
}
AUTOENCODERS: dict[str, Builder] = {
    "standard": autoencoder(sl.StandardSAE, sl.StandardSAEConfig),
    "JumpReLU": autoencoder(sl.JumpReLUSAE, sl.JumpReLUSAEConfig),
    "TopK": autoencoder(sl.TopKSAE, sl.TopKSAEConfig, k=6),
    "TopK, scaled by decoder norms": autoencoder(sl.TopKSAE, sl.TopKSAEConfig, k=6, rescale_acts_by_decoder_norm=True),
    "BatchTopK": trained(sl.BatchTopKTrainingSAE, sl.BatchTopKTrainingSAEConfig),
    "Matryoshka": trained(
        sl.MatryoshkaBatchTopKTrainingSAE, sl.MatryoshkaBatchTopKTrainingSAEConfig, matryoshka_widths=[8, 16, FEATURES]
    ),
    "Gated": autoencoder(sl.GatedSAE, sl.GatedSAEConfig),
    "AbsTopK": autoencoder(sl.AbsTopKSAE, sl.AbsTopKSAEConfig, k=6),
    "matching pursuit": matching_pursuit,
    "temporal": temporal,
}
TRANSCODERS: dict[str, Builder] = {
    "transcoder": transcoder(sl.Transcoder, sl.TranscoderConfig),
    "skip transcoder": transcoder(sl.SkipTranscoder, sl.SkipTranscoderConfig),
    "JumpReLU transcoder": transcoder(sl.JumpReLUTranscoder, sl.JumpReLUTranscoderConfig),
    "JumpReLU skip transcoder": transcoder(sl.JumpReLUSkipTranscoder, sl.JumpReLUSkipTranscoderConfig),
}


class Squared(torch.nn.Module):
    """Somebody's own dictionary, whose decoder is not linear."""

    def __init__(self, width: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.into = torch.nn.Parameter(0.4 * torch.randn(width, FEATURES, generator=generator, dtype=torch.float64))
        self.out = torch.nn.Parameter(0.4 * torch.randn(FEATURES, width, generator=generator, dtype=torch.float64))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.into).relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return (features + 0.3 * features**2) @ self.out


class ByHand:
    """A transcoder of sparsify as plain encode, decode and skip path."""

    def __init__(self, library: libraries.SparseCoder) -> None:
        self.encode, self.decode = library.features, library.decode


def of_sparsify(hook: str, width: int, activation: str, skip: bool) -> tuple[Any, Any]:
    """A transcoder that reads and writes at the site, where widths agree, and the same by hand."""
    library = libraries.drawn(libraries.SparseCoder(activation, transcode=True, skip=skip, width=width)).requires_grad_(False)
    path = (lambda x: x @ library.W_skip.T) if skip else None
    return fp.dictionaries.adapt(library, hook, hook_out=hook), fp.dictionaries.adapt(
        ByHand(library), hook, d_in=width, skip=path
    )


def itself(source: Any) -> tuple[Any, Any]:
    return source, source


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean[:2], small.corrupted[:2], small.correct[:2], small.wrong[:2])


OTHERS: dict[str, Builder] = {
    "your own, by `fp.dictionaries.adapt`": lambda small, hook, width: itself(
        fp.dictionaries.adapt(Squared(width), hook, d_in=width)
    ),
    "coordinates, `fp.dictionaries.identity`": lambda small, hook, width: itself(fp.dictionaries.identity(small.model, hook)),
    "principal components, `fp.dictionaries.pca`": lambda small, hook, width: itself(
        fp.dictionaries.pca(small.model, hook, pairs_of(small), components=5)
    ),
    "TopK skip transcoder, of sparsify": lambda small, hook, width: of_sparsify(hook, width, "topk", True),
    "groupmax transcoder, of sparsify": lambda small, hook, width: of_sparsify(hook, width, "groupmax", False),
}
"""Those that are not of sae-lens, each with the same written out for the oracle: an `fp.dictionaries.adapt` of plain encode and decode."""

KINDS = [*AUTOENCODERS, *TRANSCODERS, *OTHERS]


def built(small: Small, kind: str, site: str) -> tuple[Any, Any]:
    """The dictionary of a cell of the matrix, and what the oracle takes for it; transcoders write at the site."""
    hook, width = SITES[site]
    if kind in OTHERS:
        return OTHERS[kind](small, hook, width)
    if kind in TRANSCODERS:
        sae = TRANSCODERS[kind](*READS, hook, width, seed=3)
    else:
        flat = site != "hook_z" or kind in ("BatchTopK", "Matryoshka")
        sae = AUTOENCODERS[kind](hook, width, seed=3, **({} if flat else {"reshape_activations": "hook_z"}))
    return sae, sae
