"""The operator by hand."""

import oracle
import pytest
import torch
from small import Small, small_bridge

import featpatch as fp
from featpatch.model.transformer_lens import wrap
from featpatch.sae.dictionary import dictionaries

SITE = "blocks.1.hook_resid_pre"


def test_what_is_not_the_stream_itself_is_not_set(bridge: Small) -> None:
    site = "blocks.1.hook_resid_mid"
    patch = fp.Patch((fp.Node(site, "error"),))
    with pytest.raises(fp.FeatpatchError, match="is a copy of the residual stream"):
        fp.do(bridge.model, patch, source=bridge.clean, saes=bridge.at(site), how="set").__enter__()


def test_two_dictionaries_on_one_hook_are_told_apart_by_name(bridge: Small) -> None:
    site = "blocks.2.hook_resid_pre"
    one, other = bridge.at(site), bridge.at("blocks.1.hook_resid_pre")
    saes = [one, type(one)(one.cfg)]
    saes[1].load_state_dict({name: tensor.flip(0) for name, tensor in one.state_dict().items()})
    pairs = fp.Pairs.from_tokens(bridge.clean, bridge.corrupted, bridge.correct, bridge.wrong)
    together = fp.rank_features(bridge.model, [*saes, other], pairs)
    assert {node.sae for node in together.where(site=site, kind="feature").nodes} == {site, f"{site}#2"}
    for k, name in enumerate((site, f"{site}#2")):
        alone = fp.rank_features(bridge.model, saes[k], pairs).where(kind="feature")
        part = together.where(sae=name, kind="feature")
        assert [node.index for node in alone.nodes] == [node.index for node in part.nodes]
        assert abs(alone.pooled("recovery") - part.pooled("recovery")).max() < 1e-10
    node = fp.Node(site, "feature", 1)
    ambiguous = fp.do(bridge.model, fp.Patch((node,)), source=bridge.clean, base=bridge.corrupted, saes=saes)
    with pytest.raises(fp.FeatpatchError, match="belongs to 2 of the SAEs"), ambiguous:
        pass


@pytest.mark.parametrize("use_past_kv_cache", [True, False])
def test_generation_runs_patched(bridge: Small, use_past_kv_cache: bool) -> None:
    """Greedy continuation of the patched corrupted prompt, against full hooked passes without a cache."""
    corrupted = bridge.corrupted[1:2]
    clean = corrupted.flip(1)
    whole = fp.Patch((fp.Node(SITE, "activation"),))
    values = oracle.activations(bridge.model, clean)[SITE]

    def replace(activation: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.cat([values, activation[:, 7:]], 1)

    tokens = corrupted
    for _ in range(4):
        logits = bridge.model.run_with_hooks(tokens, fwd_hooks=[(SITE, replace)])
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    with fp.do(bridge.model, whole, source=clean, base=corrupted) as firing:
        continued = bridge.model.generate(
            corrupted, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False, use_past_kv_cache=use_past_kv_cache
        )
    assert continued.tolist() == tokens.tolist()
    assert firing.count == (1 if use_past_kv_cache else 4)
    assert (
        continued.tolist()
        != bridge.model.generate(corrupted, max_new_tokens=4, do_sample=False, stop_at_eos=False, verbose=False).tolist()
    )


def test_a_batch_is_patched_row_by_row(bridge: Small) -> None:
    nodes = fp.Patch((fp.Node(SITE, "activation", None, 3),))
    with torch.no_grad(), fp.do(bridge.model, nodes, source=bridge.clean, base=bridge.corrupted):
        together = bridge.model(bridge.corrupted)
    for slot in range(3):
        part = slice(slot, slot + 1)
        alone = oracle.patched_activation_logits(bridge.model, SITE, bridge.corrupted[part], bridge.clean[part], [3])
        torch.testing.assert_close(together[part], alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["z", "q", "k", "v", "neurons"])
def test_heads_and_neurons_are_those_of_the_table(small: Small, name: str) -> None:
    pairs = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    effects = fp.rank_components(small.model, pairs[:1], sites=name, layers=[1], positions=[5], progress=False)
    for entry in range(0, len(effects.row), 3):
        patch = fp.Patch((effects.nodes[effects.row[entry]],))
        with torch.no_grad():
            with fp.do(small.model, patch, source=small.clean[:1], base=small.corrupted[:1]):
                added = small.model(small.corrupted[:1])
            with fp.do(small.model, patch, source=small.clean[:1], how="set"):
                as_set = small.model(small.corrupted[:1])
        for logits in (added, as_set):
            found = oracle.logit_diff(logits, int(small.correct[0]), int(small.wrong[0]))
            assert found == pytest.approx(effects.denoised[entry], abs=1e-9), patch


def test_a_transcoder_is_set_in_longer_prompts(small: Small) -> None:
    """Where the source ends nothing is set, and what comes before does not see what follows."""
    longer = torch.cat([small.corrupted[:1], small.clean[:1, :3]], dim=1)
    nodes = tuple(fp.Node("blocks.1.hook_mlp_out", "feature", index) for index in range(8))
    with torch.no_grad(), fp.do(small.model, fp.Patch(nodes), source=small.clean[:1], saes=small.saes[8], how="set"):
        found, expected = small.model(longer), small.model(small.corrupted[:1])
    torch.testing.assert_close(found[:, :7], expected, rtol=0, atol=1e-10)


Z = "blocks.1.attn.hook_z"


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([fp.Node(Z, "head", 4)], "head 4 of 'blocks.1.attn.hook_z' is out of range: expected 0 to 3"),
        ([fp.Node("blocks.1.mlp.hook_post", "neuron", 32)], "neuron 32 of .* is out of range: expected 0 to 31"),
        ([fp.Node(SITE, "head", 0)], "the activation there has no heads"),
        ([fp.Node("blocks.1.attn.hook_pattern", "head", 0)], "the first dimension of the activation there is not the position"),
        ([fp.Node("blocks.1.attn.hook_pattern", "activation", None, 2)], "rank_components"),
        ([fp.Node(Z, "set", 0)], "does not say which values to patch"),
        ([fp.Node(Z, "head", 0), fp.Node(Z, "activation")], "overlaps other nodes"),
        ([fp.Node(Z, "activation"), fp.Node(Z, "head", 0)], "overlaps other nodes"),
        ([fp.Node(Z, "head", 0), fp.Node(Z, "feature", 0)], "overlaps other nodes"),
        ([fp.Node(Z, "error"), fp.Node(Z, "head", 0)], "overlaps other nodes"),
    ],
)
def test_components_that_can_not_be_swapped(bridge: Small, nodes: list[fp.Node], message: str) -> None:
    options = {"source": bridge.clean, "base": bridge.corrupted, "saes": bridge.at(Z)}
    with pytest.raises(fp.FeatpatchError, match=message):
        fp.do(bridge.model, fp.Patch(tuple(nodes)), **options).__enter__()


def test_two_heads_are_swapped_together(small: Small) -> None:
    heads = fp.Patch(tuple(fp.Node(Z, "head", head) for head in range(4)))
    runs = {"source": small.clean[:1], "base": small.corrupted[:1]}
    with torch.no_grad():
        with fp.do(small.model, heads, **runs):
            apart = small.model(small.corrupted[:1])
        with fp.do(small.model, fp.Patch((fp.Node(Z, "activation"),)), **runs):
            whole = small.model(small.corrupted[:1])
    torch.testing.assert_close(apart, whole, rtol=0, atol=1e-10)


def test_the_sum_is_computed_in_the_wider_dtype() -> None:
    """A float32 SAE on a bfloat16 model: the change is not rounded before it is added, as in a sweep."""
    small = small_bridge()
    model, sae = torch.nn.Module.to(small.model, torch.bfloat16), small.at(SITE).to(torch.float32)
    with torch.no_grad():
        base, source = (model.run_with_cache(tokens)[1][SITE] for tokens in (small.corrupted, small.clean))
    (dictionary,) = dictionaries(wrap(model), sae)
    change = dictionary.change(dictionary.split({SITE: base}), dictionary.split({SITE: source}), features=True)
    assert change.dtype == torch.float32
    expected = (base.float() + change).bfloat16()
    assert not torch.equal(expected, base + change.bfloat16())
    with (
        torch.no_grad(),
        fp.do(model, fp.Patch((fp.Node(SITE, "all_features"),)), source=small.clean, base=small.corrupted, saes=sae),
    ):
        _, cache = model.run_with_cache(small.corrupted)
    assert torch.equal(cache[SITE], expected)
