"""The laws of the design, in float64, against an oracle that imports nothing of featpatch."""

import subprocess
import sys
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from small import FEATURES, Small, standard
from transformer_lens import HookedTransformer, HookedTransformerConfig

import featpatch as fp

EXACT = 1e-10
SITE = "blocks.1.hook_resid_pre"


def pairs_of(small: Small, slots: slice = slice(None)) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean[slots], small.corrupted[slots], small.correct[slots], small.wrong[slots])


def oracle_value(small: Small, sae: Any, node: fp.Node, slot: int, direction: str) -> float:
    clean, corrupted = small.clean[slot : slot + 1], small.corrupted[slot : slot + 1]
    base, source = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
    positions = list(range(7)) if node.position == "all" else [int(node.position)]
    if node.kind == "activation":
        logits = oracle.patched_activation_logits(small.model, node.site, base, source, positions)
    else:
        features = {"feature": [node.index], "all_features": range(FEATURES), "error": []}[node.kind]
        logits = oracle.patched_logits(
            small.model, sae, base, source, features=list(features), positions=positions, error=node.kind == "error"
        )
    return oracle.logit_diff(logits, int(small.correct[slot]), int(small.wrong[slot]))


@pytest.mark.parametrize("which", range(9))
@pytest.mark.parametrize("positions", ["all", [3, 6]])
def test_every_row_equals_one_hooked_forward_per_patch(small: Small, which: int, positions: Any) -> None:
    """Law 4."""
    sae = small.saes[which]
    effects = fp.rank_features(small.model, sae, pairs_of(small), positions=positions)
    assert len(effects) > FEATURES / 2
    for row, slot, denoised, noised in zip(effects.row, effects.pair, effects.denoised, effects.noised, strict=True):
        node = effects.nodes[row]
        assert abs(denoised - oracle_value(small, sae, node, slot, "denoising")) < EXACT, node
        assert abs(noised - oracle_value(small, sae, node, slot, "noising")) < EXACT, node


def test_rows_that_are_not_stored_have_no_effect(bridge: Small) -> None:
    sae = bridge.at(SITE)
    effects = fp.rank_features(bridge.model, sae, pairs_of(bridge, slice(0, 1)), positions=[3])
    stored = {node.index for node in effects.nodes if node.kind == "feature"}
    missing = sorted(set(range(FEATURES)) - stored)
    assert missing, "the test needs a feature that is the same in both runs"
    for index in missing:
        value = oracle_value(bridge, sae, fp.Node(SITE, "feature", index, 3), 0, "denoising")
        assert abs(value - effects.corrupted[0]) < EXACT


def test_a_label_or_index_that_holds_the_same_token_gives_no_rows(bridge: Small) -> None:
    """Positions before the first difference can't differ in a causal model: skipped, not run."""
    assert len(fp.rank_features(bridge.model, bridge.at(SITE), pairs_of(bridge), positions=[0, 1, 2])) == 0


@pytest.mark.parametrize("which", range(9))
def test_features_and_error_together_are_the_whole_activation(small: Small, which: int) -> None:
    """Laws 1 and 2: by hand through `do`, against plain TransformerLens; an empty change leaves every bit."""
    sae = small.saes[which]
    site = sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name
    clean, corrupted = small.clean[:1], small.corrupted[:1]
    everything = fp.Patch((fp.Node(site, "all_features"), fp.Node(site, "error")))
    with torch.no_grad(), fp.do(small.model, everything, source=clean, base=corrupted, saes=sae):
        together = small.model(corrupted)
    whole = oracle.patched_activation_logits(small.model, site, corrupted, clean, list(range(7)))
    torch.testing.assert_close(together, whole, rtol=0, atol=EXACT)
    with torch.no_grad(), fp.do(small.model, everything, source=corrupted, base=corrupted, saes=sae) as firing:
        assert torch.equal(small.model(corrupted), small.model(corrupted))
        unchanged = small.model(corrupted)
    assert firing.count == 3
    with torch.no_grad():
        assert torch.equal(unchanged, small.model(corrupted))


def test_the_whole_residual_stream_brings_everything_back(small: Small) -> None:
    """Law 3."""
    effects = fp.rank_features(small.model, small.at(SITE), pairs_of(small)).where(kind="activation")
    np.testing.assert_allclose(effects.pooled("recovery"), 1, atol=EXACT)
    np.testing.assert_allclose(effects.pooled("degradation"), 1, atol=EXACT)
    np.testing.assert_allclose(effects.per_pair("recovery"), 1, atol=EXACT)


@pytest.mark.parametrize("rows", [1, 20, 10_000])
def test_batch_order_and_neighbours_change_nothing(small: Small, rows: int) -> None:
    """Law 5."""
    saes = [small.at(SITE), small.at("blocks.1.attn.hook_z")]
    together = fp.rank_features(small.model, saes, pairs_of(small))
    backwards = fp.rank_features(small.model, saes[::-1], pairs_of(small)[::-1], batch_rows=rows)
    alone = [fp.rank_features(small.model, saes, pairs_of(small, slice(k, k + 1)), batch_rows=rows) for k in range(3)]

    def values(effects: fp.Effects, slot: Any) -> dict[Any, Any]:
        return {(effects.nodes[r], slot(p)): (d, n) for r, p, d, n in zip(
            effects.row, effects.pair, effects.denoised, effects.noised, strict=True)}  # fmt: skip

    expected = values(together, lambda p: p)
    separate = {key: value for k, effects in enumerate(alone) for key, value in values(effects, lambda p, k=k: k).items()}
    for others in (values(backwards, lambda p: 2 - p), separate):
        assert others.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(others[key], value, rtol=0, atol=EXACT)


def test_where_the_metric_is_linear_the_gradient_is_exact() -> None:
    """Law 6: without norms the logit difference is linear in the last residual stream: effect = (f_s - f_b) * (d . g)."""
    config = HookedTransformerConfig(
        n_layers=2, d_model=16, n_ctx=16, d_head=4, n_heads=4, d_mlp=32, d_vocab=40, act_fn="relu", dtype=torch.float64,
        seed=2, initializer_range=0.3, normalization_type=None,
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    small = Small(model, [standard("blocks.1.hook_resid_post", 4)])
    sae, site = small.saes[0], "blocks.1.hook_resid_post"
    stream = oracle.activations(model, small.corrupted[:1])[site].clone().requires_grad_()
    logits = model.unembed(stream)
    (gradient,) = torch.autograd.grad(logits[0, -1, 3] - logits[0, -1, 4], stream)
    f_clean, f_corrupted = (sae.encode(oracle.activations(model, t[:1])[site])[0, -1] for t in (small.clean, small.corrupted))
    directions = torch.autograd.functional.jacobian(sae.decode, f_clean).T
    expected = ((f_clean - f_corrupted) * (directions @ gradient[0, -1])).detach()

    effects = fp.rank_features(model, sae, pairs_of(small, slice(0, 1)), positions=[6])
    features = effects.where(kind="feature")
    assert len(features) > 5
    for node, value in zip(features.nodes, features.denoised - effects.corrupted[0], strict=True):
        assert abs(value - float(expected[node.index])) < EXACT
    for effect in ("recovery", "degradation"):
        total = features.pooled(effect).sum() + effects.where(kind="error").pooled(effect).sum()
        assert abs(total - effects.where(kind="activation").pooled(effect)[0]) < EXACT


def test_hooks_are_restored_after_an_exception(small: Small) -> None:
    """Law 7."""

    def broken(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        if len(logits) > 1:
            raise RuntimeError("stop here")
        return logits[:, 0]

    with torch.no_grad():
        before = small.model(small.clean)
    with pytest.raises(RuntimeError, match="stop here"):
        fp.rank_features(small.model, small.saes, pairs_of(small), metric=broken)
    whole = fp.Patch((fp.Node(SITE, "activation"),))
    with pytest.raises(RuntimeError, match="stop here"), fp.do(small.model, whole, source=small.clean, base=small.corrupted):
        raise RuntimeError("stop here")
    assert not any(point.fwd_hooks or point._forward_hooks for point in small.model.hook_dict.values())
    assert all("forward" not in vars(block) and not block._forward_pre_hooks for block in small.model.blocks)
    with torch.no_grad():
        assert torch.equal(before, small.model(small.clean))


def test_hooks_of_the_user_survive(small: Small) -> None:
    calls: list[int] = []
    small.model.hook_dict[SITE].add_hook(lambda activation, hook: calls.append(1))
    try:
        with pytest.warns(fp.SlowPathWarning, match="hooks that you attached"):
            fp.rank_features(small.model, small.at(SITE), pairs_of(small))
        before = len(calls)
        small.model(small.clean)
        assert len(calls) == before + 1
    finally:
        small.model.reset_hooks()


def test_importing_changes_nothing_global() -> None:
    """Law 7: whatever torch, numpy and warnings are set to after the foreign libraries came in, ours leaves."""
    program = """
import warnings, torch, numpy, logging, sae_lens, transformer_lens, scipy.stats, pandas
from tqdm.auto import tqdm
state = lambda: (torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), torch.initial_seed(),
                 list(warnings.filters), numpy.geterr(), logging.root.level, list(logging.root.handlers))
before = state()
import featpatch
assert state() == before
"""
    subprocess.run([sys.executable, "-c", program], check=True)
