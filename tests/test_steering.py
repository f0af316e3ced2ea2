"""Steering against loops that run the whole sequence at every step with plain hooks; doses against `fp.steer` and by hand."""

from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import architectures
import numpy as np
import oracle
import pytest
import torch
from sae_lens import Transcoder, TranscoderConfig
from small import WIDTH, Small, at, randomised, small_bridge
from test_cross import random, simple_clt, simple_crosscoder
from test_nodes import LABELS, pairs_of

import featpatch as fp

RESID, LAST, Z = "blocks.1.hook_resid_pre", "blocks.2.hook_resid_post", "blocks.1.attn.hook_z"
STEPS = 5
Hooks = Mapping[str, Callable[[torch.Tensor], torch.Tensor]]


def within(positions: str, length: int, prompt: int) -> torch.Tensor:
    at = torch.arange(length)
    return {"all": at >= 0, "prompt": at < prompt, "generated": at >= prompt, "newest": at >= prompt - 1}[positions]


def looped(model: Any, tokens: torch.Tensor, hooks: Callable[[int], Hooks], steps: int = STEPS) -> torch.Tensor:
    """Greedy generation that runs the whole sequence at every step; `hooks` makes the hooks for a sequence length."""
    for _ in range(steps):
        made = [(name, lambda x, hook, change=change: change(x)) for name, change in hooks(tokens.shape[1]).items()]
        with torch.no_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=made)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens


def generated(model: Any, tokens: torch.Tensor, *, cache: bool, steps: int = STEPS) -> torch.Tensor:
    options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
    return model.generate(tokens, max_new_tokens=steps, use_past_kv_cache=cache, **options)


def caches(small: Small) -> list[bool]:
    """HookedTransformer can't generate with a cache without a tokenizer."""
    return [True, False] if type(small.model).__name__ == "TransformerBridge" else [False]


def by_hand(values: torch.Tensor, number: float, how: str) -> torch.Tensor:
    return {"set": torch.full_like(values, number), "add": values + number, "scale": values * number}[how]


def steered(sae: Any, index: int, number: float, how: str, x: torch.Tensor, read: torch.Tensor | None = None) -> torch.Tensor:
    """How steering changes what an SAE or transcoder writes."""
    read = x if read is None else read
    f = oracle.encode(sae, read)
    g = f.clone()
    g[..., index] = by_hand(f[..., index], number, how)
    return oracle.decode(sae, g, read, read) - oracle.decode(sae, f, read, read)


@pytest.mark.parametrize("how", ["set", "add", "scale"])
@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "newest"])
def test_every_step_is_steered(small: Small, how: Any, positions: str) -> None:
    """With and without a KV cache, at the positions of the same tokens."""
    sae, tokens, number = small.at(RESID), small.clean[:2], {"set": 4.0, "add": 6.0, "scale": 30.0}[how]

    def hooks(length: int) -> Hooks:
        where = within(positions, length, tokens.shape[1])[None, :, None]
        return {RESID: lambda x: x + steered(sae, 5, number, how, x) * where}

    expected = looped(small.model, tokens, hooks)
    changed = not torch.equal(expected, looped(small.model, tokens, lambda _: {}))
    assert changed or (how == "scale" and positions in ("generated", "newest"))  # a feature that is off stays off
    for cache in caches(small):
        with fp.steer(small.model, {fp.feature(sae, 5): number}, saes=sae, how=how, positions=positions) as fired:
            found = generated(small.model, tokens, cache=cache)
        assert torch.equal(found, expected)
        assert fired.count == {"generated": STEPS - 1, "prompt": 1 if cache else STEPS}.get(positions, STEPS)
    assert torch.equal(generated(small.model, tokens, cache=False), looped(small.model, tokens, lambda _: {}))


def logits(model: Any, tokens: torch.Tensor, **hooks: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_hooks(tokens, fwd_hooks=[(name, lambda x, hook, f=f: f(x)) for name, f in hooks.items()])


def steered_logits(model: Any, tokens: torch.Tensor, values: Any, **options: Any) -> torch.Tensor:
    with torch.no_grad(), fp.steer(model, values, **options):
        return model(tokens)


def test_what_is_steered(small: Small) -> None:
    """Features of transcoders, several SAEs and a direction of one's own, heads, neurons and whole activations, in one pass."""
    model, tokens, transcoder, sae = small.model, small.clean, small.saes[8], small.at(LAST)
    reads, writes = transcoder.cfg.metadata.hook_name, transcoder.cfg.metadata.hook_name_out
    live: dict[str, torch.Tensor] = {}
    vector = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    along = fp.direction(vector, RESID)
    unit = vector / vector.norm()

    def keep(x: torch.Tensor) -> torch.Tensor:
        live["read"] = x
        return x

    def scaled(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, :, 2] *= 3.0
        return x

    expected = logits(
        model, tokens,
        **{
            RESID: lambda x: x + 3.0 * unit,
            reads: keep,
            writes: lambda y: y + steered(transcoder, 2, 3.0, "add", y, live["read"]),
            LAST: lambda x: x + steered(sae, 7, 3.0, "add", x) + steered(sae, 8, 2.0, "add", x) * 0,
        },
    )  # fmt: skip
    values = {fp.feature(along, 0): 3.0, fp.feature(transcoder, 2): 3.0, fp.feature(sae, 7, "there"): 3.0}
    found = steered_logits(model, tokens, values, saes=[along, transcoder, sae])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    found = steered_logits(model, tokens, {fp.head(1, 2): 3.0}, how="scale")
    torch.testing.assert_close(found, logits(model, tokens, **{Z: scaled}), rtol=0, atol=1e-10)
    neurons = "blocks.1.mlp.hook_post"

    def lit(x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[..., 7] += 5.0
        return x

    found = steered_logits(model, tokens, {fp.Node(neurons, "neuron", 7): 5.0})
    torch.testing.assert_close(found, logits(model, tokens, **{neurons: lit}), rtol=0, atol=1e-10)
    mlp = "blocks.0.hook_mlp_out"
    found = steered_logits(model, tokens, {fp.Node(mlp, "activation"): 0.0}, how="set")
    torch.testing.assert_close(found, logits(model, tokens, **{mlp: torch.zeros_like}), rtol=0, atol=1e-10)


def test_features_that_write_to_several_layers(small: Small) -> None:
    """Those of a cross-layer transcoder are read in the layer below which nothing of their own has been written."""
    model, tokens, made = small.model, small.clean, simple_clt()
    layer, index = 1, 2
    hook, outs = made.hook[layer], made.hook_out[layer:]
    live: dict[str, torch.Tensor] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        group = made.parts[layer]
        f = torch.relu(x @ group.W_enc.T + group.b_enc)[..., index]
        live["rows"] = (2.5 * f - f)[..., None] * group.W_dec[index].flatten()
        return x

    def writing(number: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda y: y + live["rows"][..., number * WIDTH : (number + 1) * WIDTH]

    hooks = {hook: keep, **{out: writing(number) for number, out in enumerate(outs)}}
    values = {fp.feature(made, index, layer=layer): 2.5}
    found = steered_logits(model, tokens, values, saes=made, how="scale")
    torch.testing.assert_close(found, logits(model, tokens, **hooks), rtol=0, atol=1e-10)
    both = simple_crosscoder(W_dec=random(3, 5, WIDTH), b_dec=random(3, WIDTH))
    node = {fp.feature(both, 3): 2.0}
    with pytest.raises(fp.FeatpatchError, match="encode='unsteered'"):
        steered_logits(model, tokens, node, saes=both)
    _, cache = model.run_with_cache(tokens)
    x = torch.cat([cache[name] for name in both.hook], dim=-1)
    group = both.parts[0]
    f = torch.relu(x @ group.W_enc.T + group.b_enc)[..., 3, None]
    assert bool((f > 0).any())
    rows = group.W_dec[3].flatten().split(WIDTH)
    hooks = {out: (lambda y, row=row: y + f * row) for out, row in zip(both.hook_out, rows, strict=True)}
    found = steered_logits(model, tokens, node, saes=both, how="scale", encode="unsteered")
    torch.testing.assert_close(found, logits(model, tokens, **hooks), rtol=0, atol=1e-10)


@pytest.mark.parametrize("cache", [True, False])
def test_features_as_they_would_be_without_steering(bridge: Small, cache: bool) -> None:
    """The lower feature changes what the upper one reads, unless it is read in a run of its own."""
    low, high, tokens = bridge.at(RESID), bridge.at(LAST), bridge.clean[:2]
    values = {fp.feature(low, 5): 3.0, fp.feature(high, 6): 3.0}
    cache_of_step: dict[str, torch.Tensor] = {}
    for encode in ("steered", "unsteered"):

        def hooks(length: int, encode: str = encode) -> Hooks:
            del length
            return {
                RESID: lambda x: x + steered(low, 5, 3.0, "scale", x if encode == "steered" else cache_of_step[RESID]),
                LAST: lambda x: x + steered(high, 6, 3.0, "scale", x if encode == "steered" else cache_of_step[LAST]),
            }

        tokens_now = tokens
        for _ in range(STEPS):
            cache_of_step.update(bridge.model.run_with_cache(tokens_now)[1].items())
            tokens_now = looped(bridge.model, tokens_now, hooks, 1)
        with fp.steer(bridge.model, values, saes=[low, high], how="scale", encode=encode):
            assert torch.equal(generated(bridge.model, tokens, cache=cache), tokens_now), encode


@pytest.mark.parametrize(("kind", "name"), architectures.FAMILIES)
def test_every_architecture(kind: str, name: str) -> None:
    """Steered at a list of positions and at generated tokens, with a cache where the model class has one."""
    model = {"bridge": architectures.BRIDGES, "hooked": architectures.HOOKED}[kind][name]()
    hook = "blocks.1.hook_resid_pre"
    vector = torch.randn(architectures.WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    along, tokens = fp.direction(vector, hook), torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    change = 4.0 * vector / vector.norm()
    where = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)[None, :, None]
    found = steered_logits(model, tokens, {fp.feature(along, 0): 4.0}, saes=along, positions=[1, -1])
    torch.testing.assert_close(found, logits(model, tokens, **{hook: lambda x: x + change * where}), rtol=0, atol=1e-9)
    if type(model).__name__ == "TransformerBridge":
        expected = looped(model, tokens, lambda n: {hook: lambda x: x + change * within("newest", n, 4)[None, :, None]}, 3)
        for cache in (True, False):
            with fp.steer(model, {fp.feature(along, 0): 4.0}, saes=along, positions="newest"):
                assert torch.equal(generated(model, tokens, cache=cache, steps=3), expected)


def test_prompts_of_different_lengths() -> None:
    """A padded batch gives what each prompt gives alone, at labels, indices and everywhere."""
    demo = fp.load_demo(progress=False)
    model, sae = demo.model, demo.saes[4]
    texts = [pair.clean for pair in demo.pairs("ioi", n=6)]
    short, long = min(texts, key=len), max(texts, key=len)
    assert len(short) < len(long)
    pad = len(long) - len(short)
    end = model.tokenizer.eos_token_id
    batch = torch.tensor([[end] * pad + list(short), list(long)])
    mask = torch.tensor([[0] * pad + [1] * len(short), [1] * len(long)])
    values = {fp.feature(sae, 610): 20.0}
    for positions in ("all", "newest", [2, -2]):
        alone = [
            steered_logits(model, torch.tensor([ids]), values, saes=sae, positions=positions)[0, -1] for ids in (short, long)
        ]
        with torch.no_grad(), fp.steer(model, values, saes=sae, positions=positions, attention_mask=mask):
            together = model(batch, attention_mask=mask)[:, -1]
        torch.testing.assert_close(together, torch.stack(alone), rtol=0, atol=1e-3)
    assert not torch.allclose(alone[0], model(torch.tensor([short]))[0, -1], atol=1e-3)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False, "verbose": False}
    with fp.steer(model, values, saes=sae, positions="newest", attention_mask=mask):
        together = model.generate(batch, attention_mask=mask, return_type="tokens", **options)[:, -4:]
    for ids, row in zip((short, long), together, strict=True):
        with fp.steer(model, values, saes=sae, positions="newest"):
            assert torch.equal(generated(model, torch.tensor([ids]), cache=True, steps=4)[0, -4:], row)


@pytest.mark.parametrize("encode", ["steered", "unsteered"])
@pytest.mark.parametrize("positions", ["prompt", "generated"])
def test_prompts_one_after_another(bridge: Small, positions: str, encode: Any) -> None:
    """A prompt of one token is one, whatever was generated before it, and a cache that holds a prompt may get several tokens."""
    model, options = bridge.model, {"saes": bridge.at(RESID), "positions": positions, "encode": encode}
    values, first = {fp.feature(bridge.at(RESID), 5): 6.0}, bridge.clean[:1]
    with fp.steer(model, values, **options):
        whole = model(torch.cat([first, first[:, :1]], dim=1))
    for cache in (True, False):
        with fp.steer(model, values, **options):
            alone = generated(model, first[:, :1], cache=cache)
        with fp.steer(model, values, **options):
            generated(model, first, cache=cache)
            assert torch.equal(generated(model, first[:, :1], cache=cache), alone)
            generated(model, first[:, :1], cache=cache)
            torch.testing.assert_close(model(torch.cat([first, first[:, :1]], dim=1)), whole, rtol=0, atol=0)
    if encode == "steered":
        hooks = {RESID: lambda x: x + steered(bridge.at(RESID), 5, 6.0, "add", x) * within(positions, 7, 4)[None, :, None]}
        with torch.no_grad(), fp.steer(model, values, **options):
            past = model.original_model(first[:, :4], use_cache=True).past_key_values
            rest = model.original_model(first[:, 4:], past_key_values=past).logits
        torch.testing.assert_close(rest, logits(model, first, **hooks)[:, 4:], rtol=0, atol=1e-9)


@pytest.mark.parametrize(("reads", "writes"), [("resid_post", "mlp_out"), ("mlp_out", "attn_out"), ("resid_mid", "resid_pre")])
def test_features_that_are_read_too_late(bridge: Small, reads: str, writes: str) -> None:
    metadata = at(f"blocks.1.hook_{reads}", f"blocks.1.hook_{writes}")
    config = TranscoderConfig(WIDTH, 8, "float64", d_out=WIDTH, apply_b_dec_to_input=False, metadata=metadata)
    made = randomised(Transcoder(config), 3)
    with pytest.raises(fp.FeatpatchError, match="before it has read everything.*encode='unsteered'"):
        steered_logits(bridge.model, bridge.clean, {fp.feature(made, 2): 3.0}, saes=made)
    steered_logits(bridge.model, bridge.clean, {fp.feature(made, 2): 3.0}, saes=made, encode="unsteered")


def test_the_residual_stream_after_attention(bridge: Small) -> None:
    """A bridge has a copy of it, which is changed by way of the output of attention, together with what is steered there."""
    model, tokens, mid, attn = bridge.model, bridge.clean, "blocks.1.hook_resid_mid", "blocks.1.hook_attn_out"
    saes = [bridge.at(mid), bridge.at(attn)]
    _, cache = model.run_with_cache(tokens)
    features = {fp.feature(saes[0], 5): 6.0, fp.feature(saes[1], 6): 4.0}
    both = sum(
        steered(sae, *change, "add", cache[hook]) for sae, hook, change in ((saes[0], mid, (5, 6.0)), (saes[1], attn, (6, 4.0)))
    )
    for values, how, change in (
        (features, "add", both),
        ({fp.Node(mid, "activation"): 0.5}, "scale", -0.5 * cache[mid]),
        ({fp.Node(mid, "activation"): 0.0}, "set", -cache[mid]),
    ):
        with pytest.raises(fp.FeatpatchError, match="before it has read everything.*encode='unsteered'"):
            steered_logits(model, tokens, values, saes=saes, how=how)
        found = steered_logits(model, tokens, values, saes=saes, how=how, encode="unsteered")
        expected = logits(model, tokens, **{attn: lambda x, change=change: x + change})
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_calls_without_tokens_are_refused(small: Small) -> None:
    """Neither are they left unsteered, nor are they steered as the call before."""
    model, tokens = small.model, small.clean
    resid = torch.randn(len(tokens), 4, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad(), fp.steer(model, {fp.feature(small.at(RESID), 5): 6.0}, saes=small.at(RESID)):
        for _ in range(2):
            with pytest.raises(fp.FeatpatchError, match="called without token ids"):
                model(resid, **({} if "bridge" in type(model).__module__ else {"start_at_layer": 0}))
            model(tokens)


def test_beams_and_samples(bridge: Small) -> None:
    """Rows that a beam search reorders keep their positions."""
    sae, tokens = bridge.at(RESID), bridge.clean[:1]
    options: dict[str, Any] = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": 39}
    found = []
    for cache in (True, False):
        with fp.steer(bridge.model, {fp.feature(sae, 5): 6.0}, saes=sae, positions="newest"):
            found.append(bridge.model.original_model.generate(tokens, use_cache=cache, **options))
    assert torch.equal(*found)
    assert not torch.equal(found[0], bridge.model.original_model.generate(tokens, **options))


def test_the_model_is_left_as_it_was(small: Small) -> None:
    sae, tokens = small.at(RESID), small.clean
    before = small.model(tokens)
    handles = len(small.model.embed._forward_pre_hooks)
    stopping = iter([None])

    def stopped() -> None:
        with fp.steer(small.model, {fp.feature(sae, 5): 6.0}, saes=sae):
            while True:
                small.model(tokens)
                next(stopping)  # as a generation that is stopped early

    with pytest.raises(StopIteration):
        stopped()
    stream = (step for step in range(3))
    with fp.steer(small.model, {fp.feature(sae, 5): 6.0}, saes=sae):
        small.model(tokens)
        next(stream)  # a generation that is stopped early
        with (
            pytest.raises(fp.FeatpatchError, match="patched already"),
            fp.steer(small.model, {fp.feature(sae, 5): 6.0}, saes=sae),
        ):
            pass
    torch.testing.assert_close(small.model(tokens), before, rtol=0, atol=0)
    assert len(small.model.embed._forward_pre_hooks) == handles
    with pytest.raises(fp.FeatpatchError, match="was not called"), fp.steer(small.model, {fp.feature(sae, 5): 6.0}, saes=sae):
        pass


def test_units_are_those_of_the_reference(small: Small) -> None:
    sae, pairs, tokens = small.at(RESID), pairs_of(small), small.clean
    prompts = torch.cat([small.clean, small.corrupted]).unique(dim=0)
    _, cache = small.model.run_with_cache(prompts)
    f = oracle.encode(sae, cache[RESID])[..., 5].flatten().detach()
    raw = {"mean": f[f > 0].mean(), "max": f.max()}
    for unit, of_unit in raw.items():
        found = steered_logits(small.model, tokens, {fp.feature(sae, 5): 2.0}, saes=sae, unit=unit, reference=pairs)
        same = steered_logits(small.model, tokens, {fp.feature(sae, 5): 2.0 * float(of_unit)}, saes=sae)
        torch.testing.assert_close(found, same, rtol=0, atol=1e-9)
    found = steered_logits(small.model, tokens, {fp.feature(sae, 5): "mean"}, saes=sae, how="set", reference=pairs)
    same = steered_logits(small.model, tokens, {fp.feature(sae, 5): float(f.mean())}, saes=sae, how="set")
    torch.testing.assert_close(found, same, rtol=0, atol=1e-9)


@pytest.mark.parametrize("how", ["set", "add", "scale"])
@pytest.mark.parametrize("positions", ["all", "newest", ["there"], [2, "pieces"]])
def test_doses_are_steered_runs(small: Small, how: Any, positions: Any) -> None:
    """In the fast engine; the KL divergence and the change of the metric by hand."""
    sae, pairs = small.at(RESID), pairs_of(small)
    nodes = [fp.feature(sae, 5), fp.feature(sae, 6, "there")]
    doses = fp.dose_response(
        small.model, pairs, nodes, [0.5, 3.0], saes=sae, how=how, positions=positions, progress=False
    )  # fmt: skip
    for row, node in enumerate(doses.nodes):
        for number, dose in enumerate(doses.doses):
            for slot, pair in enumerate(pairs):
                tokens = torch.tensor([pair.clean])
                plain = small.model(tokens)[0, -1].detach()
                at: dict[str, Any] = {"positions": positions} | ({} if isinstance(positions, str) else {"pair": pair})
                now = steered_logits(small.model, tokens, {node: dose}, saes=sae, how=how, **at)[0, -1]
                change = oracle.logit_diff(now[None, None], pair.correct[0], pair.wrong[0])
                change -= oracle.logit_diff(plain[None, None], pair.correct[0], pair.wrong[0])
                assert doses.measured["effect"][row, number, slot] == pytest.approx(change, abs=1e-9)
                kl = (plain.softmax(-1) * (plain.log_softmax(-1) - now.log_softmax(-1))).sum()
                assert doses.measured["kl"][row, number, slot] == pytest.approx(float(kl), abs=1e-9)
    table = doses.table()
    assert table["effect"].tolist() == pytest.approx(doses.measured["effect"].mean(2).flatten().tolist())
    assert (table["kl_low"] <= table["kl"]).all()


def test_doses_of_other_nodes(small: Small) -> None:
    """Heads and features that write to several layers."""
    pairs, made = pairs_of(small), simple_clt()
    doses = fp.dose_response(small.model, pairs, [fp.head(1, 2)], [0.0, 2.0], how="scale", progress=False)
    several = fp.dose_response(small.model, pairs, [fp.feature(made, 2, layer=1)], [2.0], saes=made, progress=False)
    for found, node, how, options in (
        (doses, fp.head(1, 2), "scale", {}),
        (several, fp.feature(made, 2, layer=1), "add", {"saes": made}),
    ):
        for slot, pair in enumerate(pairs):
            now = steered_logits(small.model, torch.tensor([pair.clean]), {node: 2.0}, how=how, **options)
            plain = small.model(torch.tensor([pair.clean])).detach()
            change = [oracle.logit_diff(each, pair.correct[0], pair.wrong[0]) for each in (now, plain)]
            assert found.measured["effect"][0, -1, slot] == pytest.approx(change[0] - change[1], abs=1e-9)


def test_generated_text_is_measured() -> None:
    """Perplexity, repetition and a score of steered text, by hand."""
    demo = fp.load_demo(progress=False)
    model, sae, pairs = demo.model, demo.saes[6], demo.pairs("sentiment", n=2)
    node = fp.feature(sae, 888)
    doses = fp.dose_response(
        model, pairs, [node], [20.0], saes=sae, positions="newest", tokens=6, score=lambda text: float(text.count("negative")),
        progress=False,
    )  # fmt: skip
    assert set(doses.measured) == {"effect", "kl", "perplexity", "repetition", "score"}
    for slot, pair in enumerate(pairs):
        prompt = torch.tensor([pair.clean])
        with fp.steer(model, {node: 20.0}, saes=sae, positions="newest"):
            made = generated(model, prompt, cache=True, steps=6)
        new = made[0, prompt.shape[1] :].tolist()
        assert doses.texts[doses.nodes[0], 20.0][slot] == model.tokenizer.decode(new)
        with torch.no_grad():
            losses = -model(made)[0].log_softmax(-1)[range(prompt.shape[1] - 1, made.shape[1] - 1), new]
        assert doses.measured["perplexity"][0, 0, slot] == pytest.approx(float(losses.double().mean().exp()), rel=1e-4)
        two = list(pairwise(new))
        assert doses.measured["repetition"][0, 0, slot] == pytest.approx(1 - len(set(two)) / len(two))
        assert doses.measured["score"][0, 0, slot] == model.tokenizer.decode(new).count("negative")
    assert doses.unsteered["repetition"].shape == (2,)
    assert "unsteered: logit_diff" in repr(doses)
    assert doses._repr_html_().count("<tr") == 2
    assert len(doses.plot(title="a <b>").data) == 5


FEATURE, HEAD = fp.feature(RESID, 5), fp.head(1, 2)


@pytest.mark.parametrize(
    ("values", "options", "said"),
    [
        ({}, {}, "expected a number for each node"),
        ({FEATURE: float("nan")}, {}, "expected a finite number, or 'mean'"),
        ({FEATURE: "median"}, {}, "expected a finite number, or 'mean'"),
        ({FEATURE: "mean"}, {}, "expected how='set'"),
        ({FEATURE: 1.0}, {"how": "multiply"}, "how='multiply': expected one of set, add, scale"),
        ({FEATURE: 1.0}, {"unit": "sd"}, "unit='sd': expected one of raw, mean, max"),
        ({FEATURE: 1.0}, {"unit": "mean"}, "expected reference=..., texts or pairs"),
        ({FEATURE: 1.0}, {"reference": ["a"]}, "expected no reference"),
        ({FEATURE: 1.0}, {"unit": "mean", "how": "scale"}, "factors have no unit"),
        ({FEATURE: 1.0}, {"positions": "some"}, "expected one of all, prompt, generated, newest"),
        ({FEATURE: 1.0}, {"positions": []}, "expected one of all, prompt, generated, newest"),
        ({FEATURE: 1.0}, {"positions": ["S2"]}, "expected pair="),
        ({FEATURE: 1.0}, {"pair": fp.Pair((1,), (2,), (3,), (4,))}, "expected no pair, because no label is named"),
        ({FEATURE: 1.0}, {"positions": [99]}, "99"),
        ({FEATURE: 1.0}, {"encode": "both"}, "encode='both': expected one of steered, unsteered"),
        ({FEATURE: 1.0}, {"attention_mask": torch.ones(1, 3, dtype=torch.long)}, r"attention_mask is \[1, 3\]"),
        ({HEAD: 1.0}, {}, "a number has no direction"),
        ({HEAD: 1.0}, {"how": "set", "unit": "mean", "reference": ["a"]}, "expected a feature, or a raw number"),
        ({fp.Node(RESID, "error", None, "all", RESID): 1.0}, {}, "expected a feature, a head, a neuron"),
        ({fp.head(1, 2, "pattern"): 0.0}, {"how": "set"}, "first dimension is the position"),
        ({HEAD: 0.0, fp.Node(Z, "activation"): 0.0}, {"how": "set"}, "overlaps another node"),
        ({fp.feature(LAST, 5): 1.0}, {}, "belongs to 0 of the SAEs passed"),
    ],
)
def test_what_does_not_fit(bridge: Small, values: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=said):
        steered_logits(bridge.model, bridge.clean, values, **{"saes": bridge.at(RESID), **options})


def test_doses_of_generated_tokens_leave_the_answer(bridge: Small) -> None:
    options: dict[str, Any] = {"saes": bridge.at(RESID), "tokens": 3, "progress": False}
    doses = fp.dose_response(bridge.model, pairs_of(bridge)[:1], [FEATURE], [6.0], positions="generated", **options)
    assert set(doses.measured) == {"perplexity", "repetition"}
    with fp.steer(bridge.model, {FEATURE: 6.0}, saes=bridge.at(RESID), positions="generated"):
        made = generated(bridge.model, torch.tensor([pairs_of(bridge)[0].clean]), cache=False, steps=3)
    assert doses.texts[doses.nodes[0], 6.0] == [" ".join(map(str, made[0, -3:].tolist()))]


def test_ctrl_c_keeps_the_doses_that_are_finished(bridge: Small) -> None:
    calls = iter(range(100))

    def score(text: str) -> float:
        if next(calls) == 3:  # of the texts without steering and of the first dose, two each
            raise KeyboardInterrupt
        return 0.0

    options: dict[str, Any] = {"saes": bridge.at(RESID), "tokens": 2, "score": score, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        fp.dose_response(bridge.model, pairs_of(bridge)[:2], [FEATURE], [1.0, 2.0], **options)
    calls = iter(range(-2, 100))
    doses = fp.dose_response(bridge.model, pairs_of(bridge)[:2], [FEATURE], [1.0, 2.0], **options)
    assert (doses.doses, doses.metadata["finished"]) == ((1.0,), False)
    assert doses.measured["score"].shape == (1, 1, 2)


@pytest.mark.parametrize(
    ("doses", "options", "said"),
    [
        ([], {}, "expected a list of finite numbers"),
        ([1.0, 1.0], {}, "each once"),
        ([1.0], {"tokens": -1}, "tokens=-1"),
        ([1.0], {"score": len}, "score without tokens"),
        ([1.0], {"positions": "generated"}, "positions='generated' without tokens"),
        ([1.0], {"tokens": 2, "score": lambda text: None}, "expected a finite number"),
        ([1.0], {"tokens": 10}, "7 tokens and tokens=10.*expected at most 16 together"),
        ([1.0], {"metric": ["logit_diff", "log_prob"]}, "expected one name or one function"),
    ],
)
def test_doses_that_do_not_fit(bridge: Small, doses: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(fp.FeatpatchError, match=said):
        fp.dose_response(bridge.model, pairs_of(bridge), [FEATURE], doses, saes=bridge.at(RESID), progress=False, **options)


def test_doses_refuse_what_steering_refuses(bridge: Small) -> None:
    for node, said in (
        (HEAD, "a number has no direction"),
        (fp.Node(RESID, "error", None, "all", RESID), "expected a feature"),
    ):
        with pytest.raises(fp.FeatpatchError, match=said):
            fp.dose_response(bridge.model, pairs_of(bridge), [node], [1.0], saes=bridge.at(RESID), progress=False)


def test_doses_of_generated_tokens_and_of_the_divergence(bridge: Small) -> None:
    """The answer is predicted before any token is generated, so there is no effect on it to measure."""
    model, pairs, sae = bridge.model, pairs_of(bridge), bridge.at(RESID)
    options: dict[str, Any] = {"saes": sae, "progress": False}
    doses = fp.dose_response(model, pairs, [FEATURE], [6.0], tokens=3, positions="generated", **options)
    assert list(doses.measured) == ["perplexity", "repetition"] == list(doses.unsteered)
    with fp.steer(model, {FEATURE: 6.0}, saes=sae, positions="generated"):
        made = generated(model, torch.tensor([pairs[0].clean]), cache=False, steps=3)
    assert doses.texts[FEATURE, 6.0][0] == " ".join(map(str, made[0, -3:].tolist()))
    assert "generated" in repr(doses)
    assert len(doses.plot().data) == 2
    same = fp.dose_response(model, pairs, [FEATURE], [6.0], metric="neg_kl", **options)
    np.testing.assert_allclose(same.measured["effect"], -same.measured["kl"], rtol=0, atol=1e-12)
    other = fp.dose_response(model, pairs, [FEATURE], [6.0], **options)
    np.testing.assert_allclose(same.measured["kl"], other.measured["kl"], rtol=0, atol=1e-12)


def test_text_with_features_that_are_read_too_late(bridge: Small) -> None:
    model, pairs, mid = bridge.model, pairs_of(bridge), bridge.at("blocks.1.hook_resid_mid")
    values, options = {fp.feature(mid, 5): 6.0}, {"saes": mid, "encode": "unsteered"}
    doses = fp.dose_response(model, pairs, [*values], [6.0], tokens=3, progress=False, **options)
    with fp.steer(model, values, **options):
        made = generated(model, torch.tensor([pairs[0].clean]), cache=False, steps=3)
    assert doses.texts[doses.nodes[0], 6.0][0] == " ".join(map(str, made[0, -3:].tolist()))


def test_a_feature_that_is_never_active() -> None:
    small = small_bridge()
    sae = small.at(RESID)
    with torch.no_grad():
        sae.b_enc[5] = -1e6
    with pytest.raises(fp.FeatpatchError, match="never active in the reference"):
        steered_logits(small.model, small.clean, {FEATURE: 1.0}, saes=sae, unit="mean", reference=pairs_of(small))


def test_prompts_one_after_the_other(bridge: Small) -> None:
    """A prompt that is one token longer than the last sequence is a new one, unless it continues it."""
    sae, first = bridge.at(RESID), bridge.clean[:1]
    longer, continued = torch.cat([bridge.corrupted[:1], first[:, :1]], 1), torch.cat([first, first[:, :1]], 1)
    with torch.no_grad(), fp.steer(bridge.model, {FEATURE: 6.0}, saes=sae, positions="generated") as fired:
        bridge.model(first)
        torch.testing.assert_close(bridge.model(longer), logits(bridge.model, longer), rtol=0, atol=1e-12)
        assert fired.count == 0
        bridge.model(first)
        bridge.model(continued)
        assert fired.count == 1


def test_several_dictionaries_at_one_hook_point(small: Small) -> None:
    sae, vector = small.at(RESID), torch.randn(WIDTH, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    along, tokens = fp.direction(vector, RESID), small.clean
    found = steered_logits(small.model, tokens, {FEATURE: 6.0, fp.feature(along, 0): 3.0}, saes=[sae, along])
    expected = logits(
        small.model, tokens, **{RESID: lambda x: x + steered(sae, 5, 6.0, "add", x) + 3.0 * vector / vector.norm()}
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_special_tokens_are_left_out() -> None:
    """Of the reference, and of what is steered."""
    demo = fp.load_demo(progress=False)
    model, sae, pairs = demo.model, demo.saes[4], demo.pairs("ioi", n=2)
    prompts = list(dict.fromkeys(ids for pair in pairs for ids in (pair.clean, pair.corrupted)))
    with torch.no_grad():
        found = [sae.encode(model.run_with_cache(torch.tensor([ids]))[1][RESID])[0] for ids in prompts]
        index = int(found[0][0].argmax())  # a feature that is active on BOS
        mean = torch.cat([f[1:, index] for f in found]).mean()
        assert abs(float(torch.cat([f[:, index] for f in found]).mean() - mean)) > 1e-3
        node, tokens = fp.feature(sae, index), torch.tensor([prompts[0]])
        steered_mean = steered_logits(model, tokens, {node: "mean"}, saes=sae, how="set", reference=pairs)
        same = steered_logits(model, tokens, {node: float(mean)}, saes=sae, how="set")
        torch.testing.assert_close(steered_mean, same, rtol=0, atol=1e-4)
        listed = steered_logits(model, tokens, {node: 9.0}, saes=sae, positions=list(range(1, tokens.shape[1])))
        torch.testing.assert_close(steered_logits(model, tokens, {node: 9.0}, saes=sae), listed, rtol=0, atol=1e-5)


def test_labels_name_positions(bridge: Small) -> None:
    sae, pair = bridge.at(RESID), pairs_of(bridge)[0]
    tokens = torch.tensor([pair.clean])
    found = steered_logits(bridge.model, tokens, {FEATURE: 5.0}, saes=sae, positions=["pieces"], pair=pair)
    same = steered_logits(bridge.model, tokens, {FEATURE: 5.0}, saes=sae, positions=list(LABELS[0]["pieces"]))
    torch.testing.assert_close(found, same, rtol=0, atol=0)
    with pytest.raises(fp.FeatpatchError, match="expected a prompt of this pair"):
        steered_logits(bridge.model, tokens[:, :-1], {FEATURE: 5.0}, saes=sae, positions=["pieces"], pair=pair)
    assert np.isfinite(found.numpy()).all()
