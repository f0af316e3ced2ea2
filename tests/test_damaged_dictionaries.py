"""Damaged and hostile folders of SAEs, transcoders, CLTs and crosscoders: each gives a clean error or a right result.

What is loaded computes what the library's own forward pass computes from the damaged numbers. No code is run and no file is
written. FEATPATCH_EXAMPLES=10000 draws as many folders of each library.
"""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import libraries
import pytest
import torch
from damage import clean, damaged_folder, harmless, read_tensors, write_folder
from drawn import each
from hypothesis import given
from hypothesis import strategies as st
from kinds import pairs_of
from libraries import SingleLayerTranscoder, SparseCoder, drawn
from safetensors.torch import save_file
from small import LAYERS, WIDTH, Small
from test_cross import CROSS, STREAM, crosscoded, decoded, encoded, learned, moss_coded, open_moss, save_clt, save_crosscoder

import featpatch as fp
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import dictionaries

Files = Mapping[str, bytes]
Computed = tuple[torch.Tensor, torch.Tensor]
"""Features and reconstruction."""

X = torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
ALL = torch.randn(1, 3, LAYERS * WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
"""Activations at one hook point, and at all of a CLT's side by side."""


def by_dictionary_learning(files: Files) -> Computed:
    settings, state = json.loads(files["config.json"])["trainer"], read_tensors("ae.pt", files["ae.pt"])
    kinds = {kind.__name__: kind for kind in libraries.DICTIONARY_LEARNING}
    library: Any = kinds[settings["dict_class"]]()
    if "k" not in state and hasattr(library, "k"):
        state["k"] = torch.tensor(settings["k"])
    unused = {"group_sizes"} | ({"threshold"} if settings["dict_class"] == "AutoEncoderTopK" else set())
    state = {name: value for name, value in state.items() if name not in unused}
    missing = library.load_state_dict(state, strict=False).missing_keys
    assert set(missing) <= {"k", "threshold", "group_sizes"}, missing
    norms = library.decoder.weight.norm(dim=0) if settings["dict_class"] == "AutoEncoder" else 1.0  # its loader scales to 1
    norms = torch.where(norms > 0, norms, 1.0) if isinstance(norms, torch.Tensor) else norms
    return library.encode(X) * norms, library(X)


def by_sparsify(files: Files) -> Computed:
    cfg, state = json.loads(files["cfg.json"]), read_tensors("sae.safetensors", files["sae.safetensors"])
    library = SparseCoder(cfg.get("activation", "topk"), cfg.get("transcode", False), "W_skip" in state)
    library.cfg.k = cfg["k"]
    library.load_state_dict(state)
    return library.features(X), library(X)


def by_circuit_tracer(files: Files) -> Computed:
    state = read_tensors("layer_1.safetensors", files["layer_1.safetensors"])
    function = libraries.JumpReLU() if "activation_function.threshold" in state else torch.relu
    library = SingleLayerTranscoder(function, "W_skip" in state)
    library.load_state_dict(state)
    return library.features(X), library(X)


def by_gemma_scope_2(files: Files) -> Computed:
    state = {name.replace("w_", "W_"): value for name, value in read_tensors("params", files["params.safetensors"]).items()}
    library = libraries.JumpReluAutoEncoder()
    library.load_state_dict(state)
    return library.encode(X), library(X)


def by_clt(files: Files) -> Computed:
    tensors: dict[str, torch.Tensor] = {}
    for name in files:
        tensors |= read_tensors(name, files[name]) if name.endswith(".safetensors") else {}
    features = encoded(tensors, ALL.unflatten(-1, (LAYERS, WIDTH))[0].transpose(0, 1))
    return tuple(torch.cat(list(of), dim=-1)[None] for of in (features, decoded(tensors, features)))  # type: ignore[return-value]


def by_crosscoder(files: Files) -> Computed:
    (name,) = (name for name in files if name.endswith((".pt", ".safetensors")))
    state, x = read_tensors(name, files[name]), ALL.unflatten(-1, (LAYERS, WIDTH))[0]
    if name == "sae_weights.safetensors":
        cfg = {"act_fn": "relu", "norm_activation": "dataset-wise", **json.loads(files["config.json"])}
        order = [STREAM.index(hook) for hook in cfg["hook_points"]]
        features, y = moss_coded(cfg, state, x[:, order])
        back = [order.index(at) for at in range(LAYERS)]
        features, y = features[:, back], y[:, back]
        return features[:, 0][None] if cfg["act_fn"] == "relu" else features.flatten(1)[None], y.flatten(1)[None]
    unnormalised = {"activation_mean": torch.full((LAYERS, WIDTH), torch.nan), "activation_global_scale": torch.ones(LAYERS)}
    state = {**unnormalised, "code_normalization_id": torch.tensor(1), **state}
    if "threshold" in state and int(state["code_normalization_id"]) == 5:
        state["threshold"] = state["threshold"].expand(LAYERS)  # one number is the threshold of each hook point
    features, y = crosscoded(state, x)
    several = "threshold" in state and int(state["code_normalization_id"]) == 5
    return features.flatten(1)[None] if several else features[:, 0][None], y.flatten(1)[None]


def saved(folder: Path, save: Callable[[Path], object]) -> Files:
    """The files that a library saves."""
    save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def moss(folder: Path, act_fn: str, norm: str) -> None:
    cfg, state = open_moss(act_fn, norm)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(state, folder / "sae_weights.safetensors")


def crosscoder(folder: Path, kind: str, hub: bool, **options: Any) -> None:
    folder.mkdir()
    save_crosscoder(folder, kind, learned(kind, **options), hub)


NAMED = {"activation_dim": WIDTH, "dict_size": libraries.FEATURES}
ACTIVATIONS = [torch.relu, libraries.JumpReLU()]
HOOKS = {"hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
         "hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output"}  # fmt: skip
LIBRARIES: dict[str, tuple[list[Callable[[Path], object]], Callable[[Files], Computed], str, dict[str, Any]]] = {
    "dictionary_learning": (
        [lambda folder, kind=kind: libraries.save_dictionary_learning(drawn(kind()), folder, **NAMED) for kind in libraries.DICTIONARY_LEARNING],
        by_dictionary_learning, "", {},
    ),
    "sparsify": (
        [lambda folder, a=a, t=t: libraries.save_sparsify(drawn(SparseCoder(a, t, t)), folder) for a in ("topk", "groupmax") for t in (False, True)],
        by_sparsify, "", {},
    ),
    "circuit-tracer": (
        [lambda folder, of=of, skip=skip: libraries.save_circuit_tracer([drawn(SingleLayerTranscoder(of, skip), n) for n in range(2)], folder)
         for of in ACTIVATIONS for skip in (False, True)],
        by_circuit_tracer, "layer_1", {},
    ),
    "Gemma Scope": (
        [lambda folder: libraries.save_gemma_scope_2(drawn(libraries.JumpReluAutoEncoder()), folder, **HOOKS)], by_gemma_scope_2, "", {},
    ),
    "CLT": ([lambda folder, t=t: save_clt(folder, threshold=t, d_out=WIDTH) for t in (None, 1.5, -0.4)], by_clt, "", {}),
    "crosscoder": (
        [*(lambda folder, kind=kind, hub=hub, norm=norm: crosscoder(folder, kind, hub, norm=norm, normalised=norm > 3)
           for kind, hub, norm in ((CROSS[0], False, 1), (CROSS[0], True, 4), (CROSS[1], False, 3), (CROSS[1], True, 5))),
         *(lambda folder, act=act, norm=norm: moss(folder, act, norm) for act, norm in (("relu", "dataset-wise"), ("jumprelu", "inference"), ("topk", "dataset-wise")))],
        by_crosscoder, "", {"hook": STREAM},
    ),
}  # fmt: skip
"""For each library: what saves its folders, what its forward pass computes from their files, and what is loaded and how."""


def plain(files: Files) -> bool:
    """Whether a reference in float64 computes the same from these weights up to rounding: no other dtype and no huge value."""
    every = {
        key: tensor
        for name in files
        if not name.endswith((".json", ".yaml"))
        for key, tensor in read_tensors(name, files[name]).items()
    }
    numbers = {key: tensor for key, tensor in every.items() if tensor.is_floating_point() and tensor.numel()}
    said = json.loads(files.get("config.json", b"{}"))
    if said.get("sparsity_include_decoder_norm", True) is not True:
        return False  # another function, which the reference has not
    if "W_D" in every and not every["W_D"].norm(dim=-1).all():
        return False  # OpenMOSS divides by the norms of decoders
    if (
        "decoder.weight" in every
        and "threshold" in every
        and every["decoder.weight"].ndim == 3
        and bool((every["threshold"] < 0).any())
    ):
        return False  # a feature that writes nothing is on in dictionary_learning, and off here
    return all(
        (tensor.dtype == torch.float64 or not tensor.ndim or key.endswith("threshold")) and not tensor.abs().max() > 1e4
        for key, tensor in numbers.items()
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::featpatch.SlowPathWarning")
@pytest.mark.parametrize("library", LIBRARIES)
def test_damaged_folders(library: str, bridge: Small, tmp_path: Path) -> None:
    makers, expected, inside, options = LIBRARIES[library]
    originals = [saved(tmp_path / f"layers.{number}.mlp", make) for number, make in enumerate(makers)]
    folder, evil, ends = tmp_path / "layers.1.mlp", tmp_path / "evil", Counter[str]()
    pairs = pairs_of(bridge)

    def loaded(files: Mapping[str, bytes | None], ranks: bool) -> str:
        write_folder(folder, files)
        with harmless(tmp_path):
            sae = clean(lambda: fp.load_sae(folder / inside, **options))
            if sae is None:
                return "refused"
            assert repr(sae)
            found = clean(lambda: dictionaries(wrap(bridge.model), sae))
            if found is None:
                return "does not fit"
            if ranks:
                clean(lambda: fp.rank_features(bridge.model, sae, pairs, positions=[3], progress=False))
        own: Files = {name: content for name, content in files.items() if content is not None and name != "layer_0.safetensors"}
        if not plain(own):
            return "not compared"
        codec, x = found[0].codec, X if found[0].codec.d_in == WIDTH else ALL
        code = codec.encode(x)
        features, y = expected(own)
        torch.testing.assert_close(code.features, features, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(codec.decode(code.features, code.state), y, rtol=1e-8, atol=1e-8)
        return "right"

    assert [loaded(files, True) for files in originals] == ["right"] * len(originals)

    @each(0.3)
    @given(st.sampled_from(originals).flatmap(lambda files: damaged_folder(files, evil)), st.integers(0, 7))
    def check(files: dict[str, bytes | None], number: int) -> None:
        ends[loaded(files, number == 0)] += 1

    check()
    assert ends["refused"] > 0, ends
    assert ends["right"] > 0, ends
    print(library, dict(ends))
