"""Dictionaries as other libraries have them: what they compute, the names of their weights, their files.

Written from the libraries' sources (dictionary_learning 0.1, eai-sparsify 1.3, circuit-tracer 0.5) and, for the activations, from
the papers: gated (2404.16014), JumpReLU (2407.14435), TopK (2406.04093), BatchTopK (2412.06410), Gemma Scope (2408.05147),
skip transcoders (2501.18823). They stand in for the libraries' own objects, whose modules they name. Nothing here imports
featpatch or sae-lens.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

WIDTH, FEATURES, K = 16, 24, 6


def linear(d_in: int, d_out: int, bias: bool = True) -> nn.Linear:
    return nn.Linear(d_in, d_out, bias=bias, dtype=torch.float64)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


@torch.no_grad()
def largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """All but the k largest of each row are 0, row by row."""
    kept = torch.zeros_like(values)
    for row, out in zip(values.reshape(-1, values.shape[-1]), kept.view(-1, values.shape[-1]), strict=True):
        for index in sorted(range(len(row)), key=lambda entry: -float(row[entry]))[:k]:
            out[index] = row[index]
    return kept


class Dictionary(nn.Module):
    """dictionary_learning's base."""

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return self.decoder(f) + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(x))


class AutoEncoder(Dictionary):
    def __init__(self) -> None:
        super().__init__()
        self.bias = parameter(WIDTH)
        self.encoder, self.decoder = linear(WIDTH, FEATURES), linear(FEATURES, WIDTH, bias=False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (self.encoder(x - self.bias)).clamp(min=0)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return self.decoder(f) + self.bias


class AutoEncoderNew(Dictionary):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = linear(WIDTH, FEATURES), linear(FEATURES, WIDTH)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return self.encoder(x).clamp(min=0)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return self.decoder(f)


class GatedAutoEncoder(Dictionary):
    def __init__(self) -> None:
        super().__init__()
        self.decoder_bias = parameter(WIDTH)
        self.r_mag, self.gate_bias, self.mag_bias = parameter(FEATURES), parameter(FEATURES), parameter(FEATURES)
        self.encoder, self.decoder = linear(WIDTH, FEATURES, bias=False), linear(FEATURES, WIDTH, bias=False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre = self.encoder(x - self.decoder_bias)
        magnitude = (self.r_mag.exp() * pre + self.mag_bias).clamp(min=0)
        return torch.where(pre + self.gate_bias > 0, magnitude, 0)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return self.decoder(f) + self.decoder_bias


class JumpReluAutoEncoder(Dictionary):
    apply_b_dec_to_input = False

    def __init__(self) -> None:
        super().__init__()
        self.W_enc, self.b_enc = parameter(WIDTH, FEATURES), parameter(FEATURES)
        self.W_dec, self.b_dec = parameter(FEATURES, WIDTH), parameter(WIDTH)
        self.threshold = parameter(FEATURES)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        pre = (x - self.b_dec if self.apply_b_dec_to_input else x) @ self.W_enc + self.b_enc
        return torch.where(pre > self.threshold, pre, 0).clamp(min=0)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec + self.b_dec


class AutoEncoderTopK(Dictionary):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("k", torch.tensor(K, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(0.35))
        self.b_dec = parameter(WIDTH)
        self.encoder, self.decoder = linear(WIDTH, FEATURES), linear(FEATURES, WIDTH, bias=False)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return largest(self.encoder(x - self.b_dec).clamp(min=0), int(self.k))


class BatchTopKSAE(AutoEncoderTopK):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        values = self.encoder(x - self.b_dec).clamp(min=0)
        return torch.where(values > self.threshold, values, 0)


class MatryoshkaBatchTopKSAE(JumpReluAutoEncoder):
    active_groups, group_indices = 2, [0, 8, FEATURES]

    def __init__(self) -> None:
        super().__init__()
        del self.threshold
        self.register_buffer("k", torch.tensor(K, dtype=torch.int))
        self.register_buffer("threshold", torch.tensor(0.35))
        self.register_buffer("group_sizes", torch.tensor([8, FEATURES - 8]))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        values = ((x - self.b_dec) @ self.W_enc + self.b_enc).clamp(min=0)
        values = torch.where(values > self.threshold, values, 0)
        values[..., self.group_indices[self.active_groups] :] = 0
        return values


class SparseCoder(nn.Module):
    """sparsify's SAEs and transcoders; `features` are dense, where the library's `encode` gives values and places."""

    def __init__(self, activation: str = "topk", transcode: bool = False, skip: bool = False, width: int = WIDTH) -> None:
        super().__init__()
        self.d_in = width
        self.cfg = SimpleNamespace(
            activation=activation, expansion_factor=32, normalize_decoder=True, num_latents=FEATURES, k=K, multi_topk=False,
            skip_connection=skip, transcode=transcode,
        )  # fmt: skip
        self.encoder, self.W_dec, self.b_dec = linear(width, FEATURES), parameter(FEATURES, width), parameter(width)
        self.W_skip = parameter(width, width) if skip else None

    def features(self, x: torch.Tensor) -> torch.Tensor:
        values = self.encoder(x if self.cfg.transcode else x - self.b_dec).clamp(min=0)
        if self.cfg.activation == "topk":
            return largest(values, self.cfg.k)
        return torch.cat([largest(group, 1) for group in values.split(FEATURES // self.cfg.k, dim=-1)], dim=-1)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        return f @ self.W_dec + self.b_dec

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decoded = self.decode(self.features(x))
        return decoded if self.W_skip is None else decoded + x @ self.W_skip.T


class JumpReLU(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.threshold = parameter(FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > self.threshold, x, 0)


class TopK(nn.Module):
    k = K

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return largest(x, self.k)


class SingleLayerTranscoder(nn.Module):
    """circuit-tracer's."""

    def __init__(self, activation_function: Any = torch.relu, skip: bool = False) -> None:
        super().__init__()
        self.W_enc, self.W_dec = parameter(FEATURES, WIDTH), parameter(FEATURES, WIDTH)
        self.b_enc, self.b_dec = parameter(FEATURES), parameter(WIDTH)
        self.W_skip = parameter(WIDTH, WIDTH) if skip else None
        self.activation_function = activation_function

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation_function(x @ self.W_enc.T + self.b_enc)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        decoded = self.features(x) @ self.W_dec + self.b_dec
        return decoded if self.W_skip is None else decoded + x @ self.W_skip.T


class TranscoderSet(nn.Module):
    """A transcoder for every layer."""


for _module, _kinds in {
    "dictionary_learning.dictionary": (AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder, AutoEncoderTopK,
                                       BatchTopKSAE, MatryoshkaBatchTopKSAE),
    "sparsify.sparse_coder": (SparseCoder,),
    "circuit_tracer.transcoder.single_layer_transcoder": (SingleLayerTranscoder, TranscoderSet),
}.items():  # fmt: skip
    for _kind in _kinds:
        _kind.__module__ = _module

DICTIONARY_LEARNING = (
    AutoEncoder, AutoEncoderNew, GatedAutoEncoder, JumpReluAutoEncoder, AutoEncoderTopK, BatchTopKSAE, MatryoshkaBatchTopKSAE,
)  # fmt: skip


def drawn(module: nn.Module, seed: int = 3) -> nn.Module:
    """With random weights and positive thresholds."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.copy_(0.4 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
            if name.endswith("threshold"):
                weight.abs_()
    return module


def features(library: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return library.features(x) if hasattr(library, "features") else library.encode(x)


def save_dictionary_learning(library: nn.Module, folder: Path, **trainer: Any) -> None:
    """As `trainSAE` saves it."""
    folder.mkdir(parents=True)
    torch.save(library.state_dict(), folder / "ae.pt")
    settings = {"dict_class": type(library).__name__, "layer": 1, "lm_name": "openai-community/gpt2",
                "submodule_name": "resid_post_layer_1", **trainer}  # fmt: skip
    if hasattr(library, "k"):
        settings.setdefault("k", K)
    (folder / "config.json").write_text(json.dumps({"trainer": settings, "buffer": {"ctx_len": 128, "io": "out"}}))


def save_sparsify(library: Any, folder: Path, **changed: Any) -> None:
    """As `save_to_disk` does; the run's configuration lies above."""
    folder.mkdir(parents=True)
    save_file(library.state_dict(), folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**vars(library.cfg), "d_in": library.d_in, **changed}))
    (folder.parent / "config.json").write_text(json.dumps({"model": "openai-community/gpt2", "dataset": "text"}))


def save_circuit_tracer(transcoders: list[Any], folder: Path, **changed: Any) -> None:
    """As `TranscoderSet.to_safetensors` does, with the configuration of a repository."""
    folder.mkdir(parents=True)
    for layer, transcoder in enumerate(transcoders):
        save_file(transcoder.state_dict(), folder / f"layer_{layer}.safetensors")
    lines = {"model_kind": "transcoder_set", "model_name": "openai-community/gpt2", "feature_input_hook": "hook_resid_mid",
             "feature_output_hook": "mlp.hook_out", **changed}  # fmt: skip
    (folder / "config.yaml").write_text("".join(f"{name}: {value!r}\n" for name, value in lines.items()))


def save_gemma_scope(library: JumpReluAutoEncoder, folder: Path) -> None:
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{name: value.numpy() for name, value in library.state_dict().items()})


def save_gemma_scope_2(library: JumpReluAutoEncoder, folder: Path, skip: torch.Tensor | None = None, **settings: Any) -> None:
    folder.mkdir(parents=True)
    weights = {name.lower(): value for name, value in library.state_dict().items()}
    if skip is not None:
        weights["affine_skip_connection"] = skip.T.contiguous()
    save_file(weights, folder / "params.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", **settings}))
