"""Ablation and attribution on prompts without a counterfactual, and refusals by everything that needs one."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from small import Small
from transformer_lens import HookedTransformer, HookedTransformerConfig

import featpatch as fp
from featpatch.effects.plots import Plots
from featpatch.reporting.terminal import ranked

SITE, Z = "blocks.1.hook_resid_pre", "blocks.1.attn.hook_z"


def prompts_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, correct=small.correct, wrong=small.wrong)


def ablated(small: Small, **options: Any) -> fp.Effects:
    return fp.ablate(small.model, prompts_of(small), progress=False, **{"to": "zero", **options})


def test_effects_are_changes_in_units_of_the_metric(small: Small, tmp_path: Path) -> None:
    effects = ablated(small, sites="z", layers=[1], positions=[6], metric=["logit", "log_prob"])
    for table, read in ((effects, lambda logits, token: logits[token]),
                        (effects.for_metric("log_prob"), lambda logits, token: logits.log_softmax(-1)[token])):  # fmt: skip
        change = np.zeros((4, 3))
        for slot in range(3):
            tokens, token = small.clean[[slot]], int(small.correct[slot])
            old = oracle.activations(small.model, tokens)[Z]
            with torch.no_grad():
                clean = read(small.model(tokens)[0, -1], token)
                for head in range(4):
                    new = old.clone()
                    new[0, 6, head] = 0
                    change[head, slot] = clean - read(oracle.replaced(small.model, tokens, Z, old, new)[0, -1], token)
        assert [node.index for node in table.nodes] == [0, 1, 2, 3]
        np.testing.assert_allclose(table.pooled("degradation"), change.mean(1), atol=1e-9)
        np.testing.assert_allclose(table.pooled("degradation", over="changed"), change.mean(1), atol=1e-9)
        np.testing.assert_allclose(table.per_pair("degradation"), change, atol=1e-9)
        low, high = table.interval("degradation").T
        assert (low <= change.mean(1)).all()
        assert (change.mean(1) <= high).all()
    assert (effects.unit, effects.for_metric("log_prob").unit) == ("of logit", "of log_prob")
    again = fp.Effects.load(effects.save(tmp_path / "effects.safetensors"))
    assert again.unit == "of logit"
    np.testing.assert_array_equal(again.pooled("degradation"), effects.pooled("degradation"))
    assert repr(effects).startswith("exact effects over 3 prompts, as changes of logit (clean - ablated)")
    assert set(effects.to_pandas()["unit"]) == {"of logit"}
    assert "pairs_with_gap" not in effects.to_pandas()


def test_with_a_counterfactual_effects_stay_shares_of_the_gap(small: Small) -> None:
    pairs = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    shares = fp.ablate(small.model, pairs, sites="z", layers=[1], to="zero", progress=False)
    changes = ablated(small, sites="z", layers=[1])
    assert (shares.unit, changes.unit) == ("of the gap", "of logit_diff")
    np.testing.assert_allclose(shares.pooled("degradation") * shares.gap.mean(), changes.pooled("degradation"), atol=1e-9)


def test_the_unit_is_shown_wherever_effects_are(small: Small, tmp_path: Path) -> None:
    effects = ablated(small, saes=small.at(SITE), positions=[6])
    assert Plots(effects).sites().layout.yaxis.title.text == "loss of logit_diff"
    assert Plots(effects).heatmap(kind="feature").layout.coloraxis.colorbar.title.text == "loss of logit_diff"
    table = ranked(effects.top(3))
    assert "as changes of logit_diff" in str(table.title)
    assert "loss of logit_diff" in table.columns
    text = fp.report(effects, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "as changes of logit_diff" in text
    assert "fraction of the behaviour" not in text
    assert "recovery" not in text.partition("<script")[0].lower()


@pytest.mark.parametrize("to", ["zero", "mean", 0.7])
def test_estimates_are_the_change_times_the_gradient(small: Small, to: Any) -> None:
    """By autograd, for features, all of them, their error, the whole activation, heads and queries without the fix."""
    sae = small.at(SITE)
    gradients = fp.Gradients(small.model, prompts_of(small), qk_fix=False)
    options: dict[str, Any] = {"saes": sae, "sites": ["z", "q", "neurons"], "layers": [1], "positions": [2, 5], "to": to}
    effects = ablated(small, method=gradients, **options)
    exact = ablated(small, **options)
    assert (effects.value, exact.value) == ("estimate", "exact")
    assert set(effects.nodes) == set(exact.nodes)
    runs = [oracle.activations(small.model, small.clean[[slot]]) for slot in range(3)]

    def value(of: Callable[[dict[str, torch.Tensor]], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        everywhere = torch.cat([of(run) for run in runs]).flatten(0, 1)
        return everywhere.mean(0) if to == "mean" else torch.full_like(like, 0.0 if to == "zero" else to)

    for slot in range(3):
        hooks = sorted({node.site for node in effects.nodes})
        kept: dict[str, torch.Tensor] = {}

        def keep(x: torch.Tensor, hook: Any, name: str, kept: dict[str, torch.Tensor] = kept) -> torch.Tensor:
            kept[name] = x if x.requires_grad else x.detach().requires_grad_()
            kept[name].retain_grad()
            return kept[name]

        logits = small.model.run_with_hooks(
            small.clean[[slot]], fwd_hooks=[(hook, partial(keep, name=hook)) for hook in hooks]
        )[0, -1]
        (logits[small.correct[slot]] - logits[small.wrong[slot]]).backward()
        for entry in np.flatnonzero(effects.pair == slot):
            node = effects.nodes[effects.row[entry]]
            run, p = runs[slot], node.position
            g = kept[node.site].grad[0, p]
            if node.kind in ("activation", "head", "neuron"):
                of = lambda run, site=node.site: run[site]  # noqa: E731
                change = value(of, run[node.site][0, p]) - run[node.site][0, p]
                at = ... if node.index is None else node.index
                expected = float((change[at] * g[at]).sum())
            elif node.kind == "error":
                of = lambda run: (run[SITE] - sae.decode(oracle.encode(sae, run[SITE]))).detach()  # noqa: E731
                expected = float((value(of, run[SITE][0, p]) - of(run)[0, p]) @ g)
            else:
                of = lambda run: oracle.encode(sae, run[SITE]).detach()  # noqa: E731
                change = value(of, of(run)[0, p]) - of(run)[0, p]
                at = slice(None) if node.index is None else node.index
                expected = float((change[at] * (sae.W_dec.detach()[at] @ g)).sum())
            assert effects.noised[entry] - effects.clean[slot] == pytest.approx(expected, abs=1e-9), node
    assert {node.kind for node in effects.nodes} == {"feature", "all_features", "error", "activation", "head", "neuron"}


def test_estimates_are_exact_where_the_metric_is_linear() -> None:
    """In the last layer of a model without norms the logits are linear in what the heads and the MLP add."""
    torch.manual_seed(3)
    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=8, d_head=4, n_heads=2, d_mlp=12, d_vocab=20, act_fn="relu", dtype=torch.float64,
        normalization_type=None, seed=3, initializer_range=0.4,
    )  # fmt: skip
    model = HookedTransformer(config).eval()
    prompts = fp.Pairs.from_tokens(torch.randint(0, 20, (2, 6)), correct=[3, 4])
    options: dict[str, Any] = {
        "saes": fp.dictionaries.identity(model, "blocks.0.hook_mlp_out"), "sites": ["neurons", "mlp_out", "resid_post"],
        "positions": [5], "metric": "logit", "progress": False,
    }  # fmt: skip
    exact, estimate = (fp.ablate(model, prompts, method=method, **options) for method in ("exact", "atp"))
    rows = {node: row for row, node in enumerate(estimate.nodes)}
    order = [rows[node] for node in exact.nodes]
    assert len(order) == len(estimate)
    np.testing.assert_allclose(estimate.pooled("degradation")[order], exact.pooled("degradation"), atol=1e-10)
    assert np.abs(exact.pooled("degradation")).max() > 0.1
    assert len(np.unique(exact.row * 2 + exact.pair)) == len(exact.row), "the whole activation of the SAE's hook point once"


def ids(text: str) -> list[int]:
    return list(text.encode())


def test_a_single_text_and_its_answer(small: Small) -> None:
    one = fp.Pairs.from_prompts(ids, clean="abc", correct="d")
    assert (
        one == fp.Pairs.from_prompts(ids, clean=["abc"], correct=["d"]) == fp.Pairs.from_tokens([[97, 98, 99]], correct=[100])
    )
    assert (one.has_counterfactual, one[0].has_counterfactual) == (False, False)
    assert repr(one) == "1 prompt of 3 tokens without a counterfactual, labels (none)"
    assert repr(one[0]).startswith("prompt of 3 tokens without a counterfactual, answer ids 100 (right)")
    labelled: dict[str, Any] = {"labels": {"b": [1, 2]}, "tags": {"kind": "letters"}}
    pair = fp.Pair((97, 98, 99), (97, 98, 99), (100,), (), labels={"b": 1}, tags={"kind": "letters"})
    assert fp.Pairs.from_prompts(ids, clean="abc", correct="d", **labelled)[0] == pair
    both = fp.Pairs.from_prompts(ids, clean="abc", corrupted="aac", correct="d", wrong="b")
    assert both[0] == fp.Pair((97, 98, 99), (97, 97, 99), (100,), (98,))
    with pytest.raises(fp.FeatpatchError, match="align, filler without corrupted: expected corrupted prompts too"):
        fp.Pairs.from_prompts(ids, clean="abc", correct="d", align="labels", filler="d")


def test_without_answers_a_metric_of_the_logits_alone(small: Small, tmp_path: Path) -> None:
    prompts = fp.Pairs.from_tokens(small.clean)
    assert prompts == fp.Pairs.from_prompts(ids, clean=small.clean.tolist())
    assert fp.Pairs.from_jsonl(ids, prompts.to_jsonl(tmp_path / "prompts.jsonl")) == prompts
    assert prompts.check(small.model).ok
    options: dict[str, Any] = {"sites": "z", "layers": [1], "to": "zero", "progress": False}
    for method in ("exact", "atp"):
        found = fp.ablate(small.model, prompts, metric=lambda logits: logits[0, -1, 5], method=method, **options)
        five = fp.Pairs.from_tokens(small.clean, correct=[5, 5, 5])
        expected = fp.ablate(small.model, five, metric="logit", method=method, **options)
        np.testing.assert_allclose(found.pooled("degradation"), expected.pooled("degradation"), atol=1e-12)
        for metric in ("logit", "log_prob", lambda logits, correct, wrong: logits[:, 5]):
            with pytest.raises(fp.FeatpatchError, match=r"has no answers, and .* reads them: expected correct=\.\.\., or"):
                fp.ablate(small.model, prompts, metric=metric, method=method, **options)
    with pytest.raises(fp.FeatpatchError, match=r"has no answers, and sequence_log_prob reads them"):
        fp.ablate(small.model, prompts, metric="sequence_log_prob", **options)


def test_the_checklist_of_prompts_without_a_counterfactual(small: Small) -> None:
    with torch.no_grad():
        best = small.model(small.clean)[:, -1].topk(2).indices
    for order, ok in (((0, 1), True), ((1, 0), False)):
        prompts = fp.Pairs.from_tokens(small.clean, correct=best[:, order[0]], wrong=best[:, order[1]])
        found = prompts.check(small.model)
        assert found.ok is ok
        assert {finding.rule for finding in found.findings if finding.status != "pass"} == (set() if ok else {"output"})


HEAD = fp.Node(Z, "head", 0, 6)

NEEDING: dict[str, Callable[[Any, Any, fp.Pairs], Any]] = {
    "rank_features": lambda model, sae, pairs: fp.rank_features(model, sae, pairs, progress=False),
    "rank_features by gradients": lambda model, sae, pairs: fp.rank_features(model, sae, pairs, method="atp", progress=False),
    "rank_features screened": lambda model, sae, pairs: fp.rank_features(model, sae, pairs, screen=fp.Screen(), progress=False),
    "rank_components": lambda model, sae, pairs: fp.rank_components(model, pairs, progress=False),
    "rank_components by gradients": lambda model, sae, pairs: fp.rank_components(model, pairs, method="ig", progress=False),
    "rank_paths": lambda model, sae, pairs: fp.rank_paths(model, pairs, senders=[HEAD], receivers=["logits"], progress=False),
    "rank_paths by gradients": lambda model, sae, pairs: fp.rank_paths(
        model, pairs, senders=[HEAD], receivers=["logits"], method="atp", progress=False
    ),
    "find_circuit": lambda model, sae, pairs: fp.find_circuit(model, pairs, progress=False),
    "scrub": lambda model, sae, pairs: fp.scrub(model, pairs, fp.Hypothesis({fp.LOGITS: {}}), progress=False),
    "diagnose": lambda model, sae, pairs: fp.diagnose(model, sae, pairs, [HEAD]),
    "plan": lambda model, sae, pairs: fp.plan(model, sae, pairs),
    "top_k_curve": lambda model, sae, pairs: fp.top_k_curve(model, sae, pairs, progress=False),
    "select_features": lambda model, sae, pairs: fp.select_features(model, sae, pairs, progress=False),
    "interactions": lambda model, sae, pairs: fp.interactions(model, sae, pairs, progress=False),
    "random_controls": lambda model, sae, pairs: fp.random_controls(model, sae, pairs, progress=False),
}


@pytest.mark.parametrize("name", NEEDING)
def test_what_needs_a_source_run_says_so(small: Small, name: str) -> None:
    with pytest.raises(
        fp.FeatpatchError, match=r"without a counterfactual.*expected corrupted prompts .*use fp\.ablate or fp\.do, which need"
    ):
        NEEDING[name](small.model, small.at(SITE), prompts_of(small))
    with pytest.raises(
        fp.FeatpatchError, match="3 of 4 pairs have no counterfactual, the first of them pair 0: expected all or"
    ):
        NEEDING[name](small.model, small.at(SITE), fp.Pairs((*prompts_of(small), fp.Pair((1, 2, 3), (1, 4, 3), (5,), (6,)))))


def test_refusals(small: Small) -> None:
    effects = ablated(small, sites="z", layers=[1])
    for call in (effects.quadrants, lambda: effects.with_threshold(0.1)):
        with pytest.raises(fp.FeatpatchError, match="changes of logit_diff, because the prompts have no counterfactual"):
            call()
    mixed = fp.Pairs((*prompts_of(small)[:2], fp.Pair((1, 2, 3), (1, 4, 3), (5,), (6,))))
    with pytest.raises(
        fp.FeatpatchError, match="2 of 3 pairs have no counterfactual, the first of them pair 0: expected all or"
    ):
        fp.ablate(small.model, mixed, sites="z", progress=False)
    with pytest.raises(fp.FeatpatchError, match="2 of 3 pairs have no counterfactual"):
        fp.rank_nodes(small.model, mixed, [fp.head(1, 3)], to="zero", progress=False)
    for method in ("ig", "eap_ig_inputs"):
        with pytest.raises(fp.FeatpatchError, match=f"method='{method}' of an ablation: expected one of atp, grad_drop"):
            ablated(small, sites="z", method=method)
    with pytest.raises(
        fp.FeatpatchError, match="metric 'neg_kl' with method='atp' of an ablation: expected a metric whose grad"
    ):
        ablated(small, sites="z", metric="neg_kl", method="atp")
    with pytest.raises(fp.FeatpatchError, match="run='corrupted' of 3 prompts of 7 tokens without a counterfactual"):
        fp.logit_attribution(small.model, prompts_of(small), run="corrupted", progress=False)
    with pytest.raises(fp.FeatpatchError, match=r"pair 0 has no correct answer .*; give correct=\.\.\."):
        fp.logit_attribution(small.model, fp.Pairs.from_tokens(small.clean), progress=False)
    with pytest.raises(fp.FeatpatchError, match=r"an estimate \(method='atp'\) with journal: expected it only with"):
        ablated(small, sites="z", method="atp", journal="journal")
    with pytest.raises(fp.FeatpatchError, match="with one prompt, whose own values would be the ablation values"):
        fp.ablate(small.model, prompts_of(small)[:1], sites="z", to="mean_by_position", progress=False)
    pairs = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    shares = fp.ablate(small.model, pairs, sites="z", layers=[1], to="zero", progress=False)
    with pytest.raises(fp.FeatpatchError, match="expected the same"):
        fp.calibrate(ablated(small, sites="z", layers=[1], method="atp"), shares)


def test_noise_is_a_counterfactual(small: Small) -> None:
    pairs = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    options: dict[str, Any] = {"sites": "z", "layers": [1], "noise": fp.Noise([2]), "progress": False}
    found, expected = (fp.rank_components(small.model, some, **options) for some in (prompts_of(small), pairs))
    np.testing.assert_array_equal(found.pooled("recovery"), expected.pooled("recovery"))
    assert found.unit == "of the gap"


def test_views_and_reports_show_one_prompt(tmp_path: Path) -> None:
    """Nothing is called corrupted where there is no corrupted prompt, and feature cards need no gap."""
    demo = fp.load_demo()
    model, sae = demo.model, demo.saes[4]
    clean = ["Mary gave it to John . John gave it to", "John gave it to Mary . Mary gave it to"]
    pairs = fp.Pairs.from_prompts(model, clean=clean, correct=["Mary", "John"], wrong=["John", "Mary"])
    assert "corrupted" not in fp.active_features(model, sae, pairs[0])
    assert len(fp.attention_pattern(model, pairs[0], layer=1, head=3).data) == 1
    assert "corrupted: " not in pairs._repr_html_()
    assert "wrong answers:" in pairs._repr_html_()
    effects = fp.ablate(model, pairs, saes=sae, positions=[-1], to="zero", progress=False)
    page = fp.report(effects, tmp_path / "report.html", model=model, saes=sae, pairs=pairs).read_text()
    assert "Feature cards" in page
    assert '<span class="run">corrupted</span>' not in page
