"""Components against TransformerLens' own patching functions, and neurons against hooks."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES, HOOKED
from small import Small
from test_kinds import slow
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge

import featpatch as fp
from featpatch import sites
from featpatch.nodes import DIRECTIONS
from featpatch.patching.components import component_study

CLEAN = torch.tensor([[11, 12, 13, 14, 15, 16, 17], [21, 22, 23, 24, 25, 26, 27]])
CORRUPTED = torch.tensor([[11, 12, 18, 14, 15, 16, 17], [21, 22, 29, 24, 25, 28, 27]])
CORRECT, WRONG = torch.tensor([13, 5]), torch.tensor([4, 16])
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    **{f"bridge {name}": BRIDGES[name] for name in ("gpt2", "neox", "llama", "gemma2", "qwen3")},
    **{f"hooked {name}": HOOKED[name] for name in ("gpt2", "neox", "llama", "gemma2", "attention only", "no norms")},
}


def whole(name: str) -> tuple[str, Any, str]:
    """A component that is a whole activation, by the last part of its hook's name."""
    patch = partial(
        patching.generic_activation_patch,
        patch_setter=patching.layer_pos_patch_setter,
        activation_name=name,
        index_axis_names=("layer", "pos"),
    )
    component = next(key for key, hook in sites.WHOLE.items() if hook.endswith(f"hook_{name}"))
    return component, patch, "layer pos"


FUNCTIONS: dict[str, tuple[str, Any, str]] = {
    "resid_pre": ("resid_pre", patching.get_act_patch_resid_pre, "layer pos"),
    "resid_mid": ("resid_mid", patching.get_act_patch_resid_mid, "layer pos"),
    "attn_out": ("attn_out", patching.get_act_patch_attn_out, "layer pos"),
    "mlp_out": ("mlp_out", patching.get_act_patch_mlp_out, "layer pos"),
    "resid_post": whole("resid_post"),
    "head_out_by_pos": ("z", patching.get_act_patch_attn_head_out_by_pos, "layer pos head"),
    "head_q_by_pos": ("q", patching.get_act_patch_attn_head_q_by_pos, "layer pos head"),
    "head_k_by_pos": ("k", patching.get_act_patch_attn_head_k_by_pos, "layer pos head"),
    "head_v_by_pos": ("v", patching.get_act_patch_attn_head_v_by_pos, "layer pos head"),
    "head_pattern_by_pos": ("pattern", patching.get_act_patch_attn_head_pattern_by_pos, "layer head pos"),
    "head_pattern_dest_src_pos": (
        "pattern_entry", patching.get_act_patch_attn_head_pattern_dest_src_pos, "layer head pos source"),
    "head_out_all_pos": ("z", patching.get_act_patch_attn_head_out_all_pos, "layer head"),
    "head_q_all_pos": ("q", patching.get_act_patch_attn_head_q_all_pos, "layer head"),
    "head_k_all_pos": ("k", patching.get_act_patch_attn_head_k_all_pos, "layer head"),
    "head_v_all_pos": ("v", patching.get_act_patch_attn_head_v_all_pos, "layer head"),
    "head_pattern_all_pos": ("pattern", patching.get_act_patch_attn_head_pattern_all_pos, "layer head"),
}  # fmt: skip


def pairs_of(clean: torch.Tensor, corrupted: torch.Tensor) -> fp.Pairs:
    return fp.Pairs.from_tokens(clean, corrupted, CORRECT[: len(clean)], WRONG[: len(clean)])


def ranked(model: Any, name: str, positions: Any, **options: Any) -> fp.Effects:
    return fp.rank_components(model, pairs_of(CLEAN, CORRUPTED), sites=name, positions=positions, progress=False, **options)


def by_transformer_lens(model: Any, function: Any, slot: int, direction: str) -> torch.Tensor:
    runs = [CORRUPTED[[slot]], CLEAN[[slot]]]
    base, source = runs if direction == "denoising" else runs[::-1]
    with torch.no_grad():
        _, cache = model.run_with_cache(source)
        return function(model, base, cache, lambda logits: logits[0, -1, CORRECT[slot]] - logits[0, -1, WRONG[slot]])


def same_as(effects: fp.Effects, expected: torch.Tensor, axes: list[str], slot: int, direction: str) -> int:
    """Every entry is the one of TransformerLens; what has no entry is the base run there. The number of entries."""
    entries = np.flatnonzero(effects.pair == slot)
    values = effects.denoised if direction == "denoising" else effects.noised
    base = effects.corrupted[slot] if direction == "denoising" else effects.clean[slot]
    left = torch.ones_like(expected, dtype=torch.bool)
    for entry in entries:
        node = effects.nodes[effects.row[entry]]
        position, _, source = str(node.position).partition(" <- ")
        at = {"layer": int(node.site.split(".")[1]), "head": node.index, "pos": position, "source": source}
        index = tuple(int(at[axis]) for axis in axes)
        assert values[entry] == pytest.approx(float(expected[index]), rel=1e-6, abs=1e-6), (node, direction)
        left[index] = False
    assert torch.allclose(expected[left], torch.tensor(base, dtype=expected.dtype), atol=1e-6)
    return len(entries)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_function_of_transformer_lens(name: str, function: str) -> None:
    model = ARCHITECTURES[name]()
    component, theirs, axes = FUNCTIONS[function]
    if (component.startswith("mlp") and "attention only" in name) or (component == "resid_mid" and (
        "neox" in name or "attention only" in name or isinstance(model, TransformerBridge))):  # fmt: skip
        pytest.skip("it has none, or TransformerLens patches the input of the MLP's norm there")
    if component == "pattern_entry" and name not in ("bridge gpt2", "hooked gpt2", "bridge llama"):
        pytest.skip("slow for TransformerLens, and the same code")
    with slow(sites.component(0, component)):
        effects = ranked(model, component, "all" if "pos" not in axes else "each")
    for slot, direction in ((0, "denoising"), (1, "noising"))[: 2 if "gpt2" in name else 1]:
        expected = by_transformer_lens(model, theirs, slot, direction)
        assert same_as(effects, expected, axes.split(), slot, direction) > 0


@pytest.mark.extended
def test_every(small: Small) -> None:
    """The functions that stack several."""
    pairs = pairs_of(CLEAN, CORRUPTED)
    for theirs, names, positions, axes in (
        (patching.get_act_patch_attn_head_all_pos_every, ["z", "q", "k", "v", "pattern"], "all", ["layer", "head"]),
        (patching.get_act_patch_attn_head_by_pos_every, ["z", "q", "k", "v", "pattern"], "each", ["layer", "pos", "head"]),
        (patching.get_act_patch_block_every, ["resid_pre", "attn_out", "mlp_out"], "each", ["layer", "pos"]),
    ):  # fmt: skip
        effects = fp.rank_components(small.model, pairs, sites=names, positions=positions, progress=False)
        expected = by_transformer_lens(small.model, theirs, 0, "denoising")
        hooks = ["attn.hook_" + name if len(names) == 5 else "hook_" + name for name in names]
        for site, of_site in zip(hooks, expected, strict=True):
            rows = [row for row, node in enumerate(effects.nodes) if node.site.endswith(site)]
            order = [axes.index(axis) for axis in axes]
            assert same_as(effects.take(rows), of_site.permute(order), axes, 0, "denoising") > 0


def test_counts_are_what_is_made(small: Small) -> None:
    """The progress bar's total."""
    names = ["resid_pre", "z", "q", "k", "pattern", "pattern_entry", "neurons"]
    study = component_study(small.model, pairs_of(CLEAN, CORRUPTED), names, None, positions=[2, 6])
    runs = study.runner.run((0, 1))
    for part in study.parts:
        counts = [Counter(node for block in of_pair for node in block.nodes) for of_pair in part.blocks(runs)]
        assert [part.count(run) for run in runs] == [*map(len, counts)]
        assert all({*of_pair.values()} == {len(DIRECTIONS)} for of_pair in counts)


@pytest.mark.parametrize("name", ["k", pytest.param("pattern_entry", marks=pytest.mark.extended), "z"])
def test_portions_make_no_difference(small: Small, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ranked(small.model, name, "each")
    monkeypatch.setattr("featpatch.patching.components.ROWS", 20)
    parts = ranked(small.model, name, "each")
    assert parts.nodes == whole.nodes
    np.testing.assert_allclose(parts.denoised, whole.denoised, rtol=0, atol=1e-10)


def test_result_is_z(small: Small) -> None:
    z, result = (ranked(small.model, name, "each") for name in ("z", "result"))
    assert [node.site.replace("hook_result", "hook_z") for node in result.nodes] == [node.site for node in z.nodes]
    np.testing.assert_array_equal(z.denoised, result.denoised)


@pytest.mark.both
def test_neurons_against_hooks(small: Small) -> None:
    effects = ranked(small.model, "neurons", [2, 6], layers=[1])
    site = "blocks.1.mlp.hook_post"
    assert {node.kind for node in effects.nodes} == {"neuron"}
    for entry in range(0, len(effects.row), 7):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        for base, source, values in (
            (CORRUPTED[[slot]], CLEAN[[slot]], effects.denoised),
            (CLEAN[[slot]], CORRUPTED[[slot]], effects.noised),
        ):
            old = oracle.activations(small.model, base)[site]
            new = old.clone()
            new[0, node.position, node.index] = oracle.activations(small.model, source)[site][0, node.position, node.index]
            with torch.no_grad():
                logits = small.model.run_with_hooks(base, fwd_hooks=[(site, lambda x, hook, new=new: new)])
            expected = oracle.logit_diff(logits, int(CORRECT[slot]), int(WRONG[slot]))
            assert values[entry] == pytest.approx(expected, abs=1e-9), node


def test_neurons_behind_a_norm_go_through_the_model() -> None:
    """Gemma-2 norms what the MLP adds, so that W_out is not all that a neuron acts through."""
    model = BRIDGES["gemma2"]()
    with pytest.warns(fp.SlowPathWarning, match="inside a layer"):
        effects = ranked(model, "neurons", [6], layers=[1], directions=["denoising"])
    node, slot = effects.nodes[effects.row[0]], int(effects.pair[0])
    site = "blocks.1.mlp.hook_post"
    new = oracle.activations(model, CORRUPTED[[slot]])[site].clone()
    new[0, 6, node.index] = oracle.activations(model, CLEAN[[slot]])[site][0, 6, node.index]
    with torch.no_grad():
        logits = model.run_with_hooks(CORRUPTED[[slot]], fwd_hooks=[(site, lambda x, hook: new)])
    assert effects.denoised[0] == pytest.approx(oracle.logit_diff(logits, int(CORRECT[slot]), int(WRONG[slot])), abs=1e-6)


def test_one_table_with_features(small: Small) -> None:
    """The whole site is the same row in both, and columns are the same."""
    features = fp.rank_features(
        small.model, small.at("blocks.1.hook_resid_pre"), pairs_of(CLEAN, CORRUPTED), positions=[2, 6], progress=False
    )
    components = ranked(small.model, ["resid_pre", "z"], [2, 6])
    whole = components.where(site="blocks.1.hook_resid_pre", position=6)
    same = features.where(kind="activation", position=6)
    assert whole.nodes == same.nodes
    np.testing.assert_allclose(whole.per_pair("recovery"), same.per_pair("recovery"), atol=1e-12)
    assert list(components.to_pandas().columns) == list(features.to_pandas().columns)
    assert len(components.top(5)) == 5
    assert {node.kind for node in components.top(5).nodes} == {"head"}
    assert {node.kind for node in ranked(small.model, "resid_pre", [2]).top(1).nodes} == {"activation"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sites": "hook_x"}, r"sites=\['hook_x'\]: expected some of resid_pre"),
        ({"sites": []}, "sites=.*expected some of"),
        ({"sites": ["q", "q"]}, "each once"),
        ({"layers": [3]}, r"layers=\[3\]: expected some of 0 to 2"),
        ({"layers": []}, r"layers=\[\]"),
        ({"sites": "pattern_entry"}, "expected positions='each' or a list"),
        ({"sites": "pattern_entry", "positions": ["all", 2]}, "positions='all' with sites"),
        ({"positions": ["S2"]}, "a pair has no label 'S2'"),
    ],
)
def test_errors(small: Small, options: dict[str, Any], message: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.rank_components(small.model, pairs_of(CLEAN, CORRUPTED), progress=False, **options)


def test_a_model_without_mlp() -> None:
    with pytest.raises(fp.FeatpatchError, match=".blocks.0.hook_mlp_out. exists but was not reached"):
        ranked(HOOKED["attention only"](), "mlp_out", "all")


def test_a_journal_goes_on(small: Small, tmp_path: Any) -> None:
    journal = tmp_path / "journal"
    first = ranked(small.model, ["k", "mlp_out"], "each", journal=journal)
    written = journal.read_bytes()
    again = ranked(small.model, ["k", "mlp_out"], "each", journal=journal)
    assert journal.read_bytes() == written
    np.testing.assert_array_equal(first.denoised, again.denoised)
    with pytest.raises(fp.FeatpatchError, match="belongs to another sweep: components"):
        ranked(small.model, ["v", "mlp_out"], "each", journal=journal)


@pytest.mark.parametrize(
    "site", ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre", "blocks.1.attn.hook_k", "blocks.2.hook_resid_post"]
)
@pytest.mark.parametrize("name", ["resid_pre", "resid_post", "k", "z"])
def test_hooks_of_the_user_take_part_once(small: Small, site: str, name: str) -> None:
    """Through the model's own pass, resumed before the user's hooks."""

    def bend(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return 1.1 * activation + 0.3

    point = small.model.hook_dict[site]
    point.add_hook(bend)
    try:
        with pytest.warns(fp.SlowPathWarning, match="hooks attached by you"):
            effects = ranked(small.model, name, [2, 6], layers=[1])
    finally:
        small.model.reset_hooks()
    read: dict[str, torch.Tensor] = {}
    for slot in range(2):
        answers = int(CORRECT[slot]), int(WRONG[slot])
        for base, source, values, unpatched in (
            (CORRUPTED[[slot]], CLEAN[[slot]], effects.denoised, effects.corrupted),
            (CLEAN[[slot]], CORRUPTED[[slot]], effects.noised, effects.clean),
        ):
            with torch.no_grad():
                plain = small.model.run_with_hooks(base, fwd_hooks=[(site, bend)])
            assert unpatched[slot] == pytest.approx(oracle.logit_diff(plain, *answers), abs=1e-9)
            for entry in np.flatnonzero(effects.pair == slot)[::2]:
                node = effects.nodes[effects.row[entry]]
                with torch.no_grad():
                    keep = (node.site, lambda x, hook: read.update(source=x.clone()))
                    small.model.run_with_hooks(source, fwd_hooks=[(site, bend), keep])

                def put(x: torch.Tensor, hook: Any, node: fp.Node = node) -> torch.Tensor:
                    new = x.clone()
                    where = (0, node.position) if node.index is None else (0, node.position, node.index)
                    new[where] = read["source"][where]
                    return new

                with torch.no_grad():
                    logits = small.model.run_with_hooks(base, fwd_hooks=[(site, bend), (node.site, put)])
                assert values[entry] == pytest.approx(oracle.logit_diff(logits, *answers), abs=1e-9), node
