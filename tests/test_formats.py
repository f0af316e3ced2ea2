"""Dictionaries of other libraries: by folder, by hub name and as objects, each against the library's own forward pass.

`libraries.py` has the forward passes; the loaders were compared once with dictionary_learning 0.1, eai-sparsify 1.3.3 and
circuit-tracer 0.5 themselves, to 1e-14.
"""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import libraries
import numpy as np
import pytest
import torch
from hub import serving
from kinds import TRANSCODERS, Squared, pairs_of
from libraries import K, SingleLayerTranscoder, SparseCoder, drawn
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.saes.sae import SAE
from safetensors.torch import load_file, save_file
from small import Small, at, small_hooked, standard

import featpatch as fp
from featpatch.model.transformer_lens import wrap
from featpatch.sae.adapted import Adapted
from featpatch.sae.dictionary import dictionaries

EXACT = 1e-12
STREAM, MLP_IN, MLP_OUT = "blocks.1.hook_resid_post", "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
JUMP = libraries.JumpReluAutoEncoder


def compared(small: Small, sae: Any, library: Any, reads: str, writes: str, scale: Any = 1.0) -> None:
    """Features and error at the hooks are those of the library's forward pass."""
    (found,) = dictionaries(wrap(small.model), sae)
    assert (found.reads, found.writes) == (reads, writes)
    _, cache = small.model.run_with_cache(small.clean)
    x, y = cache[reads], cache[writes]
    split = found.split({found.reads: x, found.writes: y})
    with torch.no_grad():
        expected = library(x.flatten(2))
    features = libraries.features(library, x.flatten(2))
    assert 0.05 < (features > 0).double().mean() < 0.95
    torch.testing.assert_close(split.features, features * scale, rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(split.error, y.flatten(2) - expected, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("kind", libraries.DICTIONARY_LEARNING, ids=lambda kind: kind.__name__)
def test_dictionary_learning(bridge: Small, tmp_path: Path, kind: type) -> None:
    library = drawn(kind())
    if kind is libraries.AutoEncoder:
        library.decoder.weight.data[:, ::2] /= 4  # some norms are below 1, others above
    libraries.save_dictionary_learning(library, tmp_path / "trainer_0")
    norms = library.decoder.weight.norm(dim=0).detach() if kind is libraries.AutoEncoder else 1.0  # its loader scales to 1
    loaded = fp.load_sae(tmp_path / "trainer_0")
    compared(bridge, loaded, library, STREAM, STREAM, norms)
    assert isinstance(loaded, SAE)
    assert loaded.cfg.metadata.model_name == "openai-community/gpt2"
    compared(bridge, fp.dictionaries.adapt(library, STREAM), library, STREAM, STREAM)
    compared(bridge, fp.load_sae(tmp_path / "trainer_0" / "ae.pt"), library, STREAM, STREAM, norms)


def test_what_an_object_of_dictionary_learning_was_set_to(bridge: Small) -> None:
    """JumpReLU SAEs that take b_dec off their input, Matryoshka SAEs without their last group."""
    jump, nested = drawn(JUMP()), drawn(libraries.MatryoshkaBatchTopKSAE())
    jump.apply_b_dec_to_input, nested.active_groups = True, 1
    for library in (jump, nested):
        compared(bridge, fp.dictionaries.adapt(library, STREAM), library, STREAM, STREAM)
    before = jump.W_enc.clone()
    sae = fp.dictionaries.adapt(jump, STREAM, name="mine")
    sae.W_enc.data.zero_()
    assert torch.equal(jump.W_enc, before)
    assert dictionaries(wrap(bridge.model), sae)[0].name == "mine"


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("transcode", [False, True], ids=["SAE", "transcoder"])
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_sparsify(bridge: Small, tmp_path: Path, activation: str, transcode: bool, skip: bool) -> None:
    library = drawn(SparseCoder(activation, transcode, skip))
    libraries.save_sparsify(library, tmp_path / "layers.1.mlp")
    reads = MLP_IN if transcode else MLP_OUT
    compared(bridge, fp.load_sae(tmp_path / "layers.1.mlp"), library, reads, MLP_OUT)
    compared(bridge, fp.dictionaries.adapt(library, reads, hook_out=MLP_OUT), library, reads, MLP_OUT)
    half = fp.load_sae(tmp_path / "layers.1.mlp", dtype="bfloat16")
    (found,) = dictionaries(wrap(bridge.model), half)
    assert found.codec.dtype == torch.bfloat16
    assert found.directions(torch.arange(3)).dtype == torch.float32


@pytest.mark.parametrize("transcode", [False, True], ids=["SAE", "transcoder"])
def test_encoders_give_what_active_features_are(bridge: Small, tmp_path: Path, transcode: bool) -> None:
    """An SAE of sparsify reads the activation minus b_dec, a transcoder the activation itself."""
    libraries.save_sparsify(drawn(SparseCoder("groupmax", transcode)), tmp_path / "layers.1.mlp")
    codec = dictionaries(wrap(bridge.model), fp.load_sae(tmp_path / "layers.1.mlp"))[0].codec
    x = torch.randn(1, 5, codec.d_in, generator=torch.Generator().manual_seed(0), dtype=codec.dtype)
    features, found = codec.encode(x).features, codec.encoders(torch.arange(codec.d_sae))
    assert found is not None
    rows, biases = found
    active = features > 0
    assert active.any()
    torch.testing.assert_close((x.to(rows) @ rows.T + biases)[active], features[active].to(rows))


@pytest.mark.parametrize(
    ("folder", "transcode", "reads", "writes"),
    [
        ("layers.1", False, STREAM, STREAM),
        ("layers.1", True, "blocks.1.hook_resid_pre", STREAM),
        ("transformer.h.1.mlp", False, MLP_OUT, MLP_OUT),
        ("h.1.attn", False, "blocks.1.hook_attn_out", "blocks.1.hook_attn_out"),
    ],
)
def test_where_sparsify_trains(bridge: Small, tmp_path: Path, folder: str, transcode: bool, reads: str, writes: str) -> None:
    """A module's output for an SAE, from its input to its output for a transcoder."""
    library = drawn(SparseCoder(transcode=transcode))
    libraries.save_sparsify(library, tmp_path / folder)
    compared(bridge, fp.load_sae(tmp_path / folder), library, reads, writes)


def test_an_sae_of_the_embedding(bridge: Small, tmp_path: Path) -> None:
    """It loads with its hook, at which this model, which adds positions, can't be patched."""
    libraries.save_sparsify(drawn(SparseCoder()), tmp_path / "wte")
    loaded = fp.load_sae(tmp_path / "wte")
    assert isinstance(loaded, SAE)
    assert (loaded.cfg.metadata.hook_name, loaded.cfg.metadata.hook_name_out) == ("hook_embed", None)
    with pytest.raises(fp.FeatpatchError, match="the SAE reads 'hook_embed', to which this model adds positions"):
        dictionaries(wrap(bridge.model), loaded)


@pytest.mark.parametrize("skip", [False, True], ids=["", "skip"])
@pytest.mark.parametrize("function", [lambda: torch.relu, libraries.JumpReLU, libraries.TopK], ids=["ReLU", "JumpReLU", "TopK"])
def test_circuit_tracer(bridge: Small, tmp_path: Path, function: Callable[[], Any], skip: bool) -> None:
    library = drawn(SingleLayerTranscoder(function(), skip))
    reads = "blocks.1.hook_resid_mid"
    compared(bridge, fp.dictionaries.adapt(library, reads, hook_out=MLP_OUT), library, reads, MLP_OUT)
    if not isinstance(library.activation_function, libraries.TopK):  # which no file can state
        libraries.save_circuit_tracer([drawn(SingleLayerTranscoder(function(), skip), 8), library], tmp_path / "set")
        for name in ("layer_1", "layer_1.safetensors"):
            compared(bridge, fp.load_sae(tmp_path / "set" / name), library, reads, MLP_OUT)
    if isinstance(library.activation_function, libraries.JumpReLU):
        library.activation_function.threshold.data -= 1  # circuit-tracer keeps negative values above a negative threshold
        (found,) = dictionaries(wrap(bridge.model), fp.dictionaries.adapt(library, reads, hook_out=MLP_OUT))
        x = torch.randn(1, 50, 16, dtype=torch.float64)
        code = found.codec.encode(x)
        assert (code.features < 0).any()
        torch.testing.assert_close(code.features, library.features(x).detach())
        torch.testing.assert_close(found.codec.decode(code.features, code.state), library(x).detach())


@pytest.mark.parametrize(
    ("name", "reads", "writes"),
    [
        ("res", STREAM, STREAM),
        ("mlp", MLP_OUT, MLP_OUT),
        ("att", "blocks.1.attn.hook_z", "blocks.1.attn.hook_z"),
        ("transcoders", MLP_IN, MLP_OUT),
    ],
)
def test_gemma_scope(bridge: Small, tmp_path: Path, name: str, reads: str, writes: str) -> None:
    library = drawn(JUMP())
    folder = tmp_path / f"gemma-scope-2b-pt-{name}" / "layer_1" / "width_16k" / "average_l0_5"
    libraries.save_gemma_scope(library, folder)
    loaded = fp.load_sae(folder)
    compared(bridge, loaded, library, reads, writes)
    assert loaded.cfg.metadata.model_name == "gemma-2-2b"
    libraries.save_gemma_scope(library, tmp_path / "elsewhere")
    with pytest.raises(fp.FeatpatchError, match=r"does not say at which hook the dictionary reads: pass hook='blocks.N"):
        fp.load_sae(tmp_path / "elsewhere")
    compared(bridge, fp.load_sae(tmp_path / "elsewhere", hook=reads, hook_out=writes), library, reads, writes)


@pytest.mark.parametrize("skipping", [False, True], ids=["", "skip"])
def test_gemma_scope_2(bridge: Small, tmp_path: Path, skipping: bool) -> None:
    inner, skip = drawn(JUMP()), torch.randn(16, 16, dtype=torch.float64) if skipping else None
    hooks = {"hf_hook_point_in": "model.layers.1.pre_feedforward_layernorm.output",
             "hf_hook_point_out": "model.layers.1.post_feedforward_layernorm.output"}  # fmt: skip
    libraries.save_gemma_scope_2(inner, tmp_path / "transcoder", skip, **hooks)

    class Skipping(torch.nn.Module):
        features = staticmethod(inner.encode)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inner(x) if skip is None else inner(x) + torch.einsum("oi,bpi->bpo", skip, x)

    compared(bridge, fp.load_sae(tmp_path / "transcoder"), Skipping(), MLP_IN, MLP_OUT)
    libraries.save_gemma_scope_2(inner, tmp_path / "sae", hf_hook_point_in="model.layers.1.output")
    compared(bridge, fp.load_sae(tmp_path / "sae"), inner, STREAM, STREAM)


class Tanh:
    """A transcoder with a skip path that is not linear."""

    def __init__(self) -> None:
        self.inner = Squared(16)
        self.encode, self.decode = self.inner.encode, self.inner.decode

    def skip(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x) * 0.3


def test_a_skip_path_of_ones_own(bridge: Small) -> None:
    """error = y - decode(f) - skip(x), given as a matrix or as a function."""
    _, cache = bridge.model.run_with_cache(bridge.clean)
    x, y = cache[MLP_IN], cache[MLP_OUT]
    matrix, own = torch.randn(16, 16, dtype=torch.float64), Tanh()
    for skip, expected in ((matrix, x @ matrix.T), (own.skip, torch.tanh(x) * 0.3)):
        sae = fp.dictionaries.adapt(own, MLP_IN, hook_out=MLP_OUT, d_in=16, skip=skip)
        (found,) = dictionaries(wrap(bridge.model), sae)
        split = found.split({found.reads: x, found.writes: y})
        with torch.no_grad():
            error = y - own.decode(own.encode(x)) - expected
        torch.testing.assert_close(split.error, error, rtol=EXACT, atol=EXACT)
    without = fp.dictionaries.adapt(own, MLP_IN, hook_out=MLP_OUT, d_in=16)
    digests = {dictionaries(wrap(bridge.model), each)[0].codec.digest() for each in (sae, without)}
    assert len(digests) == 2


def looking_back(x: torch.Tensor) -> torch.Tensor:
    return x.roll(1, dims=1)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (torch.zeros(16, 8), r"skip is a tensor \[16, 8\] of torch.float32: expected finite numbers \[d_out, 16\]"),
        (torch.full((16, 16), torch.nan), "expected finite numbers"),
        (torch.zeros(16), r"skip is a tensor \[16\]"),
        (torch.zeros(16, 16, dtype=torch.long), "of torch.int64"),
        (3, "skip is a int: expected a matrix"),
        (torch.zeros(8, 16), r"returns 8 values and decode returns 16: expected equal numbers; pass a matrix \[16, 16\]"),
        (lambda x: x[:, :1], r"skip returns \[2, 1, 16\] for a tensor \[2, 8, 16\]"),
        (lambda x: x @ torch.zeros(3, 3), r"skip fails on a tensor \[1, 1, 16\]"),
        (looking_back, "encodes a row differently when other rows are in the batch|decodes a position differently"),
    ],
)  # fmt: skip
def test_skip_paths_that_are_none(bridge: Small, skip: Any, message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        dictionaries(wrap(bridge.model), fp.dictionaries.adapt(Squared(16), MLP_IN, hook_out=MLP_OUT, d_in=16, skip=skip))


def test_the_object_and_the_folder_rank_alike(bridge: Small, tmp_path: Path) -> None:
    """Through the whole of `rank_features`; the rows against the oracle are in the matrix of `test_kinds.py`."""
    library = drawn(SparseCoder(transcode=True, skip=True))
    libraries.save_sparsify(library, tmp_path / "layers.1.mlp")
    found = [fp.load_sae(tmp_path / "layers.1.mlp"), fp.dictionaries.adapt(library, MLP_IN, hook_out=MLP_OUT)]
    one, other = (fp.rank_features(bridge.model, sae, pairs_of(bridge), progress=False) for sae in found)
    assert len(one) > 3
    assert one.nodes == other.nodes
    np.testing.assert_array_equal(one.denoised, other.denoised)


def test_hooks_that_are_named(bridge: Small, tmp_path: Path) -> None:
    """Instead of those that the files say, also for sae-lens' own folders."""
    library = drawn(JUMP())
    libraries.save_dictionary_learning(library, tmp_path / "trainer_0")
    compared(bridge, fp.load_sae(tmp_path / "trainer_0", hook=MLP_OUT), library, MLP_OUT, MLP_OUT)
    fp.load_sae(tmp_path / "trainer_0").save_model(tmp_path / "sae_lens")
    compared(bridge, fp.load_sae(tmp_path / "sae_lens", hook=MLP_OUT), library, MLP_OUT, MLP_OUT)
    compared(bridge, fp.load_sae(tmp_path / "sae_lens", hook=MLP_IN, hook_out=MLP_OUT), library, MLP_IN, MLP_OUT)
    with pytest.raises(fp.FeatpatchError, match="hook='': expected the name of a hook"):
        fp.load_sae(tmp_path / "trainer_0", hook="")


@pytest.mark.parametrize(
    ("trainer", "hook"),
    [
        ({"submodule_name": "mlp_out_layer_1"}, MLP_OUT),
        ({"submodule_name": "attention_out_layer_1"}, "blocks.1.hook_attn_out"),
        ({"submodule_name": "resid_pre_layer_1"}, "blocks.1.hook_resid_pre"),
        ({"submodule_name": None}, STREAM),
        ({"submodule_name": "router"}, None),
        ({"layer": None}, None),
    ],
)
def test_where_dictionary_learning_trains(bridge: Small, tmp_path: Path, trainer: dict[str, Any], hook: str | None) -> None:
    library = drawn(libraries.GatedAutoEncoder())
    libraries.save_dictionary_learning(library, tmp_path / "sae", **trainer)
    if hook is None:
        with pytest.raises(fp.FeatpatchError, match=r"does not say at which hook .*: pass hook='blocks.N.hook_resid_post'"):
            fp.load_sae(tmp_path / "sae")
        hook = STREAM
        compared(bridge, fp.load_sae(tmp_path / "sae", hook=hook), library, hook, hook)
    else:
        compared(bridge, fp.load_sae(tmp_path / "sae"), library, hook, hook)


def test_an_sae_of_another_width_out_than_in(tmp_path: Path) -> None:
    """Its output can't replace what it reads; the biases of this class do not show it."""
    library = libraries.AutoEncoderNew()
    library.decoder = libraries.linear(libraries.FEATURES, 2 * libraries.WIDTH)
    libraries.save_dictionary_learning(drawn(library), tmp_path / "sae")
    with pytest.raises(fp.FeatpatchError, match="reads 16 and writes 32 values: expected the same width in and out of an SAE"):
        fp.load_sae(tmp_path / "sae")


def test_folders_of_several(tmp_path: Path) -> None:
    for layer in (10, 2, 1):
        libraries.save_sparsify(SparseCoder(), tmp_path / "run" / f"layers.{layer}")
    with pytest.raises(
        fp.FeatpatchError, match=r"holds several dictionaries \(layers.1, layers.2, layers.10\): .*run/layers.1'"
    ):
        fp.load_sae(tmp_path / "run")
    libraries.save_circuit_tracer([SingleLayerTranscoder()] * 3, tmp_path / "set")
    with pytest.raises(fp.FeatpatchError, match=r"holds several dictionaries \(layer_0, layer_1, layer_2\): .*set/layer_0'"):
        fp.load_sae(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text("transcoders: ['hf://google/gemma/layer_0/params.npz']")
    with pytest.raises(fp.FeatpatchError, match=r"lists files in other repositories \(hf://google/gemma/layer_0/params.npz"):
        fp.load_sae(tmp_path / "elsewhere")


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


Damage = Callable[[Path], None]


def rewritten(**changes: Any) -> Damage:
    """Other weights in an ae.pt: a value of None takes them away."""

    def damage(folder: Path) -> None:
        state = torch.load(folder / "ae.pt", weights_only=True)
        state |= {name.replace("__", "."): value for name, value in changes.items()}
        torch.save({name: value for name, value in state.items() if value is not None}, folder / "ae.pt")

    return damage


def configured(**changes: Any) -> Damage:
    def damage(folder: Path) -> None:
        settings = json.loads((folder / "config.json").read_text())
        settings["trainer"] |= changes
        (folder / "config.json").write_text(json.dumps(settings))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: torch.save(Evil(folder / "ran"), folder / "ae.pt"), "can't be read .*code in it is never run"),
        (lambda folder: (folder / "ae.pt").write_bytes(pickle.dumps(Evil(folder / "ran"))), "code in it is never run"),
        (lambda folder: (folder / "ae.pt").write_bytes((folder / "ae.pt").read_bytes()[:900]), "can't be read"),
        (
            lambda folder: (folder / "ae.pt").write_bytes((folder / "ae.pt").read_bytes()[:5000]),
            r"can't be read \(it is truncated, after 5000 bytes\)",
        ),
        (lambda folder: torch.save([torch.zeros(3)], folder / "ae.pt"), "holds a list: expected a state_dict"),
        (lambda folder: torch.save({"W": 3}, folder / "ae.pt"), "expected a state_dict"),
        (rewritten(b_dec=None), "expected .*; b_dec is missing"),
        (rewritten(log_thresholds=torch.zeros(3)), "holds log_thresholds, whose meaning is unknown"),
        (rewritten(b_dec=torch.zeros(15)), "shapes of the weights do not match"),
        (rewritten(encoder__weight=torch.zeros(16)), "shapes of the weights do not match"),
        (rewritten(encoder__weight=torch.zeros(0, 16)), "shapes of the weights do not match"),
        (rewritten(b_dec=torch.full((16,), torch.inf)), "16 of 16 values of b_dec are NaN or infinite: expected finite"),
        (rewritten(b_dec=torch.zeros(16, dtype=torch.int8)), "b_dec is torch.int8: expected one of torch.float64"),
        (rewritten(k=torch.tensor(K + 1)), "the weights say k=7 and the configuration k=6"),
        (rewritten(k=torch.tensor([K, K])), r"the weights say k=\[6, 6\] and the configuration k=6"),
        (configured(dict_class=["AutoEncoderTopK"]), "is a .* of dictionary_learning: expected one of AutoEncoder"),
        (configured(k=99), "the weights say k=6 and the configuration k=99"),
        (configured(dict_size=25), "the configuration says dict_size=25 and the weights 24: expected both to agree"),
        (configured(activation_dim=0), "the configuration says activation_dim=0 and the weights 16"),
        (configured(k=None, dict_class="IdentityDict"), "'IdentityDict' of dictionary_learning: expected one of AutoEncoder"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' can't be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json' holds a list: expected settings by name"),
        (
            lambda folder: (folder / "config.json").write_text('{"trainer": 3}'),
            r"config.json' does not name the class of ae.pt: expected trainer.dict_class",
        ),
        (lambda folder: (folder / "config.json").unlink(), "config.json' can't be read"),
    ],
)
def test_damaged_folders(tmp_path: Path, damage: Damage, message: str) -> None:
    """One error, and nothing in the folder is run."""
    folder = tmp_path / "trainer_0"
    libraries.save_dictionary_learning(drawn(libraries.AutoEncoderTopK()), folder)
    damage(folder)
    with pytest.raises(fp.FeatpatchError, match=message) as refused:
        fp.load_sae(folder)
    assert not (folder / "ran").exists()
    assert "weights_only" not in str(refused.value), "no advice to run what is in the file"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "softmax"}, "activation='softmax'.*expected activation 'topk' or 'groupmax'"),
        ({"signed": True}, "signed=True"),
        ({"k": 0}, "k=0: expected k from 1 to d_sae"),
        ({"k": "32"}, "k='32'"),
        ({"k": 7, "activation": "groupmax"}, "24 features in 7 groups"),
        ({"d_in": 8}, "cfg.json says d_in=8"),
        ({"num_latents": 23}, "the configuration says num_latents=23 and the weights 24"),
        ({"num_latents": -1}, "the configuration says num_latents=-1"),
        ({"skip_connection": True}, "cfg.json says .*skip_connection=True"),
    ],
)
def test_settings_of_sparsify_that_are_none(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    libraries.save_sparsify(SparseCoder(), tmp_path / "layers.1", **changed)
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.load_sae(tmp_path / "layers.1")


def test_settings_of_sparsify_that_older_versions_did_not_write(bridge: Small, tmp_path: Path) -> None:
    """An SAE without a skip path, with the activation function that there was: the k largest of all features."""
    library = drawn(SparseCoder())
    libraries.save_sparsify(library, tmp_path / "layers.1")
    (tmp_path / "layers.1" / "cfg.json").write_text(json.dumps({"k": library.cfg.k, "d_in": library.d_in}))
    compared(bridge, fp.load_sae(tmp_path / "layers.1"), library, STREAM, STREAM)


def test_damaged_files_of_others(tmp_path: Path) -> None:
    libraries.save_sparsify(SparseCoder(), tmp_path / "layers.1")
    file = tmp_path / "layers.1" / "sae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    gemma = tmp_path / "gemma-scope-2b-pt-res" / "layer_1"
    gemma.mkdir(parents=True)
    np.savez(gemma / "params.npz", W_enc=np.array([Evil(tmp_path / "ran")], dtype=object))
    for folder in (tmp_path / "layers.1", gemma):
        with pytest.raises(fp.FeatpatchError, match="can't be read"):
            fp.load_sae(folder)
    libraries.save_circuit_tracer([SingleLayerTranscoder()], tmp_path / "set")
    (tmp_path / "set" / "config.yaml").write_text(f"!!python/object/apply:os.mkdir ['{tmp_path / 'ran'}']")
    with pytest.raises(fp.FeatpatchError, match="config.yaml' can't be read"):
        fp.load_sae(tmp_path / "set" / "layer_0")
    assert not (tmp_path / "ran").exists()
    libraries.save_sparsify(SparseCoder(), tmp_path / "layers.2")
    for dtype in ("int8", "nonsense"):
        with pytest.raises(fp.FeatpatchError, match=f"dtype='{dtype}': expected one of float64, float32"):
            fp.load_sae(tmp_path / "layers.2", dtype=dtype)
    with pytest.raises(fp.FeatpatchError, match="norm_scaling_factor=2.0: expected None"):
        fp.load_sae(tmp_path / "layers.2", norm_scaling_factor=2.0)


def test_objects_that_are_passed_as_they_are(bridge: Small) -> None:
    for library, source in ((JUMP(), "dictionary_learning"), (SparseCoder(), "sparsify"),
                            (SingleLayerTranscoder(), "circuit-tracer")):  # fmt: skip
        with pytest.raises(
            fp.FeatpatchError, match=rf"an object of {source}, .* expected fp.dictionaries.adapt\(object, hook\)"
        ):
            fp.rank_features(bridge.model, library, pairs_of(bridge))
    for other, message in (
        (libraries.TranscoderSet(), r"a transcoder for each layer: .* adapt one, such as saes\[3\]"),
        (SingleLayerTranscoder(torch.sigmoid), "the activation function sigmoid: expected relu, JumpReLU or TopK"),
        (SingleLayerTranscoder(), "does not say at which hook the dictionary writes: pass hook_out='blocks.N.hook_mlp_out'"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.dictionaries.adapt(other, MLP_IN)
    for options in ({"d_in": 8}, {"skip": torch.zeros(16, 16)}):
        with pytest.raises(fp.FeatpatchError, match="reads 16 values and no skip path|has its own skip"):
            fp.dictionaries.adapt(SingleLayerTranscoder(), MLP_IN, hook_out=MLP_OUT, **options)
    with pytest.raises(fp.FeatpatchError, match="d_in=None: expected names of hook points and a width"):
        fp.dictionaries.adapt(Squared(16), MLP_IN)


class Doubled(libraries.AutoEncoder):
    """The user's own: it keeps the name of its base, but encodes otherwise."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().encode(x)


Doubled.__name__ = "AutoEncoder"


def test_a_subclass_is_adapted_by_its_own_encode(bridge: Small) -> None:
    library = drawn(Doubled())
    compared(bridge, fp.dictionaries.adapt(library, STREAM, d_in=16), library, STREAM, STREAM)
    with pytest.raises(fp.FeatpatchError, match="d_in=None: expected names of hook points and a width of 1 or more"):
        fp.dictionaries.adapt(library, STREAM)


def test_weights_of_a_compiled_model(bridge: Small, tmp_path: Path) -> None:
    library = drawn(JUMP())
    libraries.save_dictionary_learning(library, tmp_path / "sae")
    torch.save({f"_orig_mod.{name}": value for name, value in library.state_dict().items()}, tmp_path / "sae" / "ae.pt")
    compared(bridge, fp.load_sae(tmp_path / "sae"), library, STREAM, STREAM)


@pytest.mark.parametrize(("module", "hook"), [("mlp", "hook_mlp_out"), ("attn", "hook_attn_out")])
def test_outputs_of_modules_in_a_hooked_transformer(module: str, hook: str) -> None:
    """The values are those that the module returns, by a hook of torch's own."""
    small = small_hooked()
    library, name, written = drawn(JUMP()), f"blocks.1.{module}.hook_out", f"blocks.1.{hook}"
    compared(small, fp.dictionaries.adapt(library, name), library, written, written)
    (found,) = dictionaries(wrap(small.model), fp.dictionaries.adapt(library, name))
    seen: list[torch.Tensor] = []
    handle = getattr(small.model.blocks[1], module).register_forward_hook(lambda m, args, out: seen.append(out))
    with torch.no_grad():
        small.model(small.clean)
    handle.remove()
    assert torch.equal(wrap(small.model).read(small.clean, [found.reads])[found.reads], seen[0])
    small.model.cfg.use_normalization_before_and_after = True
    with pytest.raises(fp.FeatpatchError, match=f"has no hook '{name}', and '{written}' comes after another norm"):
        dictionaries(wrap(small.model), fp.dictionaries.adapt(library, name))


@pytest.mark.parametrize("convert", [torch.nn.Module.half, torch.nn.Module.float, torch.nn.Module.bfloat16])
def test_an_sae_whose_type_is_not_that_of_its_weights(bridge: Small, convert: Callable[[Any], Any]) -> None:
    sae = convert(standard(STREAM, 0))
    with pytest.raises(fp.FeatpatchError, match=r"its dtype is torch.float64, .* convert the SAE with sae.to\(dtype=torch"):
        fp.rank_features(bridge.model, sae, pairs_of(bridge), progress=False)
    sae = sae.to(dtype=next(sae.parameters()).dtype)
    assert len(fp.rank_features(bridge.model, sae, pairs_of(bridge)[:1], positions=[3], progress=False))


def as_sae_lens_leaves_it(monkeypatch: pytest.MonkeyPatch, folder: Path) -> SAE[Any]:
    """A layer of a CLT by `SAE.from_pretrained(repository, "1", converter=...)`, from files of circuit-tracer's format."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = {"W_enc_1": (24, 16), "b_enc_1": (24,), "b_dec_1": (16,)}
    save_file({name: torch.randn(size, generator=generator) for name, size in weights.items()}, folder / "W_enc_1.safetensors")
    save_file({"W_dec_1": torch.randn(24, 2, 16, generator=generator)}, folder / "W_dec_1.safetensors")
    (folder / "config.yaml").write_text(
        "model_kind: cross_layer_transcoder\nmodel_name: gpt2\nfeature_input_hook: hook_resid_mid\n"
        "feature_output_hook: hook_mlp_out\n"
    )
    shapes = {name: list(value.shape) for name, value in load_file(folder / "W_enc_1.safetensors").items()}
    monkeypatch.setattr(pretrained_sae_loaders, "hf_hub_download", lambda repo, file, **options: str(folder / file))
    monkeypatch.setattr(pretrained_sae_loaders, "get_safetensors_tensor_shapes", lambda repo, file: shapes)
    with pytest.warns(UserWarning, match="summing all decoders"), pytest.warns(UserWarning, match="model_from_pretrained"):
        return SAE.from_pretrained(
            "someone/clt", "1", converter=pretrained_sae_loaders.mntss_clt_layer_huggingface_loader, device="cpu"
        )


def test_a_layer_of_a_clt_is_recognised(bridge: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As an object from sae-lens' converter, saved and loaded again, and in circuit-tracer's own files."""
    sae = as_sae_lens_leaves_it(monkeypatch, tmp_path / "clt")
    sae.W_enc.data = sae.W_enc.data.contiguous()
    sae.save_model(tmp_path / "saved")
    with pytest.warns(UserWarning, match="model_from_pretrained_kwargs"):
        again = fp.load_sae(tmp_path / "saved")
    for each in (sae, again):
        with pytest.raises(fp.FeatpatchError, match=r"summed .* a single layer of a cross-layer transcoder .* fp.load_sae"):
            fp.rank_features(bridge.model, each, pairs_of(bridge))
    for name in ("W_enc_1.safetensors", "W_enc_1"):
        with pytest.raises(fp.FeatpatchError, match=r"a single layer of a cross-layer transcoder .*, here '.*/clt'"):
            fp.load_sae(tmp_path / "clt" / name)
    with pytest.raises(fp.FeatpatchError, match=r"lacks W_enc_0.safetensors, W_dec_0.safetensors: expected"):
        fp.load_sae(tmp_path / "clt")


def test_a_clt_of_gemma_scope_2(tmp_path: Path) -> None:
    """Its decoder has a layer of its own."""
    libraries.save_gemma_scope_2(JUMP(), tmp_path / "clt")
    weights = load_file(tmp_path / "clt" / "params.safetensors")
    save_file({**weights, "w_dec": torch.zeros(24, 3, 16)}, tmp_path / "clt" / "params.safetensors")
    with pytest.raises(fp.FeatpatchError, match="a single layer of a cross-layer transcoder"):
        fp.load_sae(tmp_path / "clt")


def test_a_transcoder_of_one_layer_is_no_clt(bridge: Small) -> None:
    """Neither those that are made by hand nor those of sae-lens' other loaders, which say what they were trained on."""
    for said in ({}, {"model_from_pretrained_kwargs": {"fold_ln": False}, "neuronpedia_id": None, "context_size": 512}):
        sae = TRANSCODERS["transcoder"](MLP_IN, 16, MLP_OUT, 16)
        sae.cfg.metadata = at(MLP_IN, MLP_OUT)
        for name, value in said.items():
            setattr(sae.cfg.metadata, name, value)
        assert len(fp.rank_features(bridge.model, sae, pairs_of(bridge), progress=False)) > 0


DOWNLOAD = """
import sys
import torch
import featpatch as fp
from featpatch.sae.adapted import Adapted
from featpatch.sae.dictionary import dictionaries
for name in sys.argv[1:]:
    try:
        sae = fp.load_sae(name)
    except fp.FeatpatchError as error:
        print("refused:", error)
    else:
        said = (sae.hook, sae.hook_out) if isinstance(sae, Adapted) else (sae.cfg.metadata.hook_name, sae.cfg.metadata.model_name)
        print(type(sae).__name__, *said)
"""


@pytest.mark.extended
def test_names_on_the_hub(tmp_path: Path) -> None:
    """Each format is found behind `owner/repository/folder`, and only its own files are fetched."""
    root = tmp_path / "repositories"
    for layer in (0, 1):
        libraries.save_sparsify(drawn(SparseCoder(transcode=True, skip=True)), root / "sparsify" / f"layers.{layer}.mlp")
    libraries.save_dictionary_learning(drawn(JUMP()), root / "learned" / "run" / "trainer_0")
    libraries.save_circuit_tracer([drawn(SingleLayerTranscoder(), seed) for seed in range(2)], root / "traced")
    libraries.save_gemma_scope(drawn(JUMP()), root / "scope" / "layer_1" / "width_16k" / "average_l0_5")
    repositories = {"someone/sparsify": root / "sparsify", "someone/learned": root / "learned", "someone/traced": root / "traced",
                    "google/gemma-scope-2b-pt-transcoders": root / "scope"}  # fmt: skip
    names = {
        "someone/sparsify/layers.1.mlp": "Adapted blocks.1.mlp.hook_in blocks.1.mlp.hook_out",
        "someone/learned/run/trainer_0": "JumpReLUSAE blocks.1.hook_resid_post openai-community/gpt2",
        "someone/traced/layer_1": "Transcoder blocks.1.hook_resid_mid openai-community/gpt2",
        "google/gemma-scope-2b-pt-transcoders/layer_1/width_16k/average_l0_5":
            "JumpReLUTranscoder blocks.1.mlp.hook_in gemma-2-2b",
        "someone/sparsify": "refused: 'someone/sparsify' holds several dictionaries (layers.0.mlp, layers.1.mlp): expected one; name it, "
            "such as 'someone/sparsify/layers.0.mlp'",
        "someone/learned/run": "refused: 'someone/learned/run' holds several dictionaries (trainer_0): expected one; name it, such as "
            "'someone/learned/run/trainer_0'",
    }  # fmt: skip
    with serving(repositories) as hub:
        command = [sys.executable, "-W", "ignore", "-c", DOWNLOAD]
        found = subprocess.run(
            [*command, *names, "someone/traced/layer_7"], env=hub.environment(tmp_path / "home"), capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert found.returncode == 0, found.stderr
        *lines, missing = found.stdout.splitlines()
        assert lines == list(names.values())
        assert missing.startswith("refused: the SAE 'someone/traced/layer_7' can't be loaded")
        fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
        assert any("layer_1.safetensors" in request for request in fetched)
        assert not any("layer_0.safetensors" in request or "layers.0.mlp" in request for request in fetched)
        offline = {**hub.environment(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
        again = subprocess.run(
            [*command, *list(names)[:4]], env=offline, capture_output=True, text=True, timeout=300, check=False
        )
        assert again.stdout.splitlines() == list(names.values())[:4], again.stderr


def test_what_sae_lens_has_no_class_for_is_adapted(tmp_path: Path) -> None:
    libraries.save_sparsify(SparseCoder("groupmax"), tmp_path / "layers.1")
    assert isinstance(fp.load_sae(tmp_path / "layers.1"), Adapted)
