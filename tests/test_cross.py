"""Cross-layer transcoders and crosscoders: each format against its own forward pass, from the tensors in its files.

The references are loops over layers, positions and features, written from the libraries' sources (circuit-tracer 0.5,
dictionary_learning's crosscoder branch, OpenMOSS' Language-Model-SAEs). They use nothing of featpatch.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small import LAYERS, WIDTH, Small

import featpatch as fp
from featpatch.sae import cross_formats
from featpatch.sae.cross_codec import CrossCodec

EXACT = 1e-10
FEATURES = 5
OUT = 12
MID = [f"blocks.{layer}.hook_resid_mid" for layer in range(LAYERS)]
MLP_OUT = [f"blocks.{layer}.hook_mlp_out" for layer in range(LAYERS)]
STREAM = [f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def save_clt(folder: Path, *, threshold: float | None = None, d_out: int = OUT, **config: Any) -> dict[str, torch.Tensor]:
    """Write a random CLT as circuit-tracer's `to_safetensors` does, with the configuration of a repository on the hub."""
    folder.mkdir(parents=True)
    tensors = {}
    for layer in range(LAYERS):
        encoder = {f"W_enc_{layer}": random(FEATURES, WIDTH, seed=layer), f"b_enc_{layer}": random(FEATURES, seed=layer),
                   f"b_dec_{layer}": random(d_out, seed=layer)}  # fmt: skip
        if threshold is not None:
            encoder[f"threshold_{layer}"] = random(FEATURES, seed=10 + layer) + threshold
        decoder = {f"W_dec_{layer}": random(FEATURES, LAYERS - layer, d_out, seed=20 + layer)}
        save_file(encoder, folder / f"W_enc_{layer}.safetensors")
        save_file(decoder, folder / f"W_dec_{layer}.safetensors")
        tensors |= encoder | decoder
    settings = {"model_kind": "cross_layer_transcoder", "model_name": "openai-community/gpt2",
                "feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out", **config}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump({name: value for name, value in settings.items() if value is not None}))
    return tensors


def encoded(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """circuit-tracer's features of activations `[layers, positions, d]`: ReLU, or x where it is above the threshold."""
    features = torch.zeros(LAYERS, x.shape[1], FEATURES, dtype=x.dtype)
    for layer in range(LAYERS):
        for p in range(x.shape[1]):
            for feature in range(FEATURES):
                pre = float(tensors[f"W_enc_{layer}"][feature].double() @ x[layer, p] + tensors[f"b_enc_{layer}"][feature])
                least = float(tensors[f"threshold_{layer}"][feature]) if f"threshold_{layer}" in tensors else 0.0
                features[layer, p, feature] = pre if pre > least else 0.0
    return features


def decoded(tensors: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """circuit-tracer's reconstruction `[layers, positions, d]` of features `[layers, positions, features]`."""
    made = []
    for to in range(LAYERS):
        total = tensors[f"b_dec_{to}"].double().expand(features.shape[1], -1).clone()
        for layer in range(to + 1):
            total += torch.einsum("pf,fd->pd", features[layer], tensors[f"W_dec_{layer}"][:, to - layer].double())
        made.append(total)
    return torch.stack(made)


def flat(by_layer: torch.Tensor) -> torch.Tensor:
    """`[layers, positions, n]` as one prompt with the layers side by side."""
    return torch.cat(list(by_layer), dim=-1)[None]


def codec_of(source: Any) -> CrossCodec:
    return CrossCodec(source, torch.zeros(1))


def compared(source: Any, x: torch.Tensor, features: torch.Tensor, reconstruction: torch.Tensor, exact: float = EXACT) -> None:
    """Encoding, decoding and single rows agree with a reference, given flat, and decoding is rows times features."""
    codec = codec_of(source)
    assert (codec.d_in, codec.d_out, codec.d_sae) == (x.shape[-1], reconstruction.shape[-1], features.shape[-1])
    code = codec.encode(x)
    torch.testing.assert_close(code.features, features, rtol=exact, atol=exact)
    torch.testing.assert_close(codec.decode(code.features, code.state), reconstruction, rtol=exact, atol=exact)
    off = codec.decode(torch.zeros_like(code.features), code.state)
    rows = codec.rows(torch.arange(codec.d_sae))
    torch.testing.assert_close(off + features.to(rows) @ rows, reconstruction, rtol=exact, atol=exact)
    for number in (0, codec.d_sae // 2, codec.d_sae - 1):
        one = torch.zeros_like(code.features)
        one[..., number] = 1.0
        added = codec.decode(one, code.state) - off
        torch.testing.assert_close(rows[number].expand_as(added), added, rtol=exact, atol=exact)
    chosen = torch.tensor([codec.d_sae - 1, 1, codec.d_sae - 1])
    assert torch.equal(codec.rows(chosen), rows[chosen])


@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "in files"])
@pytest.mark.parametrize("threshold", [None, 1.5, -0.4], ids=["ReLU", "JumpReLU", "negative thresholds"])
def test_a_folder_of_circuit_tracer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threshold: float | None, lazy: bool
) -> None:
    tensors = save_clt(tmp_path / "clt", threshold=threshold)
    if lazy:
        monkeypatch.setattr(cross_formats, "KEPT", {"encoders": 0, "decoders": 0})
    clt = fp.load_sae(tmp_path / "clt")
    assert (clt.hook, clt.hook_out, clt.groups, clt.model) == (tuple(MID), tuple(MLP_OUT), LAYERS, "openai-community/gpt2")
    x = random(LAYERS, 7, WIDTH)
    features = encoded(tensors, x)
    assert 0.05 < (features != 0).double().mean() < 0.95
    assert (features < 0).any() == (threshold == -0.4)
    compared(clt, flat(x), flat(features), flat(decoded(tensors, features)))


def test_files_and_memory_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, also in half precision, and with decoders that are read in chunks."""
    save_clt(tmp_path / "clt")
    for dtype in (None, "float32", "bfloat16"):
        kept = codec_of(fp.load_sae(tmp_path / "clt", dtype=dtype))
        with monkeypatch.context() as patch:
            patch.setattr(cross_formats, "KEPT", {"encoders": 0, "decoders": 0})
            read = codec_of(fp.load_sae(tmp_path / "clt", dtype=dtype))
        x = torch.cat([random(2, 7, LAYERS * WIDTH)])
        code = kept.encode(x)
        assert code.features.dtype == (torch.float64 if dtype is None else torch.float32)
        assert torch.equal(read.encode(x).features, code.features)
        assert torch.equal(read.decode(code.features, {}), kept.decode(code.features, {}))
        numbers = torch.arange(kept.d_sae)
        assert torch.equal(read.rows(numbers), kept.rows(numbers))
        assert read.digest() == kept.digest()
        with monkeypatch.context() as patch:
            patch.setattr("featpatch.sae.cross_codec.READ", 2 * OUT)
            torch.testing.assert_close(read.decode(code.features, {}), kept.decode(code.features, {}), rtol=1e-5, atol=1e-5)
