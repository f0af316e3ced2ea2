"""Twenty-two everyday tasks from the tutorials of TransformerLens, SAELens and circuit-tracer, on the shipped demo.

Each test is one task, named by its docstring. Its first paragraph is the whole of what a user writes, at most three lines; the
second checks the numbers against a plain loop of hooked forward passes, which uses nothing of featpatch.
"""

import ast
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch

import featpatch as fp

CLOSE = 1e-5
LOGITS = 1e-4
"""The tolerances of effects and of logits and activations: the demo computes in float32, and its logits are up to 20."""
LAYERS, HEADS = 4, 8
HOOK = "blocks.3.hook_resid_pre"
"""The hook point of the SAE."""

Hooks = list[tuple[str, Callable[..., Any]]]


@pytest.fixture(scope="module")
def demo() -> Any:
    return fp.load_demo(progress=False)


@pytest.fixture(scope="module")
def model(demo: Any) -> Any:
    return demo.model


@pytest.fixture(scope="module")
def pairs(demo: Any) -> Any:
    return demo.pairs("ioi", n=3)


@pytest.fixture(scope="module")
def sae(demo: Any) -> Any:
    return next(sae for sae in demo.saes if sae.cfg.metadata.hook_name == HOOK)


@lru_cache(maxsize=128)
def run(model: Any, tokens: tuple[int, ...]) -> tuple[torch.Tensor, Any]:
    """The logits at the last token and the activations, without a patch."""
    with torch.no_grad():
        logits, cache = model.run_with_cache(torch.tensor([tokens]))
    return logits[0, -1], cache


def cached(model: Any, tokens: tuple[int, ...]) -> Any:
    return run(model, tokens)[1]


def difference(pair: Any, logits: torch.Tensor) -> float:
    return float(logits[pair.correct[0]] - logits[pair.wrong[0]])


@torch.no_grad()
def by_hand(model: Any, pairs: Any, hooks: Callable[[Any, Any, Any], Hooks], *, noising: bool = False) -> float:
    """The share of the gap that is recovered by `hooks(pair, source, base)` in corrupted runs, or lost in clean ones."""
    changes, gaps = [], []
    for pair in pairs:
        base, source = (pair.clean, pair.corrupted) if noising else (pair.corrupted, pair.clean)
        chosen = hooks(pair, cached(model, source), cached(model, base))
        patched = difference(pair, model.run_with_hooks(torch.tensor([base]), fwd_hooks=chosen)[0, -1])
        clean, corrupted = (difference(pair, run(model, tokens)[0]) for tokens in (pair.clean, pair.corrupted))
        changes.append(clean - patched if noising else patched - corrupted)
        gaps.append(clean - corrupted)
    return sum(changes) / sum(gaps)


def overwrite(hook: str, value: torch.Tensor, where: Any = ...) -> tuple[str, Callable[..., Any]]:
    """A hook that copies a part of `value`."""

    def write(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        activation = activation.clone()
        activation[where] = value[where]
        return activation

    return hook, write


def taken(hook: str, where: Any) -> Callable[[Any, Any, Any], Hooks]:
    """A patch for `by_hand`: a part of an activation from the source run."""
    return lambda pair, source, base: [overwrite(hook, source[hook], where)]


def decoded(sae: Any, source: Any, base: Any, position: int, features: Any, *, error: bool = False) -> Hooks:
    """Hooks that decode by hand: features at a position, and the error if wanted, are those of the source run."""
    with torch.no_grad():
        mixed, theirs = sae.encode(base[HOOK]), sae.encode(source[HOOK])
        errors = base[HOOK] - sae.decode(mixed), source[HOOK] - sae.decode(theirs)
        mixed[0, position, features] = theirs[0, position, features]
        new = sae.decode(mixed) + errors[error]
    return [overwrite(HOOK, new, (0, position))]


def test_residual_stream(model: Any, pairs: Any) -> None:
    """Task 1: patch the residual stream by layer and position."""
    table = fp.rank_components(model, pairs[:1], sites="resid_pre", positions="each", directions=["denoising"], progress=False)
    values, axes = table.to_tensor("layer", "position")

    assert axes["layer"] == list(range(LAYERS))
    for layer in range(LAYERS):
        for column, position in enumerate(axes["position"]):
            expected = by_hand(model, pairs[:1], taken(f"blocks.{layer}.hook_resid_pre", (0, position)))
            assert float(values[layer, column]) == pytest.approx(expected, abs=CLOSE)
    assert values.max() > 0.9


def test_head_outputs(model: Any, pairs: Any) -> None:
    """Task 2: patch the output of every head, by layer and head."""
    values, _ = fp.rank_components(model, pairs, sites="z", progress=False).to_tensor("layer", "head")

    assert values.shape == (LAYERS, HEADS)
    for layer in range(LAYERS):
        for head in range(HEADS):
            expected = by_hand(model, pairs, taken(f"blocks.{layer}.attn.hook_z", (0, slice(None), head)))
            assert float(values[layer, head]) == pytest.approx(expected, abs=CLOSE)


def test_inside_a_head(model: Any, pairs: Any) -> None:
    """Task 3: patch the queries, keys, values and pattern of a head."""
    nodes = [fp.head(1, 3, site) for site in ("q", "k", "v", "pattern")]
    effects = fp.rank_nodes(model, pairs, nodes, together=False, progress=False).pooled("recovery")

    for site, effect in zip(("q", "k", "v", "pattern"), effects, strict=True):
        where = (0, 3) if site == "pattern" else (0, slice(None), 3)
        expected = by_hand(model, pairs, taken(f"blocks.1.attn.hook_{site}", where))
        assert effect == pytest.approx(expected, abs=CLOSE)


def test_mlp_outputs(model: Any, pairs: Any) -> None:
    """Task 4: patch the output of every MLP, by layer and position."""
    components = fp.rank_components(model, pairs, sites="mlp_out", positions=["S2", "end"], progress=False)
    values, axes = components.to_tensor("layer", "position")

    for layer in range(LAYERS):
        for column, label in enumerate(axes["position"]):
            hook = f"blocks.{layer}.hook_mlp_out"
            expected = by_hand(model, pairs, lambda pair, s, b: [overwrite(hook, s[hook], (0, pair.labels[label]))])  # noqa: B023
            assert float(values[layer, column]) == pytest.approx(expected, abs=CLOSE)


def test_ranked_features(model: Any, pairs: Any, sae: Any) -> None:
    """Task 5: rank the features of an SAE by recovery."""
    effects = fp.rank_features(model, sae, pairs, positions=["end"], progress=False)
    best = effects.where(kind="feature").top(5, by="recovery")

    changed = set[int]()
    for pair in pairs:
        clean, corrupted = (sae.encode(cached(model, tokens)[HOOK])[0, -1] for tokens in (pair.clean, pair.corrupted))
        changed |= set((clean != corrupted).nonzero().flatten().tolist())
    expected = {i: by_hand(model, pairs, lambda pair, s, b: decoded(sae, s, b, pair.labels["end"], i)) for i in changed}  # noqa: B023
    ranked = sorted(expected, key=expected.__getitem__, reverse=True)[:5]
    assert [node.index for node in best.nodes] == ranked
    assert list(best.pooled("recovery")) == pytest.approx([expected[i] for i in ranked], abs=CLOSE)


def test_error_term(model: Any, pairs: Any, sae: Any) -> None:
    """Task 6: patch the error term of an SAE."""
    effects = fp.rank_features(model, sae, pairs, positions=["end"], progress=False)
    (effect,) = effects.where(kind="error").pooled("recovery")

    expected = by_hand(model, pairs, lambda pair, s, b: decoded(sae, s, b, pair.labels["end"], [], error=True))
    assert effect == pytest.approx(expected, abs=CLOSE)
    assert abs(effect) > 10 * CLOSE


def test_all_features(model: Any, pairs: Any, sae: Any) -> None:
    """Task 7: patch all features of an SAE at once and keep its error."""
    effects = fp.rank_features(model, sae, pairs, positions=["end"], progress=False)
    (effect,) = effects.where(kind="all_features").pooled("recovery")

    expected = by_hand(model, pairs, lambda pair, s, b: decoded(sae, s, b, pair.labels["end"], slice(None)))
    assert effect == pytest.approx(expected, abs=CLOSE)


def test_noised_feature(model: Any, pairs: Any, sae: Any) -> None:
    """Task 8: put the corrupted value of a feature into the clean run (noising)."""
    effects = fp.rank_features(model, sae, pairs, positions=["end"], directions=["noising"], progress=False)
    best = effects.where(kind="feature").top(1)

    index = best.nodes[0].index
    expected = by_hand(model, pairs, lambda pair, s, b: decoded(sae, s, b, pair.labels["end"], index), noising=True)
    assert best.pooled("degradation")[0] == pytest.approx(expected, abs=CLOSE)
    assert abs(expected) > 10 * CLOSE


def test_zero_ablation(model: Any, pairs: Any) -> None:
    """Task 9: ablate a head to zero."""
    (effect,) = fp.rank_nodes(model, pairs, [fp.head(1, 3)], to="zero", together=False, progress=False).pooled("degradation")

    hook, where = "blocks.1.attn.hook_z", (0, slice(1, None), 3)  # the first token is special and keeps its activation
    zeros = by_hand(model, pairs, lambda pair, s, b: [overwrite(hook, torch.zeros_like(b[hook]), where)], noising=True)
    assert effect == pytest.approx(zeros, abs=CLOSE)


def test_mean_ablation(demo: Any, model: Any, pairs: Any) -> None:
    """Task 10: ablate a head to its mean over other prompts."""
    others = demo.pairs("ioi", n=10)
    ablated = fp.rank_nodes(model, pairs, [fp.head(1, 3)], to="mean", reference=others, together=False, progress=False)
    (effect,) = ablated.pooled("degradation")

    hook, where = "blocks.1.attn.hook_z", (0, slice(1, None), 3)
    values = [cached(model, run)[hook][where] for pair in others for run in (pair.clean, pair.corrupted)]
    mean = torch.cat(values).mean(0)
    means = by_hand(model, pairs, lambda p, s, b: [overwrite(hook, mean.expand_as(b[hook]), where)], noising=True)
    assert effect == pytest.approx(means, abs=CLOSE)


def test_five_heads(model: Any, pairs: Any) -> None:
    """Task 11: patch five heads in different layers together."""
    heads = [(1, 3), (1, 1), (3, 5), (3, 3), (2, 3)]
    joint = fp.rank_nodes(model, pairs, [fp.head(layer, head) for layer, head in heads], progress=False).where(kind="set")

    def hooks(pair: Any, source: Any, base: Any) -> Hooks:
        names = [(f"blocks.{layer}.attn.hook_z", (0, slice(None), head)) for layer, head in heads]
        return [overwrite(name, source[name], where) for name, where in names]

    assert joint.pooled("recovery")[0] == pytest.approx(by_hand(model, pairs, hooks), abs=CLOSE)
    assert joint.pooled("degradation")[0] == pytest.approx(by_hand(model, pairs, hooks, noising=True), abs=CLOSE)


def test_feature_and_head(model: Any, pairs: Any, sae: Any) -> None:
    """Task 12: patch a feature and a head together, each at its label."""
    nodes = [fp.feature(sae, 46, "end"), fp.head(3, 5, "z", "end")]
    joint = fp.rank_nodes(model, pairs, nodes, saes=sae, progress=False).where(kind="set")

    def hooks(pair: Any, source: Any, base: Any) -> Hooks:
        end, hook = pair.labels["end"], "blocks.3.attn.hook_z"
        return [*decoded(sae, source, base, end, 46), overwrite(hook, source[hook], (0, end, 5))]

    assert joint.pooled("recovery")[0] == pytest.approx(by_hand(model, pairs, hooks), abs=CLOSE)


@torch.no_grad()
def test_direct_logit_attribution(model: Any, pairs: Any) -> None:
    """Task 13: attribute the logit difference to the direct writes of heads, MLPs and biases."""
    attribution = fp.logit_attribution(model, pairs, progress=False)
    table = attribution.to_pandas()

    expected = sum(difference(pair, run(model, pair.clean)[0]) for pair in pairs) / len(pairs)
    assert attribution.values.sum(0).mean() == pytest.approx(expected, abs=LOGITS)
    assert abs(attribution.residual()).max() < LOGITS
    heads = torch.zeros(LAYERS, HEADS)
    for pair in pairs:
        cache = cached(model, pair.clean)
        final = cache["blocks.3.hook_resid_post"][0, -1]
        scale = (final.var(unbiased=False) + model.cfg.eps).sqrt()
        towards = model.W_U[:, pair.correct[0]] - model.W_U[:, pair.wrong[0]]
        for layer in range(LAYERS):
            written = torch.einsum("hd,hdm->hm", cache[f"blocks.{layer}.attn.hook_z"][0, -1], model.W_O[layer])
            heads[layer] += (written - written.mean(-1, keepdim=True)) / scale * model.ln_final.w @ towards / len(pairs)
    found = table[table["kind"] == "head"]
    assert len(found) == LAYERS * HEADS
    for layer, head, logits in zip(found["layer"], found["index"], found["logits"], strict=True):
        assert logits == pytest.approx(float(heads[layer, head]), abs=LOGITS)


def test_attribution_on_one_prompt(model: Any, pairs: Any, sae: Any) -> None:
    """Task 14: attribute a logit on one prompt to features, without a counterfactual."""
    prompt = fp.Pairs.from_prompts(model, clean="When Mary and John went to the store , John gave a drink to", correct=" Mary")
    found = fp.ablate(model, prompt, saes=sae, to="zero", metric="logit", method="atp", progress=False).where(kind="feature")

    kept: list[torch.Tensor] = []

    def keep(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        kept.append(activation.detach().requires_grad_())
        return kept[0]

    logits = model.run_with_hooks(torch.tensor([prompt[0].clean]), fwd_hooks=[(HOOK, keep)])
    (gradient,) = torch.autograd.grad(logits[0, -1, prompt[0].correct[0]], kept)
    expected = (sae.encode(kept[0]) * (gradient @ sae.W_dec.T))[0, 1:].sum(0)  # the first token is special
    assert {node.index for node in found.nodes} == set(expected.nonzero().flatten().tolist())
    for node, value in zip(found.nodes, found.pooled("degradation"), strict=True):
        assert value == pytest.approx(float(expected[node.index].detach()), abs=LOGITS)


def test_direct_path(model: Any, pairs: Any) -> None:
    """Task 15: patch the direct path from a head to the logits."""
    paths = fp.rank_paths(model, pairs, senders=[fp.head(1, 3, "z", "end")], receivers=["logits"], progress=False)
    (effect,) = paths.pooled("recovery")

    def hooks(pair: Any, source: Any, base: Any) -> Hooks:
        frozen = [f"blocks.{layer}.hook_attn_out" for layer in (2, 3)] + [f"blocks.{layer}.hook_mlp_out" for layer in (1, 2, 3)]
        sent = overwrite("blocks.1.attn.hook_z", source["blocks.1.attn.hook_z"], (0, pair.labels["end"], 3))
        return [sent, *(overwrite(name, base[name]) for name in frozen)]

    assert effect == pytest.approx(by_hand(model, pairs, hooks), abs=CLOSE)
    assert abs(effect) > 10 * CLOSE


@torch.no_grad()
def test_active_features(model: Any, pairs: Any, sae: Any) -> None:
    """Task 16: list the features that are active on each token."""
    table = fp.active_features(model, sae, pairs[0], per_token=5)

    values = sae.encode(cached(model, pairs[0].clean)[HOOK])[0]
    for position in range(1, len(pairs[0].clean)):
        rows = table[table["position"] == position]
        best, features = values[position].topk(min(5, int((values[position] > 0).sum())))
        assert list(rows["feature"]) == features.tolist()
        assert list(rows["value"]) == pytest.approx(best.tolist(), abs=LOGITS)


@torch.no_grad()
def test_max_activating(demo: Any, model: Any, sae: Any) -> None:
    """Task 17: find the tokens of a text on which a feature is most active."""
    (found,) = fp.max_activating(model, sae, [fp.feature(sae, 46)], demo.text()[:60], contexts=1).values()

    values, words = [], []
    for text in demo.text()[:60]:
        tokens = model.to_tokens(text)
        activation = cached(model, tuple(tokens[0].tolist()))[HOOK]
        values += sae.encode(activation)[0, 1:, 46].tolist()  # without the special first token
        words += [model.tokenizer.decode([token]).strip() for token in tokens[0, 1:].tolist()]
    assert found.fired == sum(value > 0 for value in values) > 10
    assert found.positions == len(values)
    assert found.examples[0].value == pytest.approx(max(values), abs=LOGITS)
    assert f"[{words[values.index(max(values))]}]" in found.contexts[0]


@torch.no_grad()
def test_loss_with_the_sae(demo: Any, model: Any, sae: Any) -> None:
    """Task 18: measure the loss with the SAE spliced in, and with zero ablation."""
    (found,) = fp.loss_recovered(model, sae, demo.text()[:20], progress=False).spliced

    def keep_first(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda activation, hook: torch.cat([activation[:, :1], change(activation)[:, 1:]], 1)

    changes = {"loss": lambda x: x, "loss_sae": lambda x: sae.decode(sae.encode(x)), "loss_zero": torch.zeros_like}
    for name, change in changes.items():
        losses = []
        for text in demo.text()[:20]:
            tokens = model.to_tokens(text)
            logits = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, keep_first(change))])
            losses.append(torch.nn.functional.cross_entropy(logits[0, 1:-1], tokens[0, 2:], reduction="none"))
        assert getattr(found, name) == pytest.approx(float(torch.cat(losses).mean()), abs=LOGITS)


def test_attention_pattern(model: Any, pairs: Any) -> None:
    """Task 19: plot the attention pattern of a head on both prompts."""
    figure = fp.attention_pattern(model, pairs[0], layer=3, head=5)

    for drawn, tokens in zip(figure.data, (pairs[0].clean, pairs[0].corrupted), strict=True):
        assert drawn.z == pytest.approx(cached(model, tokens)["blocks.3.attn.hook_pattern"][0, 5].numpy(), abs=1e-6)


@torch.no_grad()
def test_patch_by_hand(model: Any, pairs: Any) -> None:
    """Task 20: run the model with a head's value vector patched during the call."""
    with fp.do(model, fp.Patch((fp.head(1, 3, "v", "S2"),)), pair=pairs[0]):
        logits = model(torch.tensor([pairs[0].corrupted]))

    hook, tokens = "blocks.1.attn.hook_v", torch.tensor([pairs[0].corrupted])
    value = cached(model, pairs[0].clean)[hook]
    expected = model.run_with_hooks(tokens, fwd_hooks=[overwrite(hook, value, (0, pairs[0].labels["S2"], 3))])
    torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)
    assert (logits[0, -1] - run(model, pairs[0].corrupted)[0]).abs().max() > 0.1


def test_direction(model: Any, pairs: Any) -> None:
    """Task 21: patch what a direction of the residual stream carries."""
    towards = model.W_U[:, pairs[0].correct[0]] - model.W_U[:, pairs[0].wrong[0]]
    answer = fp.direction(towards, HOOK, name="answer")
    effects = fp.rank_nodes(model, pairs, [fp.feature(answer, 0, "end")], saes=answer, together=False, progress=False)

    def hooks(pair: Any, source: Any, base: Any) -> Hooks:
        unit = towards / towards.norm()
        new = base[HOOK] + ((source[HOOK] - base[HOOK]) @ unit)[..., None] * unit
        return [overwrite(HOOK, new, (0, pair.labels["end"]))]

    assert effects.pooled("recovery")[0] == pytest.approx(by_hand(model, pairs, hooks), abs=CLOSE)


@torch.no_grad()
def test_steering(model: Any, pairs: Any, sae: Any) -> None:
    """Task 22: steer a call of the model with a multiple of a feature's decoder direction."""
    steered = {HOOK: model.run_with_cache(tokens := torch.tensor([pairs[0].clean]))[1][HOOK] + 5 * sae.W_dec[46]}
    with fp.do(model, fp.Patch((fp.Node(HOOK, "activation", position=-1),)), source=steered, how="set"):
        logits = model(tokens)

    pushed = torch.zeros(1, len(pairs[0]), model.cfg.d_model)
    pushed[0, -1] = 5 * sae.W_dec[46]
    expected = model.run_with_hooks(tokens, fwd_hooks=[(HOOK, lambda activation, hook: activation + pushed)])
    torch.testing.assert_close(logits, expected, atol=LOGITS, rtol=0)
    assert (logits[0, -1] - run(model, pairs[0].clean)[0]).abs().max() > 0.1


def test_each_task_takes_at_most_three_lines() -> None:
    """The first paragraph of each test is the whole use of featpatch; the tasks are numbered without gaps."""
    source, numbers = Path(__file__).read_text(encoding="utf-8"), []
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and (named := re.match(r"Task (\d+): .+", ast.get_docstring(function) or "")):
            numbers.append(int(named[1]))
            body = source.splitlines()[function.body[1].lineno - 1 : function.end_lineno]
            assert body.index("") <= 3, function.name
            assert "fp." not in "".join(body[body.index("") :]), function.name
    assert numbers == list(range(1, 23))
