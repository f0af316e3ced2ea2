"""The fast path on many architectures, at every layer and site, against plain hooked forward passes, in float64."""

import random
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import jaxtyping
import oracle
import pytest
import torch
from architectures import BRIDGES, D_HEAD, HEADS, HOOKED, LAYERS, LLAMA, OTHERS, VOCAB, WIDTH, bridge, hooked, quantised
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from small import randomised
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

import featpatch as fp
from featpatch import sites
from featpatch.engine import suffix
from featpatch.engine.cost import plain_flops
from featpatch.engine.patches import Block
from featpatch.engine.path import PlainPath
from featpatch.engine.suffix import SuffixPath
from featpatch.model.layer import UnsupportedError
from featpatch.model.transformer_lens import wrap
from featpatch.patching.features import feature_study
from featpatch.sae.dictionary import dictionaries as dictionaries_of

EXACT = 1e-10
DIRECTIONS = ("denoising", "noising")
HOOKS = ("hook_resid_pre", "hook_resid_mid", "hook_attn_out", "attn.hook_z", "hook_mlp_out", "hook_resid_post")
MODELS = [("bridge", name) for name in BRIDGES] + [("hooked", name) for name in HOOKED]


def dictionaries(model: Any, diagonal: bool = False) -> list[Any]:
    """At every hook of every layer, or at every hook of one layer, so that there is one in each."""
    saes = []
    for layer in range(LAYERS):
        for hook in HOOKS[layer::LAYERS] if diagonal else HOOKS:
            name = f"blocks.{layer}.{hook}"
            if name not in model.hook_dict or (hook == "hook_mlp_out" and getattr(model.cfg, "attn_only", False)):
                continue
            z = hook.endswith("hook_z")
            config = StandardSAEConfig(
                HEADS * D_HEAD if z else WIDTH, 6, "float64", metadata=SAEMetadata(hook_name=name),
                reshape_activations="hook_z" if z else "none",
            )  # fmt: skip
            saes.append(randomised(StandardSAE(config), len(saes)))
    return saes


def pairs(outputs: int) -> fp.Pairs:
    """Three pairs of two lengths with one or two changed tokens, and an answer position before the end."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for length, changed, answer in ((9, [3], -1), (9, [2, 5], 7), (6, [4], -1)):
        clean = torch.randint(1, VOCAB - 1, (length,), generator=generator)
        corrupted = clean.clone()
        corrupted[changed] = (corrupted[changed] + 1) % VOCAB
        made.append(fp.Pair(tuple(clean.tolist()), tuple(corrupted.tolist()), (1, 2), (outputs - 1,), answer_position=answer))
    return fp.Pairs(tuple(made))


def oracle_value(model: Any, sae: Any, node: fp.Node, pair: fp.Pair, direction: str) -> float:
    runs = {"denoising": (pair.corrupted, pair.clean), "noising": (pair.clean, pair.corrupted)}[direction]
    base, source = (torch.tensor([tokens]) for tokens in runs)
    positions = list(range(len(pair))) if node.position == "all" else [int(node.position)]
    if node.kind == "activation":
        logits = oracle.patched_activation_logits(model, node.site, base, source, positions)
    else:
        features = {"feature": [node.index], "all_features": list(range(6)), "error": []}[node.kind]
        logits = oracle.patched_logits(
            model, sae, base, source, features=features, positions=positions, error=node.kind == "error"
        )
    at_answer = logits[0, pair.answer_position]
    return float(at_answer[list(pair.correct)].mean() - at_answer[list(pair.wrong)].mean())


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("positions", ["each", "all"])
@pytest.mark.parametrize(("kind", "name"), MODELS)
def test_fast_path_equals_plain_hooks_everywhere(kind: str, name: str, positions: str) -> None:
    """Law 4. The fast path must have been taken: a fallback warns, and warnings are errors here."""
    model = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]()
    oracle._activations.cache_clear()
    saes, drawn = dictionaries(model), pairs(int(model.unembed.W_U.shape[-1]))[1:]
    at = {sae.cfg.metadata.hook_name: sae for sae in saes}
    effects = fp.rank_features(model, saes, drawn, positions=positions, progress=False)
    by_site: dict[str, list[int]] = {}
    for entry in range(len(effects.row)):
        by_site.setdefault(effects.nodes[effects.row[entry]].site, []).append(entry)
    assert by_site.keys() == at.keys()
    for site, entries in by_site.items():
        for entry in random.Random(site).sample(entries, min(2, len(entries))):
            node, pair = effects.nodes[effects.row[entry]], drawn[int(effects.pair[entry])]
            direction = DIRECTIONS[entry % 2]
            found = effects.denoised if direction == "denoising" else effects.noised
            assert abs(found[entry] - oracle_value(model, at[site], node, pair, direction)) < EXACT, (node, direction)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("kind", "name"), [("bridge", "gemma2"), ("hooked", "neox")])
def test_the_plain_path_gives_the_same(kind: str, name: str) -> None:
    model = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]()
    study, _ = feature_study(model, dictionaries(model, diagonal=True), pairs(VOCAB)[1:], batch_rows=50)
    assert isinstance(study.path, SuffixPath)
    fast = study.run(None, progress=False)
    plain = replace(study, path=PlainPath(study.lens)).run(None, progress=False)
    assert fast.nodes == plain.nodes
    assert abs(fast.denoised - plain.denoised).max() < EXACT
    assert abs(fast.noised - plain.noised).max() < EXACT


def narrowed(kind: str, name: str, model_type: torch.dtype) -> tuple[Any, list[Any]]:
    """A model in a narrower type, with dictionaries in float32."""
    model = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]().to(model_type)
    model.cfg.dtype = model_type
    saes = [sae.to(torch.float32) for sae in dictionaries(model, diagonal=True)]
    for sae in saes:
        sae.cfg.dtype = "float32"
    oracle._activations.cache_clear()
    return model, saes


def check_entries(model: Any, saes: list[Any], tolerance: float, entries: int) -> None:
    """Some entries against the oracle, within a share of the largest logit."""
    drawn = pairs(VOCAB)
    effects = fp.rank_features(model, saes, drawn, progress=False)
    at = {sae.cfg.metadata.hook_name: sae for sae in saes}
    with torch.no_grad():
        largest = max(float(model(torch.tensor([pair.clean])).abs().max()) for pair in drawn)
    for entry in random.Random(0).sample(range(len(effects.row)), entries):
        node, pair = effects.nodes[effects.row[entry]], drawn[int(effects.pair[entry])]
        expected = oracle_value(model, at[node.site], node, pair, "denoising")
        assert abs(effects.denoised[entry] - expected) < tolerance * largest, node


@pytest.mark.parametrize(("kind", "name"), [("bridge", "gpt2"), ("bridge", "gemma2"), ("hooked", "llama")])
def test_float32_is_as_exact_as_its_rounding(kind: str, name: str) -> None:
    model, saes = narrowed(kind, name, torch.float32)
    check_entries(model, saes, 2e-6, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["bridge", "hooked"])
def test_low_precision_models_with_dictionaries_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Deltas are made in the SAE's type and added in it; what is left is the rounding of the model's own type."""
    model, saes = narrowed(kind, "gpt2", dtype)
    check_entries(model, saes, 8 * torch.finfo(dtype).eps, 16)


def test_a_model_that_looks_both_ways_takes_the_plain_path() -> None:
    """Patches after the answer count, and positions before the first differing token differ."""
    model = hooked(act_fn="gelu", attention_dir="bidirectional")
    oracle._activations.cache_clear()
    site, drawn = "blocks.1.hook_resid_pre", pairs(VOCAB)[1:2]
    sae = next(sae for sae in dictionaries(model) if sae.cfg.metadata.hook_name == site)
    with pytest.warns(fp.SlowPathWarning, match="bidirectional attention"):
        effects = fp.rank_features(model, sae, drawn, positions="each", progress=False)
    assert {node.position for node in effects.nodes} == set(range(9))
    for entry, row in enumerate(effects.row):
        expected = oracle_value(model, sae, effects.nodes[row], drawn[0], "denoising")
        assert abs(effects.denoised[entry] - expected) < EXACT, effects.nodes[row]


def test_rotations_that_depend_on_the_length_take_the_plain_path() -> None:
    scaling = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [3.0, 5.0], "rope_theta": 10000.0,
               "original_max_position_embeddings": 7, "factor": 4.0}  # fmt: skip
    model = bridge(LlamaForCausalLM(LlamaConfig(**{**LLAMA, "rope_scaling": scaling})))
    drawn = pairs(VOCAB)
    sae = next(sae for sae in dictionaries(model) if sae.cfg.metadata.hook_name == "blocks.1.hook_resid_pre")
    with pytest.warns(fp.SlowPathWarning, match="depend on the length"):
        together = fp.rank_features(model, sae, drawn, progress=False)
    alone = fp.rank_features(model, sae, drawn[2:], progress=False)
    short = together.of_pairs([2])
    assert short.nodes == alone.nodes
    assert abs(short.denoised - alone.denoised).max() < 1e-5


@pytest.mark.parametrize("name", [*BRIDGES, "attention only", "no norms"])
def test_operations_of_the_plain_path(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch counts them in a forward pass, less attention's own products and the logits of all positions but one."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    model = (BRIDGES | HOOKED)[name]()
    cfg, run = model.cfg, SimpleNamespace(tokens=torch.arange(7))

    def unit(site: str) -> Any:
        return Block("", cast(Any, run), {site: cast(Any, None)}, torch.arange(3))

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(run.tokens[None])
    others = 2 * 6 * cfg.d_model * cfg.d_vocab_out + cfg.n_layers * 4 * 7 * 7 * cfg.n_heads * cfg.d_head
    whole = plain_flops(wrap(model), unit("blocks.0.hook_resid_pre"))
    assert whole == 3 * (counter.get_total_flops() - others)
    above = plain_flops(wrap(model), unit("blocks.1.hook_resid_pre"))
    share = 1 - 1 / cfg.n_layers
    head = 3 * 2 * cfg.d_model * cfg.d_vocab_out
    assert above - head == pytest.approx(share * (whole - head))


def test_attention_without_separate_weights_is_not_for_the_fast_path() -> None:
    model = HOOKED["gpt2"]()
    del model.blocks[1].attn._parameters["W_Q"]
    with pytest.raises(UnsupportedError, match="attention without separate weights .*W_Q"):
        wrap(model).stack(7, 7)


def test_the_self_check_sees_the_keys_and_values_of_the_base_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = suffix.attend

    def attend(layer: Any, q: Any, k: Any, v: Any, bases: Any = ()) -> torch.Tensor:
        return right(layer, q, k, v, [(size, base_k, 0 * base_v) for size, base_k, base_v in bases])

    monkeypatch.setattr(suffix, "attend", attend)
    model = BRIDGES["gpt2"]()
    with pytest.warns(fp.SlowPathWarning, match="the two differ by"):
        fp.rank_features(model, dictionaries(model)[0], pairs(VOCAB), progress=False)


@pytest.mark.usefixtures("wide")
@pytest.mark.filterwarnings("ignore::featpatch.SlowPathWarning")
@pytest.mark.parametrize("name", OTHERS)
def test_models_without_a_fast_path(name: str) -> None:
    """Experts, norms behind attention and MLP alone, and rotary embeddings without hook points."""
    model = OTHERS[name]()
    oracle._activations.cache_clear()
    check_entries(model, dictionaries(model, diagonal=True), 1e-12, 12)


def test_rotary_embeddings_without_hook_points_are_named() -> None:
    with pytest.raises(UnsupportedError, match="^rotary embeddings without hook points$"):
        wrap(OTHERS["gptj"]()).stack(3, 7)


@pytest.mark.usefixtures("wide")
def test_biases_of_gated_mlps() -> None:
    """They take the fast path: a warning would be an error."""
    oracle._activations.cache_clear()
    model = HOOKED["llama"]()
    for number, block in enumerate(model.blocks):
        block.mlp.b_in.data = torch.randn(block.mlp.b_in.shape, generator=torch.Generator().manual_seed(number)).to(
            block.mlp.b_in
        )
    check_entries(model, dictionaries(model), 1e-12, 12)


def folded(kind: str, name: str) -> Any:
    """With the weights of its norms folded into what reads them."""
    model = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]()
    if kind == "bridge":
        model.enable_compatibility_mode(disable_warnings=True, center_writing_weights=False)
    else:
        model.load_and_process_state_dict(model.state_dict(), center_writing_weights=False)
    return model


def reading(model: Any, name: str, **metadata: Any) -> str:
    """The hook that an SAE reads whose configuration says this."""
    sae = StandardSAE(StandardSAEConfig(WIDTH, 6, "float64", metadata=SAEMetadata(hook_name=name)))
    for key, value in metadata.items():
        setattr(sae.cfg.metadata, key, value)
    return dictionaries_of(wrap(model), sae)[0].reads


def values(model: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """By torch alone: activations by hook, what the MLP of block 1 reads, and the same in front of the norm's weight."""
    read: list[torch.Tensor] = []
    handle = model.blocks[1].mlp.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    cache = oracle.activations(model, torch.tensor([[1, 7, 5, 20, 3]]))
    handle.remove()
    stream = cache["blocks.1.hook_resid_mid"]
    if not (getattr(model.cfg, "uses_rms_norm", False) or str(model.cfg.normalization_type).startswith("RMS")):
        stream = stream - stream.mean(-1, keepdim=True)
    return cache, read[0], stream / stream.square().mean(-1, keepdim=True).sqrt()


HF_NORM = {"hf_hook_name": "model.layers.1.pre_feedforward_layernorm.output"}
RAW, FOLDED = ({"model_from_pretrained_kwargs": {"fold_ln": value}} for value in (False, True))


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize(("kind", "name"), [*(("bridge", n) for n in ("gpt2", "llama", "gemma2", "gemma3")),
                                            *(("hooked", n) for n in ("gpt2", "llama", "gemma2"))])  # fmt: skip
def test_a_hook_holds_what_the_dictionary_was_trained_on(kind: str, name: str) -> None:
    """Where that is nowhere, it is refused. In front of a norm's weight folding changes nothing, behind it does."""
    oracle._activations.cache_clear()
    normed, behind = "blocks.1.ln2.hook_normalized", "blocks.1.mlp.hook_in"
    raw = {"bridge": BRIDGES, "hooked": HOOKED}[kind][name]()
    cache, read, in_front = values(raw)
    close = {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(cache[reading(raw, normed, model_name="it")], in_front, **close)
    assert (read - in_front).abs().max() > 0.1, "so that the two can be told apart"
    if kind == "bridge":
        for said in ({"name": "blocks.1.hook_mlp_in", **HF_NORM}, {"name": behind, **RAW}, {"name": behind}):
            assert torch.equal(cache[reading(raw, **said)], read), said
        with pytest.raises(fp.FeatpatchError, match=f"'{normed}', .* does not say .*to '{behind}'"):
            reading(raw, normed)
    else:
        torch.testing.assert_close(cache[reading(raw, normed)], in_front, **close)
        with pytest.raises(fp.FeatpatchError, match="none that holds the norm's output with its weight"):
            reading(raw, "blocks.1.hook_mlp_in", **HF_NORM)
    with pytest.raises(
        fp.FeatpatchError, match="none that holds" if kind == "hooked" else r"processing=\['fold_ln'\], or set .*normalized"
    ):
        reading(raw, behind, **FOLDED)

    oracle._activations.cache_clear()
    model = folded(kind, name)
    cache, read, in_front = values(model)
    torch.testing.assert_close(cache[reading(model, normed)], in_front, **close)
    torch.testing.assert_close(cache[reading(model, behind, **FOLDED)], read, **close)
    torch.testing.assert_close(cache[reading(model, behind)], read, **close)
    for said in ({"name": "blocks.1.hook_mlp_in", **HF_NORM}, {"name": behind, **RAW}, {"name": behind, "model_name": "it"}):
        with pytest.raises(fp.FeatpatchError, match="trained with the weight|none that holds the norm's output"):
            reading(model, **said)


@pytest.mark.parametrize(
    ("path", "hook"),
    [
        ("model.layers.3.pre_feedforward_layernorm.output", "blocks.3.mlp.hook_in"),
        ("model.language_model.layers.12.post_feedforward_layernorm.output", "blocks.12.hook_mlp_out"),
        ("layers.0", "blocks.0.hook_resid_post"),
        ("model.layers.3.self_attn.o_proj.input", "blocks.3.attn.hook_z"),
        ("model.layers.3.post_attention_layernorm.output", None),
        ("model.embed_tokens.output", None),
        ("", None),
    ],
)
def test_modules_of_hugging_face(path: str, hook: str | None) -> None:
    assert sites.of_module(path) == hook


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "llama"])
def test_an_sae_of_the_embedding(name: str) -> None:
    """It is at the entry of the first block where nothing is added to the embedding."""
    model = BRIDGES[name]()
    oracle._activations.cache_clear()
    cache = oracle.activations(model, torch.tensor([[1, 7, 5, 20, 3]]))
    if name == "gpt2":
        assert not torch.equal(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])
        with pytest.raises(fp.FeatpatchError, match="'hook_embed', to which this model adds positions"):
            reading(model, "hook_embed")
    else:
        assert reading(model, "hook_embed") == "blocks.0.hook_resid_pre"
        assert torch.equal(cache["hook_embed"], cache["blocks.0.hook_resid_pre"])


@pytest.mark.filterwarnings("ignore::featpatch.SlowPathWarning")
def test_quantised_weights_are_run_and_not_read() -> None:
    """Everything that a forward pass is enough for is right; what needs the weights says so."""
    model, drawn = quantised(LlamaForCausalLM(LlamaConfig(**LLAMA))), pairs(VOCAB)
    oracle._activations.cache_clear()
    sae = next(sae for sae in dictionaries(model) if sae.cfg.metadata.hook_name == "blocks.1.hook_resid_pre")
    check_entries(model, [sae], 1e-5, 20)
    assert fp.check(model, sae, drawn).weights == "unprocessed"
    with pytest.raises(fp.FeatpatchError, match="MLP of layer 1 has quantised weights, which can be run but not read"):
        fp.dictionaries.neurons(model, 1)
    effects = fp.rank_features(model, sae, drawn, progress=False)
    components = fp.rank_components(model, drawn, sites=["resid_pre", "attn_out", "z", "mlp_out"], progress=False)
    writers = fp.compare(effects, components, model=model, saes=sae, pairs=drawn).writers
    assert set(writers["kind"]) == {"activation"}, "heads can't be told apart without W_O"
    with pytest.raises(fp.FeatpatchError, match=r"weights that are not quantised \(these are: bitsandbytes\)"):
        fp.find_circuit(model, drawn, over="edges", progress=False)
