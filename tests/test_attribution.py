"""Gradient estimates: of other architectures, beside exact effects, and where they fail; see test_properties.py for their laws."""

from typing import Any

import numpy as np
import oracle
import pytest
import torch
from architectures import BRIDGES, HOOKED
from constructed import LAST, and_gate, or_gate
from small import Small
from test_sets import dictionary

import featpatch as fp
from featpatch.attribution.calibration import Calibration
from featpatch.attribution.estimates import Estimates, collected

SITE = "blocks.1.hook_resid_pre"


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


def estimated(
    small: Small, saes: Any, *, method: str = "atp", steps: int | None = None, metric: Any = "logit_diff", **options: Any
) -> fp.Effects:
    gradients = fp.Gradients(small.model, pairs_of(small), method=method, steps=steps, metric=metric)
    return fp.rank_features(small.model, saes, pairs_of(small), method=gradients, progress=False, **options)


@pytest.mark.parametrize("kind", ["standard", "topk", "z", "nonlinear"])
def test_features_and_error_add_up_to_the_site(small: Small, kind: str) -> None:
    effects = estimated(small, dictionary(small, kind), positions="each")
    assert effects.metadata["completeness_residual"] < 1e-9
    exact = fp.rank_features(small.model, dictionary(small, kind), pairs_of(small), positions="each", progress=False)
    assert set(effects.nodes) == set(exact.nodes)
    np.testing.assert_allclose(effects.clean, exact.clean, atol=1e-10)


def test_a_decoder_with_a_state_leaves_a_residual(small: Small) -> None:
    """Features times the change of the token's norm belong to neither."""
    assert estimated(small, dictionary(small, "normalising")).metadata["completeness_residual"] > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2", "neox"])
def test_gradients_reach_the_sites_of_other_architectures(name: str) -> None:
    """A small step at each site changes the metric by the gradient."""
    for model in (BRIDGES[name](), HOOKED[name]()):
        clean, corrupted = torch.tensor([[11, 12, 13, 14, 15]]), torch.tensor([[11, 12, 19, 14, 15]])
        pairs = fp.Pairs.from_tokens(clean, corrupted, torch.tensor([13]), torch.tensor([4]))
        for hook in ("hook_resid_pre", "hook_resid_mid", "hook_attn_out", "attn.hook_z", "hook_mlp_out", "hook_resid_post"):
            site = f"blocks.1.{hook}"
            if name == "neox" and hook == "hook_resid_mid":
                continue
            sae = fp.dictionaries.identity(model, site)
            effects = fp.rank_features(model, sae, pairs, method="atp", directions=["denoising"], positions=[3], progress=False)
            old, other = (oracle.activations(model, run)[site] for run in (corrupted, clean))
            step = torch.zeros_like(old)
            step[0, 3] = 1e-4 * (other - old)[0, 3]
            with torch.no_grad():
                up, down = (
                    oracle.logit_diff(oracle.replaced(model, corrupted, site, old, old + s * step), 13, 4) for s in (1, -1)
                )
            found = effects.where(kind="activation").changes("recovery").toarray()[0, 0]
            assert found == pytest.approx((up - down) / 2e-4, rel=2e-2, abs=2e-3), (name, site)


def test_where_gradients_lie_and_integrated_ones_do_not() -> None:
    """An OR gate is flat where both inputs are on, an AND gate where both are off: noising and denoising are missed there."""
    for build, effect in ((or_gate, "degradation"), (and_gate, "recovery")):
        built = build()
        pairs = fp.Pairs.from_tokens(built.clean, built.corrupted, built.correct, built.wrong)
        z = fp.dictionaries.identity(built.model, "blocks.0.attn.hook_z")
        options: dict[str, Any] = {"positions": [LAST], "progress": False}
        flat, along = (
            fp.rank_features(
                built.model,
                z,
                pairs,
                method=fp.Gradients(built.model, pairs, method=m, steps=20 if m == "ig" else None),
                **options,
            )
            for m in ("atp", "ig")
        )
        exact = fp.rank_features(built.model, z, pairs, **options)
        whole = [float(t.where(kind="activation").pooled(effect)[0]) for t in (flat, along, exact)]
        assert whole == [pytest.approx(0, abs=1e-9), pytest.approx(1, abs=0.06), pytest.approx(1, abs=1e-9)]
        calibration = fp.calibrate(flat, exact, effect=effect)
        assert calibration.effect == effect


def test_calibration_by_hand(small: Small) -> None:
    sae = small.at(SITE)
    estimate = estimated(small, sae, positions=[3, 6])
    exact = fp.rank_features(small.model, sae, pairs_of(small), positions=[3, 6], progress=False)
    found = fp.calibrate(estimate, exact)
    assert found.effect == "recovery"
    one, other = (dict(zip(t.nodes, t.pooled("recovery"), strict=True)) for t in (estimate, exact))
    nodes = [node for node in exact.nodes if node.kind == "feature"]
    assert list(found.nodes) == nodes
    x, y = np.array([one[n] for n in nodes]), np.array([other[n] for n in nodes])
    row = found.table(5).iloc[0]
    assert row["pearson"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert row["slope"] == pytest.approx((x * y).sum() / (x * x).sum())
    top = [set(np.argsort(-abs(v))[:5].tolist()) for v in (x, y)]
    assert row["recall"] == len(top[0] & top[1]) / 5
    assert row["signs"] == (np.sign(x) == np.sign(y)).mean()
    worst = found.misses(1).iloc[0]
    assert abs(worst["estimate"] - worst["exact"]) == pytest.approx(abs(x - y).max())
    for call, message in ((lambda: found.table(0), "k=0: expected an integer, 1"), (lambda: found.misses(-1), "n=-1")):
        with pytest.raises(fp.FeatpatchError, match=message):
            call()
    assert "estimate against exact" in repr(found)
    assert len(found.plot().data) == 2
    itself = fp.calibrate(estimate, exact, effect="degradation").table(1000)
    assert np.isnan(itself["recall"]).all()


@pytest.mark.parametrize(("clean", "corrupted", "sign"), [(1.0, -2.0, 1), (-2.0, 1.0, -1), (3.0, 2.0, 1)])
def test_sizes_without_sign_lead_to_the_source(clean: float, corrupted: float, sign: int) -> None:
    found = {0: {way: {fp.Node(SITE, "activation"): 0.5} for way in ("denoising", "noising")}}
    metadata = {"metric": "m", "metrics": ["m"], "directions": ["denoising", "noising"]}
    table = collected("m", np.array([[clean]]), np.array([[corrupted]]), found, metadata, unsigned=True)
    assert (table.denoised[0], table.noised[0]) == (corrupted + sign * 0.5, clean - sign * 0.5)


def test_nothing_found_is_no_column() -> None:
    assert Estimates.of([]).changes.shape == (1, 0)


def test_a_calibration_has_a_row_and_a_colour_per_site() -> None:
    nodes = tuple(fp.Node(SITE, "feature", index, "all", sae) for index, sae in enumerate("aba"))
    found = Calibration(nodes, np.array([1.0, 2.0, 3.0]), np.array([0.5, 4.0, 2.5]), "recovery")
    one, other, line = found.plot().data
    assert (one.name, list(one.x), list(one.y), list(one.text)) == ("a", [1, 3], [0.5, 2.5], [str(nodes[0]), str(nodes[2])])
    assert (other.name, list(other.x), list(other.y)) == ("b", [2], [4])
    assert list(line.x) == list(line.y) == [0.5, 4]
    table = found.table(1)
    assert [*table["site"], *table["rows"]] == ["all", "a", "b", 3, 2, 1]
    assert list(table["slope"]) == pytest.approx([(0.5 + 8 + 7.5) / 14, (0.5 + 7.5) / 10, 2])
    assert table["recall"].tolist()[:2] == [0, 1]
    assert np.isnan(table["recall"][2])


def test_errors(small: Small) -> None:
    sae, pairs, model = small.at(SITE), pairs_of(small), small.model
    estimate = estimated(small, sae, directions=["denoising"])
    exact = fp.rank_features(model, sae, pairs, progress=False)
    long = fp.Pair((1, 2), (1, 3), (), (), correct_sequences=((3, 5),), wrong_sequences=((4,),))
    for call, message in (
        (lambda: estimated(small, sae, method="shap"), "method='shap': expected one of atp, ig, eap_ig_inputs, grad_drop"),
        (lambda: estimated(small, sae, method="ig", steps=0), "steps=0: expected an integer, 1 or more"),
        (lambda: estimated(small, sae, metric="neg_kl"), "is zero at the clean run, .* use directions=\\['denoising'\\]"),
        (lambda: estimated(small, sae, metric="neg_kl", method="grad_drop"), "'grad_drop' and directions=\\['denoising', 'noising'\\]"),
        (lambda: estimated(small, sae, metric="neg_rank"), "'neg_rank' is not supported for estimates.*log_prob, neg_kl, or a function"),
        (lambda: estimated(small, sae, metric="sequence_log_prob"), "'sequence_log_prob' is not supported for estimates"),
        (lambda: estimated(small, sae, metric=lambda x, c, w: -(x > x[:, c]).sum(-1)), "ranks and accuracies are not"),
        (lambda: fp.rank_features(model, sae, fp.Pairs((long,)), method="atp", progress=False), "have several tokens, and logit_diff reads one"),
        (lambda: estimated(small, sae, directions=[]), "expected 'denoising', 'noising' or both"),
        (lambda: fp.calibrate(exact, estimate), "the first table holds exact effects and the second estimate effects"),
        (lambda: fp.calibrate(estimate, exact, effect="degradation"), "expected an effect that both tables hold"),
        (lambda: fp.calibrate(estimate, fp.rank_features(model, sae, pairs[:2], progress=False)), "pairs is"),
        (lambda: fp.calibrate(estimate, fp.rank_components(model, pairs, sites="z", progress=False)), "the exact effects of head"),
        (lambda: fp.calibrate(estimate, fp.rank_features(model, sae, pairs, metric="prob", progress=False)), "metric is"),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=message):
            call()


def test_nothing_is_left_behind(small: Small, tmp_path: Any) -> None:
    before = {name: parameter.grad for name, parameter in small.model.named_parameters()}
    effects = estimated(small, small.at(SITE), metric="prob")
    assert not any(point.fwd_hooks for point in small.model.hook_dict.values())
    assert {name: parameter.grad for name, parameter in small.model.named_parameters()} == before
    again = fp.Effects.load(effects.save(tmp_path / "estimate.safetensors"))
    assert again.value == "estimate"
    assert set(again.to_pandas()["value"]) == {"estimate"}


def neg_kl(logits: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
    """Written out: minus the sum of p (log p - log q)."""
    p, q = clean.exp() / clean.exp().sum(), logits.exp() / logits.exp().sum()
    return -(p * (p.log() - q.log())).sum()


def moved_gradient(small: Small, slot: int, base: str, moved: str, share: float, site: str) -> torch.Tensor:
    """Gradient of `neg_kl` at a site, `[pos, ...]`, while another one, or itself, is a share of the way to the other run."""
    runs = {"clean": small.clean[[slot]], "corrupted": small.corrupted[[slot]]}
    other = "corrupted" if base == "clean" else "clean"
    change = oracle.activations(small.model, runs[other])[moved] - oracle.activations(small.model, runs[base])[moved]
    leaves: list[torch.Tensor] = []

    def leaf(x: torch.Tensor, hook: Any) -> torch.Tensor:
        leaves.append(torch.zeros_like(x, requires_grad=True))
        return x + leaves[0]

    with torch.no_grad():
        clean = small.model(runs["clean"])[0, -1]
    logits = small.model.run_with_hooks(runs[base], fwd_hooks=[(moved, lambda x, hook: x + share * change), (site, leaf)])
    (found,) = torch.autograd.grad(neg_kl(logits[0, -1], clean), leaves)
    return found[0]


@pytest.mark.parametrize("method", ["ig", "eap_ig_inputs", "atp"])
def test_the_divergence_along_the_way(small: Small, method: str) -> None:
    """By a plain loop over points and heads; the gradient is zero at the clean run alone, where nothing is taken."""
    site, steps = "blocks.1.attn.hook_z", 1 if method == "atp" else 3
    moved, ways = "blocks.0.hook_resid_pre" if method == "eap_ig_inputs" else site, ["denoising", "noising"]
    effects = fp.rank_components(small.model, pairs_of(small), method=fp.Gradients(small.model, pairs_of(small), method=method, steps=None if method == "atp" else steps, metric="neg_kl"), sites="z", layers=[1], positions=[3, 6], directions=ways[:1] if method == "atp" else ways, progress=False)  # fmt: skip
    assert (np.abs(effects.clean) < 1e-12).all()
    for way, values, base in (("denoising", effects.denoised, "corrupted"), ("noising", effects.noised, "clean")):
        if way == "noising" and method == "atp":
            continue
        unpatched = getattr(effects, base)
        for slot in range(3):
            shares = [0.0] if method == "atp" else [(step + 0.5) / steps for step in range(steps)]
            g = torch.stack([moved_gradient(small, slot, base, moved, share, site) for share in shares]).mean(0)
            runs = small.clean[[slot]], small.corrupted[[slot]]
            clean, corrupted = (oracle.activations(small.model, run)[site][0] for run in runs)
            product = ((clean - corrupted if way == "denoising" else corrupted - clean) * g).sum(-1)
            for entry in np.flatnonzero(effects.pair == slot):
                node = effects.nodes[effects.row[entry]]
                expected = float(product[node.position, node.index])
                assert values[entry] - unpatched[slot] == pytest.approx(expected, abs=1e-9), (node, way)
    assert np.abs(effects.denoised - effects.corrupted[effects.pair]).max() > 1e-3


def test_the_divergence_of_features_and_the_screen(small: Small) -> None:
    """Small steps of features at the corrupted run; a screened sweep asks for the same directions."""
    sae = small.at(SITE)
    options: dict[str, Any] = {"metric": "neg_kl", "directions": ["denoising"], "positions": [3], "progress": False}
    effects = fp.rank_features(small.model, sae, pairs_of(small), method="atp", **options)
    for entry in np.flatnonzero(effects.pair == 1)[:6]:
        node = effects.nodes[effects.row[entry]]
        if node.kind != "feature":
            continue
        runs = small.clean[[1]], small.corrupted[[1]]
        clean, corrupted = (oracle.activations(small.model, run)[SITE] for run in runs)
        change = (sae.encode(clean) - sae.encode(corrupted))[0, 3, node.index]
        values = []
        for share in (1e-4, -1e-4):
            new = corrupted.clone()
            new[0, 3] += share * change * sae.W_dec[node.index]
            with torch.no_grad():
                logits = oracle.replaced(small.model, small.corrupted[[1]], SITE, corrupted, new)[0, -1]
                values.append(float(neg_kl(logits, small.model(small.clean[[1]])[0, -1])))
        slope = (values[0] - values[1]) / 2e-4
        assert effects.denoised[entry] - effects.corrupted[1] == pytest.approx(slope, rel=1e-5, abs=1e-9)
    screened = fp.rank_features(small.model, sae, pairs_of(small), screen=fp.Screen(k=5, audit=5), **options)
    exact = fp.rank_features(small.model, sae, pairs_of(small), **options)
    truth = dict(zip(exact.nodes, exact.pooled("recovery"), strict=True))
    assert dict(zip(screened.nodes, screened.pooled("recovery"), strict=True)) == pytest.approx(
        {node: truth[node] for node in screened.nodes}
    )
    with pytest.raises(fp.FeatpatchError, match="is zero at the clean run, .* method='exact'"):
        fp.rank_features(small.model, sae, pairs_of(small), metric="neg_kl", progress=False, screen=fp.Screen())
