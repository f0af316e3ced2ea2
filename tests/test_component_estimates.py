"""Estimates of components: against hooks and autograd, finite differences, exact patches where they must agree, definitions."""

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES, HOOKED
from constructed import LAST, and_gate, cancelling, or_gate
from small import Small, standard
from test_components import ARCHITECTURES, CLEAN, CORRECT, CORRUPTED, WRONG, pairs_of

import featpatch as fp

NAMES = ["resid_pre", "resid_mid", "attn_out", "mlp_out", "z", "result", "q", "k", "v", "pattern", "pattern_entry", "neurons"]
HOOKS = {
    "resid_pre": "hook_resid_pre", "resid_mid": "hook_resid_mid", "attn_out": "hook_attn_out", "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z", "result": "attn.hook_z", "q": "attn.hook_q", "k": "attn.hook_k", "v": "attn.hook_v",
    "pattern": "attn.hook_pattern", "pattern_entry": "attn.hook_pattern", "neurons": "mlp.hook_post",
}  # fmt: skip

Hooks = tuple[tuple[str, Callable[..., Any]], ...]
STEPS = {"ig": 2, "eap_ig_inputs": 2}


def estimated(
    model: Any, *, method: str = "atp", steps: int | None = None, qk_fix: bool = True, gradients: Any = None, **options: Any
) -> fp.Effects:
    pairs = pairs_of(CLEAN, CORRUPTED)
    gradients = gradients or fp.Gradients(model, pairs, method=method, steps=steps, qk_fix=qk_fix)
    return fp.rank_components(model, pairs, method=gradients, progress=False, **options)


def runs(slot: int, direction: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Base and source."""
    both = CORRUPTED[[slot]], CLEAN[[slot]]
    return both if direction == "denoising" else both[::-1]


def gradient(model: Any, tokens: torch.Tensor, site: str, slot: int, extra: Hooks = ()) -> torch.Tensor:
    return _gradient(model, tuple(tokens[0].tolist()), site, slot, extra)


@lru_cache(maxsize=64)
def _gradient(model: Any, tokens: tuple[int, ...], site: str, slot: int, extra: Hooks) -> torch.Tensor:
    """d metric / d activation at a hook, by a leaf that other hooks come before."""
    leaves: list[torch.Tensor] = []

    def leaf(x: torch.Tensor, hook: Any) -> torch.Tensor:
        leaves.append(torch.zeros_like(x, requires_grad=True))
        return x + leaves[0]

    carrier = site.replace("resid_mid", "attn_out") if hasattr(model, "original_model") else site
    logits = model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=[*extra, (carrier, leaf)])
    (found,) = torch.autograd.grad(logits[0, -1, CORRECT[slot]] - logits[0, -1, WRONG[slot]], leaves, allow_unused=True)
    return torch.zeros_like(leaves[0][0]) if found is None else found[0].detach()


def part(x: torch.Tensor, node: fp.Node, name: str) -> torch.Tensor:
    """What of an activation (without batch) belongs to a node."""
    if name.startswith("pattern"):
        at, _, source = str(node.position).partition(" <- ")
        rows = x[node.index] if at == "all" else x[node.index, int(at)]
        return rows[..., int(source)] if source else rows
    rows = x if node.position == "all" else x[node.position]
    return rows if node.kind == "activation" else rows[..., node.index] if name == "neurons" else rows[..., node.index, :]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("positions", ["all", [2, 5]])
def test_change_times_gradient(small: Small, name: str, positions: Any) -> None:
    """The rows of `rank_components`, with a product each."""
    if name == "pattern_entry" and positions == "all":
        pytest.skip("entries have single positions")
    effects = estimated(small.model, sites=name, positions=positions, qk_fix=False)
    exact = fp.rank_components(small.model, pairs_of(CLEAN, CORRUPTED), sites=name, positions=positions, progress=False)
    key = [(node.site, node.kind, node.index, node.position) for node in exact.nodes]
    assert {(node.site, node.kind, node.index, node.position) for node in effects.nodes} == set(key)
    for entry in range(0, len(effects.row), max(1, len(effects.row) // 24)):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        site = f"blocks.{node.site.split('.')[1]}.{HOOKS[name]}"
        for direction, found in (
            ("denoising", effects.denoised[entry] - effects.corrupted[slot]),
            ("noising", effects.noised[entry] - effects.clean[slot]),
        ):
            base, source = runs(slot, direction)
            change = oracle.activations(small.model, source)[site] - oracle.activations(small.model, base)[site]
            product = change[0] * gradient(small.model, base, site, slot)
            assert found == pytest.approx(float(part(product, node, name).sum()), abs=1e-9), (node, direction)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("architecture", ["bridge llama", "bridge gemma2", "bridge neox", "hooked llama", "hooked gemma2"])
@pytest.mark.parametrize("name", ["q", "k", "v", "z", "pattern", "neurons"])
def test_a_small_step_of_other_architectures(architecture: str, name: str) -> None:
    model = ARCHITECTURES[architecture]()
    effects = estimated(model, sites=name, positions=[2], layers=[1], qk_fix=False)
    site = f"blocks.1.{HOOKS[name]}"
    entries = np.flatnonzero(effects.pair == 1)
    assert len(entries)
    for entry in entries[::5]:
        node, (base, source) = effects.nodes[effects.row[entry]], runs(1, "noising")
        old, other = (oracle.activations(model, run)[site] for run in (base, source))
        step = torch.zeros_like(old)
        part(step[0], node, name).copy_(1e-4 * part((other - old)[0], node, name))
        with torch.no_grad():
            up, down = (
                oracle.logit_diff(
                    model.run_with_hooks(base, fwd_hooks=[(site, lambda x, hook, move=s * step: x + move)]), *answers(1)
                )
                for s in (1, -1)
            )
        found = effects.noised[entry] - effects.clean[1]
        assert found == pytest.approx((up - down) / 2e-4, rel=1e-4, abs=1e-7), node


def answers(slot: int) -> tuple[int, int]:
    return int(CORRECT[slot]), int(WRONG[slot])


@pytest.mark.parametrize("name", ["q", "k"])
@pytest.mark.parametrize("positions", ["all", "each"])
def test_the_qk_fix_is_exact_where_the_head_is_linear_behind_its_pattern(name: str, positions: str) -> None:
    """No norm, no MLP, last block: single queries and single keys are what patched runs say; plain gradients are not."""
    torch.manual_seed(0)
    model = HOOKED["attention only"]()
    model.cfg.normalization_type, model.ln_final = None, torch.nn.Identity()
    exact = fp.rank_components(model, pairs_of(CLEAN, CORRUPTED), sites=name, layers=[2], positions=positions, progress=False)
    fixed, plain = (estimated(model, sites=name, layers=[2], positions=positions, qk_fix=fix) for fix in (True, False))
    assert set(fixed.nodes) == set(exact.nodes) == set(plain.nodes)
    for effect in ("recovery", "degradation"):
        truth, one, other = (dict(zip(t.nodes, t.pooled(effect), strict=True)) for t in (exact, fixed, plain))
        assert one == pytest.approx(truth, abs=1e-9)
        assert other != pytest.approx(truth, abs=1e-3)


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("architecture", ["bridge gpt2", "bridge llama", "bridge gemma2", "hooked neox", "hooked llama"])
@pytest.mark.parametrize("name", ["q", "k"])
def test_the_qk_fix_by_hooks(architecture: str, name: str) -> None:
    """One head's query or key exchanged in a run of the whole model, what it changes of z times the gradient there."""
    model = ARCHITECTURES[architecture]()
    for positions in ("all", [2, 5]):
        effects = estimated(model, sites=name, layers=[1], positions=positions)
        for entry in range(0, len(effects.row), max(1, len(effects.row) // 5)):
            node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
            for direction, found in (
                ("denoising", effects.denoised[entry] - effects.corrupted[slot]),
                ("noising", effects.noised[entry] - effects.clean[slot]),
            ):
                base, source = runs(slot, direction)
                new = oracle.activations(model, source)[node.site]
                z: list[torch.Tensor] = []

                def exchange(x: torch.Tensor, hook: Any, node: fp.Node = node, new: torch.Tensor = new) -> torch.Tensor:
                    x = x.clone()
                    part(x[0], node, "q").copy_(part(new[0], node, "q"))
                    return x

                with torch.no_grad():
                    model.run_with_hooks(
                        base, fwd_hooks=[(node.site, exchange), ("blocks.1.attn.hook_z", lambda x, hook, z=z: z.append(x) or x)]
                    )
                change = z[0] - oracle.activations(model, base)["blocks.1.attn.hook_z"]
                expected = float((change[0] * gradient(model, base, "blocks.1.attn.hook_z", slot)).sum())
                assert found == pytest.approx(expected, abs=1e-9), (node, direction)


@cache
def dropped(layer: int) -> Hooks:
    """Hooks behind which a block's attention and MLP pass no gradient on."""
    return tuple((f"blocks.{layer}.{hook}", lambda x, hook: x.detach()) for hook in ("hook_attn_out", "hook_mlp_out"))


@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "mlp_out", "z", "v"])
def test_grad_drop_is_its_definition(small: Small, name: str) -> None:
    """Sum over blocks of |change . gradient with that block dropped| / (blocks - 1); 0 where a node's own block is dropped."""
    effects = estimated(small.model, sites=name, method="grad_drop", positions=[2])
    assert effects.metadata["unsigned"]
    sign = np.sign(effects.gap.sum())
    for entry in range(0, len(effects.row), max(1, len(effects.row) // 12)):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        layer, site = int(node.site.split(".")[1]), f"blocks.{node.site.split('.')[1]}.{HOOKS[name]}"
        for direction, found in (
            ("denoising", effects.denoised[entry] - effects.corrupted[slot]),
            ("noising", effects.clean[slot] - effects.noised[entry]),
        ):
            base, source = runs(slot, direction)
            change = (oracle.activations(small.model, source)[site] - oracle.activations(small.model, base)[site])[0]
            total = 0.0
            for block in range(3):
                hooks = dropped(block)
                if block == layer and name == "mlp_out":
                    continue
                products = change * gradient(small.model, base, site, slot, hooks)
                total += abs(float(part(products, node, name).sum()))
            assert found * sign == pytest.approx(total / 2, abs=1e-9), (node, direction)


def test_grad_drop_finds_effects_that_cancel() -> None:
    """A head whose direct path and whose path through the next block cancel in the gradient, and not in a patched run."""
    built = cancelling()
    pairs = fp.Pairs.from_tokens(built.clean, built.corrupted, built.correct, built.wrong)
    options: dict[str, Any] = {"sites": "z", "layers": [0], "positions": [LAST], "progress": False}
    plain, dropped = (fp.rank_components(built.model, pairs, method=m, **options) for m in ("atp", "grad_drop"))
    exact = fp.rank_components(built.model, pairs, **options)
    head = [float(t.where(index=0).pooled("recovery")[0]) for t in (plain, dropped, exact)]
    assert head == [pytest.approx(0, abs=1e-9), pytest.approx(2, abs=1e-9), pytest.approx(1, abs=1e-9)]


def test_eap_ig_inputs_is_the_naive_rule(small: Small) -> None:
    """Gradients averaged while the stream that enters the model goes from base to source."""
    effects = estimated(small.model, sites=["z", "resid_pre"], method="eap_ig_inputs", steps=3, positions=[2])
    first = "blocks.0.hook_resid_pre"

    @cache
    def entering(slot: int, share: float) -> Hooks:
        base, source = runs(slot, "denoising")
        moved = oracle.activations(small.model, source)[first] - oracle.activations(small.model, base)[first]
        return ((first, lambda x, hook: x + share * moved),)

    for entry in range(0, len(effects.row), 5):
        node, slot = effects.nodes[effects.row[entry]], int(effects.pair[entry])
        name = "resid_pre" if node.kind == "activation" else "z"
        base, source = runs(slot, "denoising")
        change = (oracle.activations(small.model, source)[node.site] - oracle.activations(small.model, base)[node.site])[0]
        mean = sum(gradient(small.model, base, node.site, slot, entering(slot, share)) for share in (1 / 6, 3 / 6, 5 / 6)) / 3
        found = effects.denoised[entry] - effects.corrupted[slot]
        assert found == pytest.approx(float(part(change * mean, node, name).sum()), abs=1e-9), node
    residuals = [estimated(small.model, method="eap_ig_inputs", steps=n).metadata["whole_residual"] for n in (2, 40)]
    assert residuals[1] < residuals[0] / 20


def test_whole_residual_is_how_far_the_model_is_from_linear(small: Small) -> None:
    effects = estimated(small.model, sites="resid_pre", layers=[0])
    change = np.abs(effects.per_pair("recovery")[0] - 1) * np.abs(effects.gap)
    back = np.abs(effects.per_pair("degradation")[0] - 1) * np.abs(effects.gap)
    assert effects.metadata["whole_residual"] == pytest.approx(max(change.max(), back.max()) / abs(effects.gap.mean()))
    assert estimated(small.model, method="grad_drop").metadata["whole_residual"] is None


@pytest.mark.extended
def test_the_whole_residual_of_patterns_vanishes_with_the_steps(small: Small) -> None:
    """Along the line of a pattern, whose heads come first, the integral is what a patched run says."""
    few, many = (
        estimated(small.model, sites="pattern", method="ig", steps=steps).metadata["whole_residual"] for steps in (2, 40)
    )
    assert many < 1e-3
    assert many < few / 20


def test_gates() -> None:
    """Where both inputs of a gate are on or off its gradient is flat; along the line it is not."""
    for build, effect in ((or_gate, "degradation"), (and_gate, "recovery")):
        built = build()
        pairs = fp.Pairs.from_tokens(built.clean, built.corrupted, built.correct, built.wrong)
        options: dict[str, Any] = {"sites": "attn_out", "positions": [LAST], "progress": False}
        flat, along = (
            fp.rank_components(
                built.model,
                pairs,
                method=fp.Gradients(built.model, pairs, method=m, steps=20 if m == "ig" else None),
                **options,
            )
            for m in ("atp", "ig")
        )
        found = [float(table.pooled(effect)[0]) for table in (flat, along)]
        assert found == [pytest.approx(0, abs=1e-9), pytest.approx(1, abs=0.06)]


def test_kept_gradients_cost_no_run(small: Small) -> None:
    """Other positions, other directions, another dictionary at a hook that was run: no call of the model."""
    calls: list[int] = []
    pairs = pairs_of(CLEAN, CORRUPTED)
    site = "blocks.1.hook_resid_pre"
    gradients = fp.Gradients(small.model, pairs)
    with_kept: dict[str, Any] = {"method": gradients, "progress": False}
    first = fp.rank_features(small.model, standard(site, 1), pairs, **with_kept)
    fp.rank_components(small.model, pairs, sites="resid_pre", layers=[0], **with_kept)
    another = standard(site, 2)
    wanted = fp.rank_features(small.model, another, pairs, method="atp", positions=[2], progress=False)
    block = small.model.blocks[1]  # a hook at a hook point would be another state of the model
    handle = block.register_forward_hook(lambda _module, _args, x: calls.append((x[0] if isinstance(x, tuple) else x).shape[1]))
    try:
        found = fp.rank_features(small.model, another, pairs, positions=[2], **with_kept)
        again = fp.rank_features(small.model, standard(site, 1), pairs, directions=["noising"], **with_kept)
        assert not [length for length in calls if length > 1]
        fp.rank_components(small.model, pairs, sites="mlp_out", **with_kept)
    finally:
        handle.remove()
    assert CLEAN.shape[1] in calls
    assert found.nodes == wanted.nodes
    np.testing.assert_allclose(found.denoised, wanted.denoised, atol=1e-12)
    np.testing.assert_array_equal(again.noised, first.noised)


def test_kept_gradients_of_another_state_are_taken_anew(small: Small) -> None:
    """Changed weights, then a hook."""
    gradients = fp.Gradients(small.model, pairs_of(CLEAN, CORRUPTED))
    weights = next(small.model.blocks[2].mlp.parameters())
    before = estimated(small.model, sites="mlp_out", gradients=gradients)
    try:
        with torch.no_grad():
            weights *= 1.5
        for _ in range(2):
            kept, fresh = (estimated(small.model, sites="mlp_out", gradients=g) for g in (gradients, None))
            assert not np.array_equal(kept.denoised, before.denoised)
            np.testing.assert_allclose(kept.denoised, fresh.denoised, atol=1e-12)
            before = kept
            small.model.hook_dict["blocks.1.hook_mlp_out"].add_hook(lambda x, hook: 0.5 * x)
    finally:
        small.model.reset_hooks()
        with torch.no_grad():
            weights /= 1.5


@pytest.mark.parametrize("method", ["ig", "eap_ig_inputs", "grad_drop"])
def test_kept_gradients_are_the_same_gradients(small: Small, method: str) -> None:
    """Whatever was asked for before."""
    options: dict[str, Any] = {"method": method, "steps": STEPS.get(method), "positions": [2]}
    gradients = fp.Gradients(small.model, pairs_of(CLEAN, CORRUPTED), method=method, steps=STEPS.get(method))
    estimated(small.model, sites="resid_pre", gradients=gradients)
    for name in ("z", "resid_pre", "neurons"):
        kept, fresh = (
            estimated(small.model, sites=name, gradients=gradients, positions=[2]),
            estimated(small.model, sites=name, **options),
        )
        assert kept.nodes == fresh.nodes
        np.testing.assert_allclose([kept.denoised, kept.noised], [fresh.denoised, fresh.noised], atol=1e-11)
        assert kept.metadata["method"] == method


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode])
def test_whatever_the_mode_of_autograd(small: Small, grad: Any) -> None:
    """With gradients switched off around the call, and with frozen weights; the modes are left as they were."""
    names = ["q", "k", "z", "pattern", "neurons"]
    expected = [
        estimated(small.model, sites=names, layers=[1], method=method, steps=STEPS.get(method))
        for method in ("atp", "ig", "grad_drop")
    ]
    small.model.requires_grad_(False)
    try:
        with grad():
            found = [
                estimated(small.model, sites=names, layers=[1], method=method, steps=STEPS.get(method))
                for method in ("atp", "ig", "grad_drop")
            ]
            assert not torch.is_grad_enabled()
    finally:
        small.model.requires_grad_(True)
    for one, other in zip(found, expected, strict=True):
        assert one.nodes == other.nodes
        np.testing.assert_allclose([one.denoised, one.noised], [other.denoised, other.noised], atol=1e-12)


@pytest.mark.filterwarnings("ignore::featpatch.SlowPathWarning")
def test_hooks_that_write_in_place_are_hooks(small: Small) -> None:
    """The usual way to ablate: estimates and exact effects are those of the same hook written out of place."""
    point = small.model.hook_dict["blocks.1.hook_resid_pre"]

    def in_place(x: torch.Tensor, hook: Any) -> torch.Tensor:
        x[:, :, :8] *= 0.5
        return x

    def anew(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([x[:, :, :8] * 0.5, x[:, :, 8:]], dim=2)

    tables = []
    for hook in (in_place, anew):
        point.add_hook(hook)
        sae = standard("blocks.0.hook_resid_post", 3)
        try:
            tables.append(
                (
                    fp.rank_features(small.model, sae, pairs_of(CLEAN, CORRUPTED), method="atp", progress=False),
                    estimated(small.model, sites=["q", "k"], layers=[1], positions=[2, 5]),
                    fp.rank_components(small.model, pairs_of(CLEAN, CORRUPTED), sites="resid_pre", layers=[1], progress=False),
                )
            )
        finally:
            small.model.reset_hooks()
    for one, other in zip(*tables, strict=True):
        assert one.nodes == other.nodes
        np.testing.assert_allclose([one.denoised, one.noised], [other.denoised, other.noised], atol=1e-10)


def test_what_cannot_be_compared_is_refused(small: Small) -> None:
    site, pairs = "blocks.1.hook_resid_pre", pairs_of(CLEAN, CORRUPTED)
    estimate = fp.rank_features(small.model, standard(site, 1), pairs, method="atp", progress=False)
    exact = fp.rank_features(small.model, standard(site, 1), pairs, progress=False)
    other = fp.rank_features(small.model, standard(site, 2), pairs, progress=False)
    for tables, message in (
        ((estimate.of_pairs([0]), exact), "of_pairs is"),
        ((estimate, other), "has different weights in the two tables"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.calibrate(*tables)
    part = fp.calibrate(estimate.top(2), exact.top(3))
    assert list(part.nodes) == list(exact.top(3).nodes)
    known = dict(zip(estimate.nodes, estimate.pooled("recovery"), strict=True))
    assert part.estimate.tolist() == [known[node] for node in part.nodes]
    for metric, message in (
        (lambda l, c, w: l[:, c[0]] * float("nan"), "NaN or an infinite value"),
        (lambda l, c, w: l[:, list(c)], "one real value per row"),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.Gradients(small.model, pairs, metric=metric).of([], [site]).__next__()


def test_calibration_of_sizes_without_sign(small: Small) -> None:
    options: dict[str, Any] = {"sites": "z", "progress": False}
    exact = fp.rank_components(small.model, pairs_of(CLEAN, CORRUPTED), **options)
    found = fp.calibrate(estimated(small.model, sites="z", method="grad_drop"), exact)
    assert sorted(found.exact) == pytest.approx(sorted(np.abs(exact.pooled("recovery"))))
    assert np.isnan(found.table(3)["signs"]).all()


@pytest.mark.parametrize("method", ["atp", "ig", "eap_ig_inputs", "grad_drop"])
def test_batched_is_alone(small: Small, method: str) -> None:
    """Pairs of other lengths and answers in between change nothing."""
    prompts = [
        (CLEAN[0].tolist(), CORRUPTED[0].tolist()),
        ([1, 2, 3, 4], [1, 5, 3, 4]),
        (CLEAN[1].tolist(), CORRUPTED[1].tolist()),
    ]
    pairs = fp.Pairs(tuple(fp.Pair(tuple(c), tuple(k), (6 + i,), (4,)) for i, (c, k) in enumerate(prompts)))
    options: dict[str, Any] = {"sites": ["z", "q", "k"], "positions": [1, 2], "progress": False}

    def found(of: fp.Pairs) -> fp.Effects:
        return fp.rank_components(
            small.model, of, method=fp.Gradients(small.model, of, method=method, steps=STEPS.get(method)), **options
        )

    together = found(pairs)
    for slot in range(3):
        alone = found(pairs[slot : slot + 1])
        part = together.of_pairs([slot])
        assert set(part.nodes) == set(alone.nodes)
        one, other = (dict(zip(t.nodes, t.pooled("recovery"), strict=True)) for t in (part, alone))
        scale = 1 if method != "grad_drop" else np.sign(together.gap.sum()) * np.sign(alone.gap.sum())
        assert {node: value * scale for node, value in one.items()} == pytest.approx(other, abs=1e-9)


def test_errors(small: Small) -> None:
    pairs, model = pairs_of(CLEAN, CORRUPTED), small.model
    far = fp.Pairs((fp.Pair((1, 2), (1, 77), (3,), (4,)),))
    for call, message in (
        (lambda: fp.Gradients(model, far), "pair 0 has token ids from 1 to 77"),
        (lambda: fp.rank_components(model, far, method="atp"), "pair 0 has token ids"),
        (lambda: fp.rank_components(model, pairs[:1], method=fp.Gradients(model, pairs)), "belong to another model or other"),
        (lambda: fp.rank_components(small_other(), pairs, method=fp.Gradients(model, pairs)), "belong to another model or"),
        (lambda: estimated(model, sites="heads"), "sites=\\['heads'\\]: expected some of"),
        (lambda: estimated(model, layers=[7]), "layers=\\[7\\]: expected some of 0 to 2"),
        (lambda: estimated(model, sites="pattern_entry"), "positions='all' with sites"),
        (lambda: fp.rank_components(and_gate().model, gate_pairs(), method="grad_drop"), "the model has one layer"),
        (lambda: fp.Gradients(model, pairs, method="shap"), "expected one of atp, ig, eap_ig_inputs, grad_drop"),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=message):
            call()


def small_other() -> Any:
    return BRIDGES["gpt2"]()


def gate_pairs() -> fp.Pairs:
    built = and_gate()
    return fp.Pairs.from_tokens(built.clean, built.corrupted, built.correct, built.wrong)
