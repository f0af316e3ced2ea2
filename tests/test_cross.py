"""Cross-layer transcoders and crosscoders: each format against its own forward pass, from the tensors in its files.

The references are loops over layers, positions and features, written from the libraries' sources (circuit-tracer 0.5,
dictionary_learning's crosscoder branch, OpenMOSS' Language-Model-SAEs). They use nothing of featpatch.
"""

import json
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from kinds import pairs_of
from safetensors.torch import load_file, save_file
from small import LAYERS, WIDTH, Small, small_bridge, small_hooked

import featpatch as fp
from featpatch.model.transformer_lens import wrap
from featpatch.sae import cross_codec, cross_formats, loading
from featpatch.sae.cross_codec import CrossCodec
from featpatch.sae.dictionary import dictionaries

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


CROSS = ("CrossCoder", "BatchTopKCrossCoder")
NORMS = {1: "crosscoder", 2: "SAE", 3: "mixed", 4: "none", 5: "decoupled"}


def learned(kind: str, *, norm: int = 1, normalised: bool = False, threshold: float = 2.0) -> dict[str, torch.Tensor]:
    """The state of a random crosscoder of dictionary_learning."""
    state = {
        "encoder.weight": random(LAYERS, WIDTH, FEATURES), "encoder.bias": random(FEATURES),
        "decoder.weight": random(LAYERS, FEATURES, WIDTH, seed=1), "decoder.bias": random(LAYERS, WIDTH),
        "code_normalization_id": torch.tensor(norm), "target_rms": torch.tensor(1.0),
        "activation_mean": torch.full((LAYERS, WIDTH), torch.nan, dtype=torch.float64),
        "activation_std": torch.full((LAYERS, WIDTH), torch.nan, dtype=torch.float64),
        "activation_global_scale": torch.ones(LAYERS, dtype=torch.float64),
    }  # fmt: skip
    if normalised:
        state |= {"activation_mean": random(LAYERS, WIDTH, seed=3), "activation_std": random(LAYERS, WIDTH, seed=4).abs(),
                  "activation_global_scale": random(LAYERS, seed=5).abs() + 0.3}  # fmt: skip
    if kind == "BatchTopKCrossCoder":
        state |= {"k": torch.tensor(2), "threshold": torch.tensor([threshold] * LAYERS if norm == 5 else threshold)}
        state["decoder.weight"][:, 1] = 0.0  # a feature that writes nothing, whose norm is 0
    return state


def crosscoded(state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """dictionary_learning's features `[positions, layers, features]` and reconstruction of `[positions, layers, d]`."""
    mean, scale = state["activation_mean"], state["activation_global_scale"]
    normal = bool(torch.isnan(mean).any())
    given = x if normal else (x - mean) * scale[None, :, None]
    f = (torch.einsum("bld,ldf->bf", given, state["encoder.weight"]) + state["encoder.bias"]).clamp(min=0)
    by_layer = f[:, None].repeat(1, LAYERS, 1)
    if "threshold" in state:
        d = state["decoder.weight"]
        every = torch.sqrt(torch.einsum("lfd,lfd->lf", d, d))
        whole = torch.sqrt(torch.einsum("lfd,lfd->f", d, d))
        kind = NORMS[int(state["code_normalization_id"])]
        norms = {"crosscoder": every.sum(0), "SAE": whole, "mixed": 1.0 * whole + 0.1 * every.sum(0),
                 "none": torch.ones(FEATURES), "decoupled": every}[kind]  # fmt: skip
        least = state["threshold"][:, None] if kind == "decoupled" else state["threshold"]
        by_layer = torch.where(by_layer * norms > least, by_layer, 0.0)
    y = torch.einsum("blf,lfd->bld", by_layer, state["decoder.weight"]) + state["decoder.bias"]
    return by_layer, y if normal else y / (scale[None, :, None] + 1e-8) + mean


@pytest.mark.parametrize("hub", [False, True], ids=["ae.pt", "hub"])
@pytest.mark.parametrize("normalised", [False, True], ids=["raw", "normalised"])
@pytest.mark.parametrize(("kind", "norm"), [("CrossCoder", 1), *(("BatchTopKCrossCoder", norm) for norm in NORMS)])
def test_crosscoders_of_dictionary_learning(tmp_path: Path, kind: str, norm: int, normalised: bool, hub: bool) -> None:
    state = learned(kind, norm=norm, normalised=normalised, threshold=1.0 if norm == 4 else 3.0)
    save_crosscoder(tmp_path, kind, state, hub)
    crosscoder = fp.load_sae(tmp_path, hook=STREAM)
    x = random(9, LAYERS, WIDTH)
    features, y = crosscoded(state, x)
    assert 0.05 < (features > 0).double().mean() < 0.95
    apart = kind == "BatchTopKCrossCoder" and norm == 5
    assert crosscoder.groups == (LAYERS if apart else 1)
    expected = features.flatten(1) if apart else features[:, 0]
    compared(crosscoder, x.flatten(1)[None], expected[None], y.flatten(1)[None])


def save_crosscoder(folder: Path, kind: str, state: dict[str, torch.Tensor], hub: bool = False) -> None:
    """As dictionary_learning's `trainSAE` saves it, or its `save_pretrained`."""
    if hub:
        save_file(state, folder / "model.safetensors")
        settings: dict[str, Any] = {"activation_dim": WIDTH, "dict_size": FEATURES, "num_layers": LAYERS}
    else:
        torch.save(state, folder / "ae.pt")
        settings = {"trainer": {"dict_class": kind, "lm_name": "openai-community/gpt2", "layer": 1}}
    (folder / "config.json").write_text(json.dumps(settings))


def open_moss(act_fn: str, norm: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the state of a random crosscoder of OpenMOSS, whose hook points are not in the model's order."""
    names = [STREAM[1], STREAM[0], STREAM[2]]
    cfg = {"sae_type": "crosscoder", "d_model": WIDTH, "expansion_factor": FEATURES / WIDTH, "act_fn": act_fn, "top_k": 2,
           "norm_activation": norm, "sparsity_include_decoder_norm": True, "hook_points": names}  # fmt: skip
    state = {"W_E": random(LAYERS, WIDTH, FEATURES), "b_E": random(LAYERS, FEATURES), "W_D": random(LAYERS, FEATURES, WIDTH, seed=1),
             "b_D": random(LAYERS, WIDTH)}  # fmt: skip
    state["W_D"] *= random(LAYERS, FEATURES, 1, seed=7).exp()  # norms that differ between hook points
    if act_fn == "jumprelu":
        state["activation_function.log_jumprelu_threshold"] = 1.5 + 0.3 * random(FEATURES)
    state |= {f"dataset_average_activation_norm.{name}": torch.tensor(2.0 + at) for at, name in enumerate(names)}
    return cfg, state


def moss_coded(cfg: dict[str, Any], state: dict[str, torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """OpenMOSS' features `[positions, heads, features]` and reconstruction of activations `[positions, heads, d]`."""
    factor = torch.ones(LAYERS, dtype=torch.float64)
    if cfg["norm_activation"] == "dataset-wise":
        averages = [state[f"dataset_average_activation_norm.{name}"] for name in cfg["hook_points"]]
        factor = torch.tensor([WIDTH**0.5 / float(average) for average in averages], dtype=torch.float64)
    x = x * factor[:, None]
    features = torch.zeros(len(x), LAYERS, FEATURES, dtype=torch.float64)
    for p in range(len(x)):
        pre = sum(x[p, head] @ state["W_E"][head] + state["b_E"][head] for head in range(LAYERS))
        for head in range(LAYERS):
            norms = torch.linalg.vector_norm(state["W_D"][head], dim=-1)
            gated = (pre * norms).clamp(min=0)
            if cfg["act_fn"] == "jumprelu":
                gated = gated * (gated > state["activation_function.log_jumprelu_threshold"].exp())
            elif cfg["act_fn"] == "topk":
                gated = gated * (gated >= gated.sort(descending=True).values[cfg["top_k"] - 1])
            features[p, head] = gated / norms
    y = torch.einsum("bhf,hfd->bhd", features, state["W_D"]) + state["b_D"]
    return features, y / factor[:, None]


@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
def test_crosscoders_of_open_moss(tmp_path: Path, act_fn: str, norm: str) -> None:
    cfg, state = open_moss(act_fn, norm)
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    save_file(state, tmp_path / "sae_weights.safetensors")
    crosscoder = fp.load_sae(tmp_path)
    assert (crosscoder.hook, crosscoder.hook_out) == (tuple(STREAM), tuple(STREAM))
    order = [cfg["hook_points"].index(name) for name in STREAM]
    x = random(9, LAYERS, WIDTH)
    features, y = moss_coded(cfg, state, x[:, [order.index(head) for head in range(LAYERS)]])
    features, y = features[:, order], y[:, order]
    assert 0.05 < (features > 0).double().mean() < 0.95
    if act_fn == "relu":
        compared(crosscoder, x.flatten(1)[None], features[:, 0][None], y.flatten(1)[None])
    else:
        assert not torch.equal(features.amin(1) > 0, features.amax(1) > 0), "a feature is on at some hook points only"
        compared(crosscoder, x.flatten(1)[None], features.flatten(1)[None], y.flatten(1)[None])


def simple_crosscoder(**options: Any) -> Any:
    weights = {"W_enc": random(2, WIDTH, FEATURES), "b_enc": random(FEATURES), "W_dec": random(LAYERS, FEATURES, OUT),
               "b_dec": random(LAYERS, OUT)}  # fmt: skip
    return fp.dictionaries.Crosscoder(**{**weights, "hook": STREAM[:2], "hook_out": MLP_OUT, **options})


def simple_clt(**options: Any) -> Any:
    weights = {"W_enc": random(LAYERS, FEATURES, WIDTH), "b_enc": random(LAYERS, FEATURES), "b_dec": random(LAYERS, WIDTH),
               "W_dec": [random(FEATURES, LAYERS - layer, WIDTH) for layer in range(LAYERS)]}  # fmt: skip
    return fp.dictionaries.CrossLayerTranscoder(**{**weights, "hook": MID, "hook_out": MLP_OUT, **options})


def test_a_crosscoder_that_writes_to_two_hook_points_has_no_single_one() -> None:
    made = simple_crosscoder(
        W_enc=random(1, WIDTH, FEATURES), W_dec=random(2, FEATURES, WIDTH), b_dec=random(2, WIDTH), hook=STREAM[:1],
        hook_out=MLP_OUT[:2],
    )  # fmt: skip
    (dictionary,) = dictionaries(wrap(small_bridge().model), made)
    assert dictionary.outputs == tuple(MLP_OUT[:2])
    with pytest.raises(fp.FeatpatchError, match="reads 1 hook points and writes 2"):
        dictionary.writes  # noqa: B018


def test_a_digest_reads_so_many_values_of_each_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    """In evenly spaced rows, which are narrower in the encoders than in the decoders of early layers."""
    monkeypatch.setattr("featpatch.sae.cross_codec.HASHED", 3 * WIDTH)
    read, values_of = [], cross_codec.values_of

    def noted(matrix: Any, rows: torch.Tensor) -> torch.Tensor:
        read.append(rows.tolist())
        return values_of(matrix, rows)

    monkeypatch.setattr(cross_codec, "values_of", noted)
    codec_of(simple_clt()).digest()
    last = FEATURES - 1
    three = [0, last // 2, last]
    assert read == [three, [0], three, [0], three, three]


@pytest.mark.parametrize(
    "made",
    [
        lambda: simple_clt(name="mine", model="gpt2"),
        lambda: simple_clt(threshold=random(LAYERS, FEATURES)),
        lambda: simple_clt(threshold=random(LAYERS, FEATURES), activation="jump"),
        lambda: simple_clt(k=2),
        simple_crosscoder,
        lambda: simple_crosscoder(threshold=random(FEATURES), name="mine", model="gpt2"),
        lambda: simple_crosscoder(threshold=random(LAYERS, FEATURES), scale=random(FEATURES).abs()),
        lambda: simple_crosscoder(k=2, scale=random(LAYERS, FEATURES).abs()),
    ],
)
def test_saved_and_loaded_again(tmp_path: Path, made: Callable[[], Any]) -> None:
    source = made()
    source.save(tmp_path / "own")
    again = fp.load_sae(tmp_path / "own")
    one, other = codec_of(source), codec_of(again)
    x = random(2, 5, one.d_in)
    assert torch.equal(other.encode(x).features, one.encode(x).features)
    assert torch.equal(other.rows(torch.arange(one.d_sae)), one.rows(torch.arange(one.d_sae)))
    assert (again.hook, again.hook_out, again.model, again.groups) == (
        source.hook,
        source.hook_out,
        source.model,
        source.groups,
    )
    again.save(tmp_path / "half", dtype="float16")
    half = codec_of(fp.load_sae(tmp_path / "half"))
    assert half.dtype == torch.float16
    torch.testing.assert_close(
        half.rows(torch.arange(one.d_sae)).double(), one.rows(torch.arange(one.d_sae)), rtol=1e-3, atol=1e-3
    )


def test_what_circuit_tracer_reads_from_a_saved_folder(tmp_path: Path) -> None:
    """Its names, shapes and configuration; a negative threshold of a JumpReLU, which is never negative, would mean another."""
    clt = simple_clt(threshold=random(LAYERS, FEATURES) - 0.5, model="gpt2")
    clt.save(tmp_path / "clt")
    tensors = {}
    for layer in range(LAYERS):
        own = load_file(tmp_path / "clt" / f"W_enc_{layer}.safetensors")
        assert sorted(own) == [f"W_enc_{layer}", f"b_dec_{layer}", f"b_enc_{layer}", f"threshold_{layer}"]
        tensors |= own | load_file(tmp_path / "clt" / f"W_dec_{layer}.safetensors")
    x = random(LAYERS, 7, WIDTH)
    features = encoded(tensors, x)
    assert not (features < 0).any()
    compared(clt, flat(x), flat(features), flat(decoded(tensors, features)))
    assert yaml.safe_load((tmp_path / "clt" / "config.yaml").read_text()) == {
        "model_kind": "cross_layer_transcoder", "model_name": "gpt2", "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out", "activation": "jumprelu",
    }  # fmt: skip


class Traced(torch.nn.Module):
    """circuit-tracer's CLT in memory, from the tensors of its files; encoders and decoders can stay in the folder."""

    def __init__(self, tensors: dict[str, torch.Tensor], folder: Path | None, function: Any, skip: torch.Tensor | None) -> None:
        super().__init__()
        self.n_layers, self.d_transcoder, self.d_model = LAYERS, FEATURES, WIDTH
        self.feature_input_hook, self.feature_output_hook = "hook_resid_mid", "hook_mlp_out"
        self.clt_path = None if folder is None else str(folder)
        parts = {part: [tensors[f"{part}_{layer}"] for layer in range(LAYERS)] for part in ("W_enc", "W_dec", "b_enc", "b_dec")}
        self.b_enc, self.b_dec = (torch.nn.Parameter(torch.stack(parts[part])) for part in ("b_enc", "b_dec"))
        if folder is None:
            self.W_enc = torch.nn.Parameter(torch.stack(parts["W_enc"]))
        self.W_dec = torch.nn.ParameterList(map(torch.nn.Parameter, parts["W_dec"])) if folder is None else None
        self.W_skip = None if skip is None else torch.nn.Parameter(skip)
        self.activation_function = function


class JumpReLU(torch.nn.Module):
    def __init__(self, threshold: torch.Tensor) -> None:
        super().__init__()
        self.threshold = torch.nn.Parameter(threshold)


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "in files"])
@pytest.mark.parametrize("threshold", [None, 1.5], ids=["ReLU", "JumpReLU"])
def test_an_object_of_circuit_tracer(tmp_path: Path, threshold: float | None, lazy: bool, skip: bool) -> None:
    tensors = save_clt(tmp_path / "clt", threshold=threshold, d_out=WIDTH)
    function: Any = torch.nn.functional.relu
    if threshold is not None:
        function = JumpReLU(torch.stack([tensors[f"threshold_{layer}"] for layer in range(LAYERS)])[:, None])
    W_skip = random(LAYERS, WIDTH, WIDTH) if skip else None
    clt = fp.dictionaries.adapt(Traced(tensors, tmp_path / "clt" if lazy else None, function, W_skip), name="traced")
    assert (clt.hook, clt.hook_out, clt.name) == (tuple(MID), tuple(MLP_OUT), "traced")
    x = random(LAYERS, 7, WIDTH)
    features = encoded(tensors, x)
    y = decoded(tensors, features)
    if W_skip is None:
        compared(clt, flat(x), flat(features), flat(y))
        return
    codec = codec_of(clt)
    code = codec.encode(flat(x))
    torch.testing.assert_close(codec.decode(code.features, code.state), flat(y + x @ W_skip), rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(code.state["skip"], flat(x @ W_skip), rtol=EXACT, atol=EXACT)
    for layer in range(LAYERS):
        alone, own = codec.encode_group(x[layer : layer + 1], layer), slice(layer * FEATURES, (layer + 1) * FEATURES)
        expected = torch.zeros_like(code.features)
        expected[..., own] = code.features[..., own]
        torch.testing.assert_close(alone.features, expected, rtol=EXACT, atol=EXACT)
        assert torch.equal(alone.state["skip"], torch.zeros_like(code.state["skip"]))


def test_an_object_of_dictionary_learning() -> None:
    """It is recognised by its class and module, and its own settings count."""

    class Encoder(torch.nn.Module):
        encoder_layers = (0, 1, 2)

    class BatchTopKCrossCoder(torch.nn.Module):
        code_normalization_alpha_sae, code_normalization_alpha_cc = 1.0, 0.1

        def __init__(self, state: dict[str, torch.Tensor]) -> None:
            super().__init__()
            self.encoder, self.decoder = Encoder(), torch.nn.Module()
            for name, value in state.items():
                module = self if "." not in name else getattr(self, name.split(".")[0])
                module.register_buffer(name.split(".")[-1], value)

    BatchTopKCrossCoder.__module__ = "dictionary_learning.dictionary"
    state = learned("BatchTopKCrossCoder", norm=3, normalised=True, threshold=3.0)
    crosscoder = fp.dictionaries.adapt(BatchTopKCrossCoder(state), STREAM)
    x = random(9, LAYERS, WIDTH)
    features, y = crosscoded(state, x)
    compared(crosscoder, x.flatten(1)[None], features[:, 0][None], y.flatten(1)[None])
    with pytest.raises(fp.FeatpatchError, match="do not say which hook points the crosscoder reads: pass hook=, a list of 3"):
        fp.dictionaries.adapt(BatchTopKCrossCoder(state))


def metric_of(small: Small, pair: int, reached: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> float:
    """The logit difference of a plain hooked forward pass of a corrupted prompt, with activations `[1, pos, d]` replaced."""
    hooks = [(name, lambda value, hook, change=change: change(value)) for name, change in reached.items()]
    with torch.no_grad():
        logits = small.model.run_with_hooks(small.corrupted[[pair]], fwd_hooks=hooks)[0, -1]
    return float(logits[small.correct[pair]] - logits[small.wrong[pair]])


def activations(small: Small, tokens: torch.Tensor, names: list[str]) -> torch.Tensor:
    """`[pairs, layers, positions, d]`."""
    _, cache = small.model.run_with_cache(tokens)
    return torch.stack([cache[name].detach() for name in names], dim=1)


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_every_feature_of_a_clt_is_patched_exactly(tmp_path: Path, make: Callable[[], Small]) -> None:
    """Against one hooked forward pass for each patch, with its change added at its layer and those above.

    All features and all errors together are the activations of all layers.
    """
    small = make()
    tensors = save_clt(tmp_path / "clt", threshold=0.5, d_out=WIDTH)
    effects = fp.rank_features(small.model, fp.load_sae(tmp_path / "clt"), pairs_of(small), progress=False)
    reads, writes = (
        [activations(small, tokens, names) for tokens in (small.clean, small.corrupted)] for names in (MID, MLP_OUT)
    )
    seen = {"feature": 0, "activation": 0}
    for row, pair, value in zip(effects.row, effects.pair, effects.denoised, strict=True):
        node = effects.nodes[row]
        if node.kind == "feature":
            layer = MLP_OUT.index(node.site)
            clean, corrupted = (encoded(tensors, run[pair]) for run in reads)
            patched = corrupted.clone()
            patched[layer, :, node.index] = clean[layer, :, node.index]
            moved = decoded(tensors, patched) - decoded(tensors, corrupted)
        elif node.kind == "activation" and node.site not in MLP_OUT:
            layer, moved = 0, writes[0][pair] - writes[1][pair]
        else:
            continue
        seen[node.kind] += 1
        reached = {MLP_OUT[at]: lambda there, change=moved[at]: there + change for at in range(layer, LAYERS)}
        assert value == pytest.approx(metric_of(small, int(pair), reached), abs=EXACT), node
    assert seen["feature"] >= 10, seen
    assert seen["activation"] == 2, seen


@pytest.mark.parametrize("make", [small_bridge, small_hooked])
def test_every_feature_of_a_crosscoder_is_patched_exactly(make: Callable[[], Small]) -> None:
    """Against one hooked forward pass for each patch, in which each layer is set to its base value plus the change."""
    small = make()
    state = learned("CrossCoder")
    state["encoder.weight"] *= 0.3
    weights = [state[name] for name in ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")]
    effects = fp.rank_features(small.model, fp.dictionaries.Crosscoder(*weights, hook=STREAM), pairs_of(small), progress=False)
    runs = [activations(small, tokens, STREAM) for tokens in (small.clean, small.corrupted)]
    seen = {"feature": 0, "activation": 0}
    for row, pair, value in zip(effects.row, effects.pair, effects.denoised, strict=True):
        node = effects.nodes[row]
        if node.kind == "feature":
            clean, corrupted = (crosscoded(state, run[pair].transpose(0, 1))[0][:, 0, node.index] for run in runs)
            moved = torch.einsum("p,ld->lpd", clean - corrupted, state["decoder.weight"][:, node.index])
        elif node.kind == "activation" and node.site not in STREAM:
            moved = runs[0][pair] - runs[1][pair]
        else:
            continue
        seen[node.kind] += 1
        reached = {
            name: lambda there, change=moved[at], base=runs[1][pair, at]: torch.where((change != 0).any(-1)[:, None], base + change, there)
            for at, name in enumerate(STREAM)
        }  # fmt: skip
        assert value == pytest.approx(metric_of(small, int(pair), reached), abs=EXACT), node
    assert seen["feature"] >= 3, seen


@pytest.mark.parametrize("combine", [None, "add", "set"])
def test_named_features_mean_what_they_mean_in_a_ranking(combine: Any) -> None:
    """A feature alone, and as the only node of a patch, has the row of `rank_features` with the same meaning."""
    small = small_bridge()
    run: dict[str, Any] = {"combine": combine, "progress": False}
    clt = simple_clt()
    ranked = fp.rank_features(small.model, clt, pairs_of(small), **run)
    best = ranked.top(3, kind="feature")
    low = tuple(node for node in best.nodes if not node.site.startswith("blocks.2"))
    assert low, "only a feature of a lower layer writes to several hook points"
    found = fp.rank_nodes(small.model, pairs_of(small), [*best.nodes, fp.Patch(low[:1])], saes=clt, **run)
    np.testing.assert_allclose(found.pooled("recovery")[:3], best.pooled("recovery"), rtol=0, atol=EXACT)
    assert found.pooled("recovery")[3] == pytest.approx(best.pooled("recovery")[list(best.nodes).index(low[0])], abs=EXACT)
    if combine == "set":
        with pytest.raises(fp.FeatpatchError, match="whose patches set several hook points: expected patches that add"):
            fp.rank_features(small.model, clt, pairs_of(small), method="atp", **run)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A hub with a CLT, a crosscoder and an SAE, of which only the files that are asked for are there; lists the requests."""
    clt = tmp_path / "hub" / "mntss" / "clt-gemma-2-2b-2.5M"
    save_clt(clt)
    save_clt(tmp_path / "hub" / "someone" / "clts" / "small")
    cfg, state = open_moss("relu", "inference")
    (tmp_path / "hub" / "someone" / "moss" / "layers").mkdir(parents=True)
    (tmp_path / "hub" / "someone" / "moss" / "layers" / "config.json").write_text(json.dumps(cfg))
    save_file(state, tmp_path / "hub" / "someone" / "moss" / "layers" / "sae_weights.safetensors")
    (tmp_path / "hub" / "someone" / "other").mkdir(parents=True)
    requests: list[str] = []

    def snapshot(repository: str, *, allow_patterns: list[str]) -> str:
        requests.append(repository)
        source, cache = tmp_path / "hub" / repository, tmp_path / "cache" / repository
        if not source.is_dir():
            raise FileNotFoundError(repository)
        for file in source.rglob("*"):
            name = file.relative_to(source).as_posix()
            if file.is_file() and any(fnmatch(name, pattern) for pattern in allow_patterns):
                (cache / name).parent.mkdir(parents=True, exist_ok=True)
                (cache / name).write_bytes(file.read_bytes())
        cache.mkdir(parents=True, exist_ok=True)
        return str(cache)

    def refuse(*args: Any, **options: Any) -> None:
        raise FileNotFoundError(args)

    monkeypatch.setattr(loading, "snapshot_download", snapshot)
    monkeypatch.setattr(loading.SAE, "from_pretrained", refuse)
    monkeypatch.setattr(loading, "list_repo_files", refuse)
    return requests


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("mntss-gemma-2-2b-2.5m-clt-as-per-layer/layer_7", "CrossLayerTranscoder"),
        ("mntss/clt-gemma-2-2b-2.5M", "CrossLayerTranscoder"),
        ("someone/clts/small", "CrossLayerTranscoder"),
        ("someone/moss/layers", "Crosscoder"),
    ],
)
def test_names_of_the_hub(hub: list[str], tmp_path: Path, name: str, kind: str) -> None:
    """The whole dictionary, also where sae-lens has only single layers with summed decoders."""
    source = fp.load_sae(name, dtype="float32")
    assert type(source).__name__ == kind
    folder = tmp_path / "hub" / ("mntss/clt-gemma-2-2b-2.5M" if name.startswith("mntss") else name)
    assert codec_of(source).digest() == codec_of(fp.load_sae(folder, dtype="float32")).digest()
    assert len(set(hub)) == 1


def test_other_names_of_the_hub(hub: list[str]) -> None:
    for name in ("someone/other", "someone/nothing", "gpt2-small-res-jb/blocks.8.hook_resid_pre"):
        with pytest.raises(fp.FeatpatchError, match="there is no SAE 'someone/|the SAE 'gpt2.* can't be loaded"):
            fp.load_sae(name)
    assert hub == ["someone/other", "someone/nothing"], "nothing is asked for a release of the registry"


Damage = Callable[[Path], object]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-40])


def rewrite(file: Path, **tensors: torch.Tensor | None) -> None:
    """Change tensors in a file; None removes one."""
    state = load_file(file) | tensors
    save_file({name: value for name, value in state.items() if value is not None}, file)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda clt: cut(clt / "W_enc_1.safetensors"), "W_enc_1.safetensors' can't be read"),
        (lambda clt: cut(clt / "W_dec_1.safetensors"), "W_dec_1.safetensors' can't be read"),
        (lambda clt: (clt / "W_dec_2.safetensors").unlink(), "lacks W_dec_2.safetensors: expected W_enc_N"),
        (lambda clt: (clt / "W_enc_0.safetensors").unlink(), "lacks W_enc_0.safetensors: expected W_enc_N"),
        (
            lambda clt: rewrite(clt / "W_enc_1.safetensors", b_enc_1=None),
            "W_enc_1.safetensors' holds W_enc_1, b_dec_1: expected",
        ),
        (lambda clt: rewrite(clt / "W_enc_1.safetensors", W_skip_1=random(2)), "holds W_enc_1, W_skip_1.*and nothing else"),
        (lambda clt: rewrite(clt / "W_enc_1.safetensors", threshold_1=random(FEATURES)), "thresholds for some layers only"),
        (lambda clt: rewrite(clt / "W_enc_1.safetensors", b_enc_1=random(4)), r"b_enc has the shapes \[\[5\], \[4\], \[5\]\]"),
        (lambda clt: rewrite(clt / "W_enc_1.safetensors", W_enc_1=random(4, WIDTH)), r"/clt': W_enc\[1\] is \[4, 16\]"),
        (lambda clt: rewrite(clt / "W_dec_1.safetensors", W_dec_1=random(FEATURES, 3, OUT)), r"W_dec\[1\] is \[5, 3, 12\]"),
        (lambda clt: rewrite(clt / "W_dec_0.safetensors", W_dec_0=torch.zeros(FEATURES, 3, OUT, dtype=torch.int8)), "dtype I8"),
        (
            lambda clt: rewrite(clt / "W_enc_0.safetensors", b_dec_0=torch.ones(OUT, dtype=torch.int64)),
            "b_dec_0 has the dtype I64",
        ),
        (
            lambda clt: rewrite(clt / "W_enc_0.safetensors", W_enc_0=random(FEATURES, WIDTH) * torch.inf),
            "W_enc_0.safetensors': .* values of W_enc_0 are NaN or infinite",
        ),
        (lambda clt: (clt / "config.yaml").write_text("a: [1"), "config.yaml' can't be read"),
        (lambda clt: (clt / "config.yaml").write_text("a: " + "[" * 100_000), "nested more than 20 deep"),
        (lambda clt: (clt / "config.yaml").write_text("a: !!bool x"), "config.yaml' can't be read .'x'."),
        (lambda clt: (clt / "config.yaml").write_text("a: &a [1]\nb: *a"), "it has aliases, such as .a: expected each value"),
        (
            lambda clt: (clt / "config.yaml").write_text("feature_input_hook: hook_mlp_in"),
            r"/clt': the files do not say which hook points the dictionary writes: pass hook_out=, a list",
        ),
        (
            lambda clt: (clt / "config.yaml").write_text("feature_input_hook: [1]"),
            "which hook points the dictionary reads: pass",
        ),
    ],
)
@pytest.mark.parametrize("lazy", [False, True], ids=["in memory", "in files"])
def test_damaged_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Damage, message: str, lazy: bool) -> None:
    save_clt(tmp_path / "clt")
    damage(tmp_path / "clt")
    if lazy:
        monkeypatch.setattr(cross_formats, "KEPT", {"encoders": 0, "decoders": 0})
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.load_sae(tmp_path / "clt")


def test_what_happens_to_files_after_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are not finite, and files that went away, are found when they are read."""
    tensors = save_clt(tmp_path / "clt")
    decoder = tensors["W_dec_1"].clone()
    decoder[3, 0, 0] = torch.nan
    rewrite(tmp_path / "clt" / "W_dec_1.safetensors", W_dec_1=decoder)
    with pytest.raises(fp.FeatpatchError, match="1 of .* values of W_dec_1 are NaN or infinite"):
        fp.load_sae(tmp_path / "clt")
    monkeypatch.setattr(cross_formats, "KEPT", {"encoders": 0, "decoders": 0})
    codec = codec_of(fp.load_sae(tmp_path / "clt"))
    assert codec.rows(torch.tensor([FEATURES + 2])).isfinite().all()
    with pytest.raises(fp.FeatpatchError, match="W_dec_1.safetensors': 1 of .* values of W_dec_1 are NaN or infinite"):
        codec.rows(torch.tensor([FEATURES + 3]))
    (tmp_path / "clt" / "W_dec_2.safetensors").unlink()
    with pytest.raises(fp.FeatpatchError, match="W_dec_2.safetensors' can't be read .* leave it in its place"):
        codec.rows(torch.tensor([2 * FEATURES]))


@pytest.mark.parametrize("what", ["encoders", "decoders"])
@pytest.mark.parametrize("short", [0, 1])
def test_matrices_are_kept_in_memory_up_to_a_number_of_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, short: int
) -> None:
    """Of all layers together."""
    tensors = save_clt(tmp_path / "clt")
    name = "W_enc" if what == "encoders" else "W_dec"
    size = sum(value.nbytes for key, value in tensors.items() if key.startswith(name))
    monkeypatch.setattr(cross_formats, "KEPT", {"encoders": 2**31, "decoders": 2**31} | {what: size - short})
    codec = codec_of(fp.load_sae(tmp_path / "clt"))
    (tmp_path / "clt" / f"{name}_1.safetensors").unlink()

    def used() -> None:
        codec.encode(random(1, 2, LAYERS * WIDTH))
        codec.rows(torch.arange(codec.d_sae))

    if short:
        with pytest.raises(fp.FeatpatchError, match=f"{name}_1.safetensors' can't be read"):
            used()
    else:
        used()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook": MID[:2]}, "expected a list of 3 names of hook points"),
        ({"hook": MID[0]}, "expected a list of 3 names of hook points"),
        ({"hook": [MID[1], MID[0], MID[2]]}, "expected different hook points, one for each layer, from the lowest layer up"),
        ({"hook": [MID[0], MID[0], MID[2]]}, "expected different hook points, one for each layer, from the lowest layer up"),
        ({"hook": [MID[0], STREAM[0], MID[2]]}, "expected different hook points, one for each layer"),
        ({"hook": ["hook_embed", *MID[1:]]}, "hook point 'hook_embed' is not inside a layer"),
        ({"hook": ["blocks.1.hook_resid_mid", "blocks.2.hook_resid_mid", "blocks.3.hook_resid_mid"]}, "to write at or above"),
        ({"b_enc": random(FEATURES)}, r"b_enc is \[5\] and b_dec \[3, 16\]: expected \[layers, features\]"),
        ({"b_dec": random(2, WIDTH)}, r"b_dec is \[2, 16\] of torch.float64: expected a tensor \[3, 16\]"),
        ({"W_enc": random(2, FEATURES, WIDTH)}, "W_enc is 2 of them: expected one matrix for each of the 3 layers"),
        (
            {"W_dec": [random(FEATURES, 3, WIDTH)] * 3},
            r"W_dec\[1\] is \[5, 3, 16\] of torch.float64: expected a tensor \[5, 2, 16\]",
        ),
        ({"threshold": random(FEATURES)}, r"threshold is \[5\]"),
        ({"skip": random(LAYERS, WIDTH)}, r"skip is \[3, 16\]"),
        ({"activation": "gelu"}, "activation='gelu': expected one of relu, jumprelu, jump, topk"),
        ({"activation": "jumprelu"}, "activation='jumprelu' without threshold"),
        ({"activation": "relu", "threshold": random(LAYERS, FEATURES)}, "activation='relu' with threshold"),
        ({"activation": "topk"}, "activation='topk', k=None: expected k from 1 to 5"),
        ({"k": 6}, "activation='topk', k=6: expected k from 1 to 5"),
        ({"k": True}, "k=True: expected k from 1 to 5"),
        ({"b_dec": torch.full((LAYERS, WIDTH), torch.nan, dtype=torch.float64)}, "48 of 48 values of b_dec are NaN"),
    ],
)
def test_transcoders_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        simple_clt(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hook": STREAM}, "hook=.*: expected a list of 2 names of hook points"),
        ({"hook": [STREAM[1], STREAM[0]]}, "expected different hook points from the lowest layer up"),
        ({"hook_out": None}, "hook_out=.*: expected a list of 3 names"),
        ({"W_enc": random(WIDTH, FEATURES)}, r"W_enc is \[16, 5\] and b_dec \[3, 12\]: expected \[inputs, d_in, features\]"),
        ({"W_dec": random(LAYERS, 4, OUT)}, r"W_dec is \[3, 4, 12\] of torch.float64: expected a tensor \[3, 5, 12\]"),
        ({"b_enc": random(4)}, r"b_enc is \[4\]"),
        ({"threshold": random(2, FEATURES)}, r"threshold is \[2, 5\] of torch.float64: expected a tensor \[3, 5\]"),
        ({"k": 2, "scale": random(4)}, r"scale is \[4\]"),
    ],
)
def test_crosscoders_that_are_none(options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        simple_crosscoder(**options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sae_type": "lorsa"}, "sae_type='lorsa', .* expected a 'crosscoder' of OpenMOSS"),
        ({"hook_points": "all"}, "hook_points='all', .*: expected a 'crosscoder' of OpenMOSS, the names"),
        ({"sparsity_include_decoder_norm": None}, "sparsity_include_decoder_norm=None: expected .* and true or false"),
        ({"hook_points": STREAM[:2]}, r"the weights are \w+.*: expected W_E"),
        ({"hook_points": ["hook_embed", *STREAM[1:]]}, "the weights are .*: expected W_E"),
        ({"act_fn": "batchtopk"}, "act_fn='batchtopk', .* others depend on the other prompts"),
        ({"norm_activation": "token-wise"}, "norm_activation='token-wise': expected .* or 'inference'"),
        ({"act_fn": "jumprelu"}, "the weights are .*: expected .*log_jumprelu_threshold"),
        ({"act_fn": "topk", "top_k": 9}, "activation='topk', k=9: expected k from 1 to 5"),
    ],
)
def test_settings_of_open_moss_that_are_none(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    cfg, state = open_moss("relu", "dataset-wise")
    (tmp_path / "config.json").write_text(json.dumps(cfg | changed))
    save_file(state, tmp_path / "sae_weights.safetensors")
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.load_sae(tmp_path)


@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
def test_averages_of_open_moss_are_needed_where_they_are_used(tmp_path: Path, norm: str) -> None:
    cfg, state = open_moss("relu", norm)
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    save_file({name: value for name, value in state.items() if "average" not in name}, tmp_path / "sae_weights.safetensors")
    if norm == "inference":
        assert fp.load_sae(tmp_path).hook == tuple(STREAM)
    else:
        with pytest.raises(fp.FeatpatchError, match=r"the weights are .*: expected W_E.*dataset_average_activation_norm"):
            fp.load_sae(tmp_path)


@pytest.mark.parametrize("name", ["W_E", "W_D", "b_E", "b_D"])
def test_weights_of_open_moss_for_more_hook_points(tmp_path: Path, name: str) -> None:
    cfg, state = open_moss("relu", "dataset-wise")
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    save_file({**state, name: torch.cat([state[name], state[name]])}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(fp.FeatpatchError, match="expected one matrix and one bias of each for each of the 3 hook points"):
        fp.load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"encoder.bias": None}, "the crosscoder has .*: expected encoder.weight, encoder.bias"),
        ({"mystery": random(2)}, "the crosscoder has .*: expected encoder.weight, .* and perhaps"),
        ({"encoder.weight": random(WIDTH, FEATURES)}, r"encoder.weight \[16, 5\]"),
        ({"decoder.weight": random(LAYERS, 4, WIDTH)}, "': W_dec is .3, 4, 16.|do not go together"),
        ({"code_normalization_id": torch.tensor(9)}, "code_normalization_id is 9: expected 1 to 5"),
        ({"activation_mean": random(2, WIDTH), "activation_std": random(2, WIDTH)}, "normalises 2: expected equal numbers"),
        ({"code_normalization_id": torch.tensor([1, 2])}, "weights or settings that do not go together"),
        (
            {"encoder.weight": torch.ones(LAYERS, WIDTH, FEATURES, dtype=torch.int64)},
            "encoder.weight is torch.int64: expected one",
        ),
        ({"activation_std": torch.eye(LAYERS, WIDTH) / 0}, "93 of 96 values of activation_mean and activation_std are NaN"),
        ({"activation_std": None}, "lacks one of activation_mean, _std and _global_scale: expected all, or none"),
        ({"threshold": random(3, 3)}, "': the weights do not|do not go together|threshold is"),
    ],
)
def test_crosscoders_of_dictionary_learning_that_are_none(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    state = learned("BatchTopKCrossCoder") | changed
    save_crosscoder(tmp_path, "BatchTopKCrossCoder", {name: value for name, value in state.items() if value is not None})
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.load_sae(tmp_path, hook=STREAM)
    with pytest.raises(fp.FeatpatchError, match=r"do not say which hook points|expected|do not go together"):
        fp.load_sae(tmp_path)


def test_options_that_do_not_fit(tmp_path: Path, bridge: Small) -> None:
    clt = simple_clt()
    clt.save(tmp_path / "clt")
    for options, message in (
        (
            {"norm_scaling_factor": 2.0},
            "norm_scaling_factor=2.0: expected None, because CrossLayerTranscoder of 3 x 5 features",
        ),
        ({"dtype": "int8"}, "dtype='int8': expected one of float64"),
        ({"hook": []}, r"hook=\[\]: expected the name of a hook"),
        ({"hook": STREAM[0]}, "expected a list of 3 names"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.load_sae(tmp_path / "clt", **options)
    bridge.saes[0].save_model(tmp_path / "sae")
    with pytest.raises(fp.FeatpatchError, match="expected one name each, because .*sae' is no dictionary over several layers"):
        fp.load_sae(tmp_path / "sae", hook=[STREAM[0]])
    for source in (simple_clt(skip=random(LAYERS, WIDTH, WIDTH)), simple_clt(hook=MID[:2] + STREAM[2:])):
        with pytest.raises(fp.FeatpatchError, match="expected no skip path, and the same hook point in every layer"):
            source.save(tmp_path / "refused")
    with pytest.raises(fp.FeatpatchError, match="values of b_dec_0 are NaN or infinite: .* than float16"):
        simple_clt(b_dec=random(LAYERS, WIDTH) * 1e6).save(tmp_path / "half", dtype="float16")
    with pytest.raises(fp.FeatpatchError, match="reads 48 values and the activations at .* together have 48|writes 36 values"):
        fp.rank_features(bridge.model, simple_crosscoder(), pairs_of(bridge))


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
def test_the_check_is_of_all_hook_points_together(tmp_path: Path, kind: str) -> None:
    """Against the reference above, prompt by prompt; the loss with a reconstruction spliced in is of one hook point."""
    small, errors, written, active = small_bridge(), [], [], []
    tensors, state = save_clt(tmp_path / "clt", threshold=0.5, d_out=WIDTH), learned("CrossCoder")
    for tokens in (tokens for pair in pairs_of(small) for tokens in (pair.clean, pair.corrupted)):
        prompt = torch.tensor([tokens])
        if kind == "clt":
            x, y = (activations(small, prompt, names)[0] for names in (MID, MLP_OUT))
            features = encoded(tensors, x)
            errors.append(y - decoded(tensors, features))
            active.append((features != 0).sum((0, 2)))
        else:
            y = activations(small, prompt, STREAM)[0]
            features, rebuilt = crosscoded(state, y.transpose(0, 1))
            errors.append(y - rebuilt.transpose(0, 1))
            active.append((features[:, 0] != 0).sum(1))
        written.append(flat(y)[0])
    weights = [state[name] for name in ("encoder.weight", "decoder.weight", "encoder.bias", "decoder.bias")]
    sae = fp.load_sae(tmp_path / "clt") if kind == "clt" else fp.dictionaries.Crosscoder(*weights, hook=STREAM)
    (fit,) = fp.check(small.model, sae, pairs_of(small)).fits
    rows = torch.cat(written)
    expected = 1 - torch.stack(errors).square().sum() / (rows - rows.mean(0)).square().sum()
    assert fit.explained_variance == pytest.approx(float(expected), rel=1e-9)
    assert fit.l0 == pytest.approx(float(torch.cat(active).double().mean()))
    assert max(fit.identity, fit.whole_site) < EXACT
    with pytest.raises(fp.FeatpatchError, match="hook points and writes .*: expected one of each here"):
        fp.loss_recovered(small.model, sae, pairs_of(small), progress=False)
