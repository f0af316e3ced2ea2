"""Backward passes under other rules against a forward pass written out with constants, in float64."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
import torch
from architectures import BRIDGES, HOOKED, OTHERS, VOCAB
from backward_oracle import Written, gradients

import featpatch as fp
from featpatch.model.backward import FROZEN, RULES, Rules, modified
from featpatch.model.lens import Differentiated, Lens
from featpatch.model.transformer_lens import wrap

EXACT, SINGLE = 1e-10, 1e-5
"""Hugging Face computes RMS norms and some softmaxes in float32, whatever the dtype of the model."""

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
    return lens.gradients(TOKENS, hooks, torch.full((3,), 5), measure)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_a_forward_pass_with_constants(name: str) -> None:
    """At every hook point alone and at all of them together; values are the same to the last bit."""
    lens, tolerance = wrap(model(name)), EXACT if name.startswith("hooked") else SINGLE
    entering = lens.read(TOKENS, ["blocks.0.hook_resid_pre"])["blocks.0.hook_resid_pre"]
    for rules, stopped in STOPPED.items():
        values, expected = gradients(Written(model(name), **MODELS[name][1], stopped=stopped), entering, 3, 4)
        hooks = [hook for hook in expected if hook in lens.hook_points]
        plain = taken(lens, hooks)
        with modified(lens, rules):
            found = [taken(lens, hooks), *(taken(lens, [hook]) for hook in hooks if hook.startswith("blocks.1"))]
        assert len(hooks) >= 27
        assert torch.equal(found[0].values, plain.values)
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


def test_an_edit_made_later_is_seen_by_the_rules() -> None:
    """A change in front of the activation function is part of the constant act(z) / z."""
    lens = wrap(model("hooked gpt2"))
    hook, post = "blocks.1.mlp.hook_pre", "blocks.1.mlp.hook_post"
    with modified(lens, RULES["relp"]), lens.edit(hook, lambda z: z + 1):
        found = taken(lens, [hook, post])
    z = lens.read(TOKENS, [hook])[hook] + 1
    ratio = torch.nn.functional.gelu(z, approximate="tanh") / z
    torch.testing.assert_close(found.gradients[hook], found.gradients[post] * ratio, rtol=0, atol=EXACT)


@pytest.mark.parametrize("name", ["olmoe", "gpt-oss"])
def test_other_forms_of_layers_are_refused(name: str) -> None:
    lens = wrap(OTHERS[name]())
    for rules in RULES.values():
        with pytest.raises(fp.FeatpatchError, match="expected norms, attention patterns and MLPs"), modified(lens, rules):
            taken(lens, ["blocks.1.hook_resid_pre"])
    assert not any(point.fwd_hooks for point in lens.hook_points.values())
