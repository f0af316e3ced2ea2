"""Backward passes under other rules against a forward pass written out with constants, in float64."""

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from architectures import BRIDGES, HOOKED, OTHERS, VOCAB, bridge
from backward_oracle import Written, gradients
from small import Small, standard
from transformers import OPTConfig, OPTForCausalLM

import featpatch as fp
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.metrics import Measures
from featpatch.model.backward import FROZEN, RULES, Rules, modified
from featpatch.model.gradients import Differentiated
from featpatch.model.gradients import gradients as backpropagated
from featpatch.model.layer import close, hidden
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap

EXACT, ROTARY = 1e-10, 1e-7
"""Hugging Face computes rotary embeddings in float32."""
LAST = "blocks.2.hook_resid_post"

TOKENS = torch.randint(1, VOCAB, (3, 6), generator=torch.Generator().manual_seed(2))

MODELS: dict[str, tuple[Any, dict[str, Any]]] = {
    "hooked gpt2": (HOOKED["gpt2"], {}),
    "hooked neox": (HOOKED["neox"], {"rotary": 2, "parallel": True}),
    "hooked llama": (HOOKED["llama"], {"rotary": 4}),
    "hooked gemma2": (HOOKED["gemma2"], {"rotary": 4, "softcap": 2.0, "final_cap": 3.0, "windows": (99, 3, 99)}),
    "bridge gpt2": (BRIDGES["gpt2"], {}),
    "bridge llama": (BRIDGES["llama"], {"rotary": 4}),
    "bridge qwen3": (BRIDGES["qwen3"], {"rotary": 4}),
    "bridge gemma2": (
        BRIDGES["gemma2"],
        {"rotary": 4, "divisor": 7**0.5, "softcap": 2.0, "final_cap": 3.0, "windows": (3, 99, 3)},
    ),
}
STOPPED: dict[Rules, tuple[str, ...]] = {
    Rules(): (),
    FROZEN: ("norms", "patterns"),
    RULES["relp"]: ("norms", "patterns", "activations", "products"),
    RULES["relp_qk"]: ("norms", "activations", "products"),
    RULES["gim"]: ("norms", "softened", "products", "factors"),
}


@cache
def model(name: str) -> Any:
    return MODELS[name][0]()


def measure(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, 3] - logits[:, 4]


def taken(lens: Lens, hooks: list[str]) -> Differentiated:
    last = f"blocks.{lens.n_layers - 1}.hook_resid_post"
    return backpropagated(lens, TOKENS, hooks, torch.full((3,), 5), measure, reads=[last])


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_a_forward_pass_with_constants(name: str) -> None:
    """At every hook point alone and at all of them together; values are the same to the last bit."""
    lens, tolerance = wrap(model(name)), ROTARY if name.startswith("bridge") and "rotary" in MODELS[name][1] else EXACT
    entering = lens.read(TOKENS, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    for rules, stopped in STOPPED.items():
        values, expected = gradients(Written(model(name), **MODELS[name][1], stopped=stopped), entering, 3, 4)
        hooks = [hook for hook in expected if hook in lens.hook_points]
        plain = taken(lens, hooks)
        with modified(lens, rules):
            found = [taken(lens, hooks), *(taken(lens, [hook]) for hook in hooks if hook.startswith("blocks.1"))]
        assert len(hooks) >= 27
        assert torch.equal(found[0].activations[LAST], plain.activations[LAST])
        torch.testing.assert_close(values, plain.values, rtol=0, atol=tolerance)
        for of_some in found:
            for hook, gradient in of_some.gradients.items():
                difference = (gradient - expected[hook].reshape(gradient.shape)).abs().max()
                assert difference <= tolerance * expected[hook].abs().max(), (rules, hook)
    assert not any(point.fwd_hooks for point in lens.hook_points.values())


def test_frozen_gradients_are_slopes_of_the_model_with_fixed_patterns_and_scales() -> None:
    """Finite differences of plain runs in which hooks hold every pattern and every scale of a norm at its value."""
    name = "hooked gemma2"
    lens, whole = wrap(model(name)), model(name)
    _, cache = whole.run_with_cache(TOKENS)
    fixed = [(hook, lambda x, hook: cache[hook.name]) for hook in cache if hook.endswith(("hook_scale", "hook_pattern"))]
    with modified(lens, FROZEN):
        gradient = taken(lens, ["blocks.1.hook_resid_pre"]).gradients["blocks.1.hook_resid_pre"]
    along = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def value(step: float) -> torch.Tensor:
        move = [("blocks.1.hook_resid_pre", lambda x, hook: x + step * along)]
        return measure(whole.run_with_hooks(TOKENS, fwd_hooks=[*fixed, *move])[:, -1])

    with torch.no_grad():
        slope = (value(1e-4) - value(-1e-4)) / 2e-4
    torch.testing.assert_close((gradient * along).sum((1, 2)), slope, rtol=1e-6, atol=1e-8)


def test_hook_points_inside_a_norm_follow_the_rules() -> None:
    """Behind the scale the gradient is that of the normed value, in front of it that of the residual stream's branch."""
    lens, whole = wrap(model("bridge gpt2")), model("bridge gpt2")
    with modified(lens, FROZEN):
        found = taken(lens, ["blocks.2.ln2.hook_in", "blocks.2.mlp.hook_in", "blocks.2.hook_attn_out"]).gradients
        after = taken(lens, ["blocks.2.hook_mlp_out"]).gradients["blocks.2.hook_mlp_out"]
    x = lens.read(TOKENS, ["blocks.2.ln2.hook_in"])["blocks.2.ln2.hook_in"]
    pulled = found["blocks.2.mlp.hook_in"] * whole.blocks[2].ln2.weight / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt()
    expected = pulled - pulled.mean(-1, keepdim=True)
    torch.testing.assert_close(found["blocks.2.ln2.hook_in"], expected, rtol=0, atol=EXACT)
    torch.testing.assert_close(found["blocks.2.hook_attn_out"], expected + after, rtol=0, atol=EXACT)


def test_rules_act_in_their_own_thread_and_end_with_an_exception() -> None:
    lens, hooks = wrap(model("hooked llama")), ["blocks.1.hook_resid_pre"]
    plain = taken(lens, hooks).gradients[hooks[0]]
    with ThreadPoolExecutor(1) as pool, suppress(ZeroDivisionError), modified(lens, RULES["gim"]):
        assert torch.equal(pool.submit(taken, lens, hooks).result().gradients[hooks[0]], plain)
        changed = taken(lens, hooks).gradients[hooks[0]]
        assert (changed - plain).abs().max() > 1e-3
        assert torch.equal(lens.read(TOKENS, hooks)[hooks[0]], model("hooked llama").run_with_cache(TOKENS)[1][hooks[0]])
        raise ZeroDivisionError
    assert torch.equal(taken(lens, hooks).gradients[hooks[0]], plain)
    assert not any(module._forward_hooks for module in lens.model.modules())


@pytest.mark.parametrize("activation", [torch.relu, torch.nn.functional.gelu, torch.nn.functional.silu])
def test_an_activation_function_at_zero_has_the_factor_just_above(activation: Any) -> None:
    """The constant act(z) / z is 0 / 0 where z is 0."""
    z = torch.tensor([0.0, -1.0, 1e-30, 2.0], dtype=torch.float64, requires_grad=True)
    hidden(activation, z, scaled=True).sum().backward()
    with torch.no_grad():
        at = z.clamp(min=1e-30).where(z >= 0, z)
        torch.testing.assert_close(z.grad, activation(at) / at, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_activations_are_close_relative_to_the_largest(scale: float) -> None:
    """Within the square root of float32's precision, or of a lower one."""
    x = scale * torch.tensor([1.0, 0.0, -0.5], dtype=torch.float64)
    for dtype, within, beyond in ((torch.float64, 3e-4, 4e-4), (torch.bfloat16, 0.08, 0.1)):
        step = torch.tensor([0.0, scale, 0.0], dtype=torch.float64)
        assert close(x + within * step, x.to(dtype))
        assert not close(x + beyond * step, x.to(dtype))


def test_an_edit_made_later_is_seen_by_the_rules() -> None:
    """A change in front of the activation function is part of the constant act(z) / z."""
    lens = wrap(model("hooked gpt2"))
    hook, post = "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post"
    with modified(lens, RULES["relp"]), lens.edit(hook, lambda z: z + 1):
        found = taken(lens, [hook, post])
    z = lens.read(TOKENS, [hook])[hook] + 1
    ratio = torch.nn.functional.gelu(z, approximate="tanh") / z
    torch.testing.assert_close(found.gradients[hook], found.gradients[post] * ratio, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["bridge gemma2", "hooked gemma2"])
def test_the_order_of_edits_and_rules_does_not_matter(name: str) -> None:
    """Values that are set before or after the rules begin stop the gradient of what they replace."""
    lens = wrap(model(name))
    hooks = ["blocks.1.hook_attn_out", "blocks.1.mlp.hook_post", "blocks.1.attn.hook_pattern"]
    put = {hook: 0.5 * value for hook, value in lens.read(TOKENS, hooks).items()}
    for rules in RULES.values():
        with lens.put(put), modified(lens, rules):
            one = taken(lens, ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"]).gradients
        with modified(lens, rules), lens.put(put):
            other = taken(lens, ["blocks.1.hook_resid_pre", "blocks.0.hook_mlp_out"]).gradients
        for hook, gradient in one.items():
            torch.testing.assert_close(gradient, other[hook], rtol=0, atol=EXACT)
    with modified(lens, FROZEN), lens.put(put):
        found = taken(lens, ["blocks.1.hook_resid_pre", "blocks.2.hook_resid_pre"]).gradients
    assert torch.equal(found["blocks.1.hook_resid_pre"], found["blocks.2.hook_resid_pre"])


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss"])
def test_other_forms_of_layers_are_refused(name: str) -> None:
    lens = wrap(OTHERS[name]())
    for rules in [*RULES.values(), *([Rules(patterns="softened")] if name == "gpt-oss" else [])]:
        with pytest.raises(fp.FeatpatchError, match="expected norms, attention patterns and MLPs"), modified(lens, rules):
            taken(lens, ["blocks.1.hook_resid_pre"])
    assert not any(point.fwd_hooks for point in lens.hook_points.values())


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


def other(tokens: torch.Tensor) -> torch.Tensor:
    """The same prompts with another third token."""
    found = tokens.clone()
    found[:, 2] = 1 + found[:, 2] % (VOCAB - 1)
    return found


PAIRS = fp.Pairs.from_tokens(TOKENS, other(TOKENS), torch.full((3,), 3), torch.full((3,), 4))


@pytest.mark.parametrize("method", RULES)
def test_estimates_are_changes_times_gradients(method: str) -> None:
    """Of features, the error and neurons, against the written-out forward pass of each run."""
    whole, site, neurons = model("hooked llama"), "blocks.1.hook_resid_pre", "blocks.1.mlp.hook_post"
    sae = standard(site, 3)
    table = fp.rank_features(whole, sae, PAIRS, method=method, progress=False)
    units = fp.rank_components(whole, PAIRS, sites="neurons", layers=[1], positions=[4], method=method, progress=False)
    assert (table.value, table.metadata["method"]) == ("estimate", method)
    assert table.metadata["completeness_residual"] < EXACT
    activations = {run: whole.run_with_cache(tokens)[1] for run, tokens in (("clean", TOKENS), ("corrupted", other(TOKENS)))}
    for base, source, found in (("corrupted", "clean", "recovery"), ("clean", "corrupted", "degradation")):
        entering = activations[base]["blocks.0.hook_resid_pre"]
        _, g = gradients(Written(whole, rotary=4, stopped=STOPPED[RULES[method]]), entering, 3, 4)
        runs = [activations[run] for run in (base, source)]
        x, y = (run[site] for run in runs)
        change = ((sae.encode(y) - sae.encode(x)) * (g[site] @ sae.W_dec.T)).detach()
        error = ((y - sae(y) - x + sae(x)) * g[site]).sum((1, 2)).detach()
        of_units = ((runs[1][neurons] - runs[0][neurons]) * g[neurons])[:, 4]
        scale = (-1 if found == "degradation" else 1) / float(table.gap.mean())
        for node, value in zip(table.nodes, table.pooled(found), strict=True):
            if node.kind in ("feature", "error"):
                expected = change[..., node.index].sum(1) if node.kind == "feature" else error
                assert value == pytest.approx(float(expected.mean()) * scale, abs=EXACT), node
        for node, value in zip(units.nodes, units.pooled(found), strict=True):
            assert value == pytest.approx(float(of_units[:, node.index].mean()) * scale, abs=EXACT), node


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("method", ["atp", *RULES])
@pytest.mark.parametrize("name", ["hooked llama", "hooked gemma2", "bridge gpt2", "bridge gemma2"])
def test_paths_add_up_to_the_estimate_of_their_sender(name: str, method: Any) -> None:
    """On the route `all` into the logits, and on direct paths into everything that reads the residual stream."""
    whole, sender = model(name), fp.Node("blocks.1.hook_resid_pre", "activation")
    alone = fp.rank_components(whole, PAIRS, sites="resid_pre", layers=[1], method=method, progress=False)
    shared = 4 if name == "bridge gpt2" else 2
    heads = [("q", 4), ("k", shared), ("v", shared)]
    readers = [fp.head(layer, head, part) for layer in (1, 2) for part, n in heads for head in range(n)]
    readers += [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation") for layer in (1, 2)]
    options: dict[str, Any] = {"senders": [sender], "method": method, "progress": False}
    through = fp.rank_paths(whole, PAIRS, receivers=["logits"], route="all", **options)
    direct = fp.rank_paths(whole, PAIRS, receivers=[*readers, fp.LOGITS], **options)
    for effect in ("recovery", "degradation"):
        expected = pytest.approx(float(alone.pooled(effect)[0]), abs=EXACT)
        assert float(through.pooled(effect)[0]) == expected
        assert float(direct.pooled(effect).sum()) == expected


def test_a_screen_by_several_methods_takes_the_best_of_each(small: Small) -> None:
    """Candidates by hand: the first of each method, then the second of each, each once."""
    sae, options = small.at("blocks.1.hook_resid_pre"), {"positions": "each", "progress": False}
    methods, pairs = ("atp", "relp", "gim"), pairs_of(small)
    orders = []
    for method in methods:
        features = fp.rank_features(small.model, sae, pairs, method=method, **options).where(kind="feature")
        orders.append([features.nodes[row] for row in np.argsort(-features.sizes(), kind="stable")])
    expected = [*dict.fromkeys(node for of_rank in zip(*orders, strict=True) for node in of_rank)][:9]
    screen = fp.Screen(k=9, audit=12, top=3, method=methods)
    found = fp.rank_features(small.model, sae, pairs, screen=screen, **options)
    assert list(found.nodes[:9]) == expected
    assert (found.metadata["screening"]["method"], found.audit().screened) == ("atp, relp, gim", 9)
    exact = dict(
        zip(*(lambda t: (t.nodes, t.pooled("recovery")))(fp.rank_features(small.model, sae, pairs, **options)), strict=True)
    )
    np.testing.assert_allclose(found.pooled("recovery"), [exact[node] for node in found.nodes], rtol=0, atol=EXACT)
    assert [set(order[:9]) for order in orders] != [set(expected)] * 3


def test_an_ablation_is_estimated_too(small: Small) -> None:
    """Zero ablation of a head: minus its output times the gradient at it."""
    for method, rules in RULES.items():
        table = fp.ablate(small.model, pairs_of(small), sites="z", layers=[1], to="zero", method=method, progress=False)
        lens, z = wrap(small.model), "blocks.1.attn.hook_z"
        with modified(lens, rules):
            found = backpropagated(
                lens,
                small.clean,
                [z],
                torch.full((3,), 6),
                lambda x: x[range(3), small.correct] - x[range(3), small.wrong],
                reads=[z],
            )
        lost = (found.activations[z] * found.gradients[z]).sum((1, 3)).mean(0)
        for node, value in zip(table.nodes, table.pooled("degradation"), strict=True):
            if node.kind == "head":
                assert value == pytest.approx(float(lost[node.index]) / float(table.gap.mean()), abs=EXACT)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("name", ["hooked llama", "hooked gemma2", "bridge gpt2"])
def test_scores_of_edges_add_up_to_the_estimate_of_the_embedding(name: str, method: Any) -> None:
    """All edges from the embedding together are its ablation; scores are losses per pair."""
    whole = model(name)
    graph = EdgeGraph(wrap(whole), PAIRS, "corrupted", Measures.of("logit_diff"))
    found = dict(zip(graph.items, graph.estimates(method), strict=True))
    entering = fp.rank_components(
        whole, PAIRS, sites="resid_pre", layers=[0], directions=["noising"], method=method, progress=False
    )
    lost = float((entering.clean[entering.pair] - entering.noised).mean())
    total = sum(score for edge, score in found.items() if str(edge).startswith("hook_embed"))
    assert total == pytest.approx(lost, abs=EXACT)
    assert abs(lost) > 1e-4


@pytest.mark.parametrize("method", RULES)
def test_scores_of_nodes_are_their_estimates(small: Small, method: Any) -> None:
    heads = [fp.head(1, head) for head in range(4)]
    graph = fp.find_circuit(
        small.model, pairs_of(small), nodes=heads, scores=method, method="threshold", size=2, progress=False
    ).graph
    table = fp.rank_components(
        small.model, pairs_of(small), sites="z", layers=[1], directions=["noising"], method=method, progress=False
    )
    lost = {
        node: float((table.clean[table.pair] - table.noised)[table.row == row].mean()) for row, node in enumerate(table.nodes)
    }
    np.testing.assert_allclose(graph.estimates(method), [lost[node] for node in graph.items], rtol=0, atol=EXACT)


def test_attention_that_runs_as_a_whole_is_refused() -> None:
    """A pattern that is shown after the heads' outputs can't change the gradient; the rules that leave patterns alone work."""
    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24,
        max_position_embeddings=32, attn_implementation="eager",
    )  # fmt: skip
    lens = wrap(bridge(OPTForCausalLM(config)))
    with pytest.raises(fp.FeatpatchError, match="does not compute its output from the pattern"), modified(lens, FROZEN):
        taken(lens, ["blocks.1.hook_resid_pre"])
    with modified(lens, RULES["relp_qk"]):
        assert taken(lens, ["blocks.1.hook_resid_pre"]).gradients["blocks.1.hook_resid_pre"].any()


def test_errors(small: Small) -> None:
    for given, message in (
        ({"method": ("atp", "shap")}, "method='shap': expected one of atp, ig"),
        ({"method": ("atp", "atp")}, "expected a method of estimation, or several, each once"),
        ({"method": ()}, "expected a method of estimation, or several, each once"),
    ):
        with pytest.raises(fp.FeatpatchError, match=re.escape(message)):
            fp.Screen(**given)
    with pytest.raises(fp.FeatpatchError, match="is zero at the clean run"):
        fp.Gradients(small.model, pairs_of(small), metric="neg_kl", method="gim").check_directions(["noising"])
    sae = standard("blocks.1.hook_resid_pre", 1)
    with pytest.raises(fp.FeatpatchError, match=re.escape("use method='atp' or method='exact'")):
        fp.rank_features(OTHERS["olmoe"](), sae, PAIRS, method="relp", progress=False)
