"""Screening: exact values of what was chosen, and bounds on what was not, against enumeration and by simulation of full sweeps."""

import warnings
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from small import Small, standard
from test_engine import SITES, interrupt_after
from test_sets import SITE, dictionary, pairs_of

import featpatch as fp
from featpatch.attribution.features import estimation_time
from featpatch.effects.audit import audited, most, needed, provable, sample_sizes
from featpatch.engine.suffix import SuffixPath
from featpatch.errors import FeatpatchWarning
from featpatch.nodes import DIRECTIONS
from featpatch.ranking.plan import _in_all
from featpatch.reporting.terminal import planned

BOUND: dict[str, Any] = {"top": 5, "confidence": 0.95, "share": 0.1, "looks": 1}


def screened(small: Small, sae: Any, **options: Any) -> fp.Effects:
    settings = {name: options.pop(name) for name in fp.Screen.__dataclass_fields__.keys() & options.keys()}
    return fp.rank_features(small.model, sae, pairs_of(small), progress=False, screen=fp.Screen(**settings), **options)


def values(effects: fp.Effects) -> dict[tuple[fp.Node, int], tuple[float, float]]:
    return {
        (effects.nodes[row], int(pair)): (denoised, noised)
        for row, pair, denoised, noised in zip(effects.row, effects.pair, effects.denoised, effects.noised, strict=True)
    }


def same(some: fp.Effects, whole: fp.Effects) -> None:
    """Every entry is the one of the larger table."""
    expected = values(whole)
    for key, value in values(some).items():
        assert value == pytest.approx(expected[key], abs=1e-10), key


@pytest.mark.parametrize("kind", ["standard", "topk", "z", "normalising", "nonlinear"])
def test_chosen_features_are_what_the_full_sweep_says(small: Small, kind: str) -> None:
    """The first k by |estimate|, then some of the others, each exact; every row of the sites."""
    sae = dictionary(small, kind)
    full = fp.rank_features(small.model, sae, pairs_of(small), positions="each", progress=False)
    estimate = fp.rank_features(small.model, sae, pairs_of(small), method="atp", positions="each", progress=False)
    found = screened(small, sae, positions="each", k=7, audit=5, top=3)
    features = [node for node in found.nodes if node.kind == "feature"]
    assert len(features) == 12
    assert found.nodes[:12] == tuple(features)
    size = {n: max(abs(a), abs(b)) for n, a, b in
            zip(estimate.nodes, estimate.pooled("recovery"), estimate.pooled("degradation"), strict=True)
            if n.kind == "feature"}  # fmt: skip
    assert [size[node] for node in features[:7]] == sorted(size.values(), reverse=True)[:7]
    same(found, full)
    assert len(found.row) == sum(full.nodes[row] in set(found.nodes) for row in full.row)
    assert {node for node in found.nodes if node.kind != "feature"} == {node for node in full.nodes if node.kind != "feature"}
    one, other = (table.sites().set_index(["sae", "position"]).sort_index() for table in (found, full))
    assert one["changed_features"].tolist() == other["changed_features"].tolist()
    agreement = fp.calibrate(estimate, found)
    assert set(agreement.nodes) == set(features)
    table = found.to_pandas()
    at = {node: row for row, node in enumerate(estimate.nodes)}
    for effect in ("recovery", "degradation"):
        np.testing.assert_array_equal(table[f"{effect}_estimate"], estimate.pooled(effect)[[at[node] for node in found.nodes]])
    assert set(table["value"]) == {"exact"}


def test_the_sample_is_drawn_by_the_seed(small: Small) -> None:
    sae = small.at(SITE)
    draws = [screened(small, sae, k=3, audit=6, top=3, seed=seed).nodes[:9] for seed in (0, 0, 1)]
    assert draws[0] == draws[1]
    assert draws[0][:3] == draws[2][:3]
    assert set(draws[0][3:]) != set(draws[2][3:])


@pytest.mark.parametrize("drawn", [1, 3, 6, 8])
@pytest.mark.parametrize("found", [0, 1, 2])
def test_the_bound_by_enumeration(drawn: int, found: int) -> None:
    """Every sample of 8, for every number of marked ones."""
    if found > drawn:
        return
    samples = list(combinations(range(8), drawn))
    for alpha in (0.05, 0.3):
        possible = [
            marked
            for marked in range(9)
            if np.mean([sum(one < marked for one in sample) <= found for sample in samples]) > alpha
            and found <= marked <= 8 - drawn + found
        ]
        assert most(8, drawn, found, alpha) == max(possible)


def test_an_audit_by_hand() -> None:
    """Three of the sample are beyond the fifth of the screened ones."""
    first, sample = np.arange(1.0, 11.0), np.array([6.5, 7.0, 6.0, 0.1, 0.2, 0.3, 9.0])
    found = audited(first, sample, 30, **BOUND)
    assert (found.threshold, found.beyond, found.screened, found.sampled) == (6.0, 3, 10, 7)
    assert found.missed == most(20, 7, 3, 0.05) - 3
    assert found.recall == max(0, 1 - found.missed / 5)
    assert found.estimate == max(0, 1 - 3 * 13 / 7 / 5)
    assert audited(first, sample - 6, 30, **BOUND).estimate == 1
    assert audited(first, sample - 2.9, 30, **BOUND).estimate == pytest.approx(1 - 13 / 7 / 5)
    assert found.size == np.inf
    assert "too small" in repr(found)
    large = audited(first, np.arange(100) / 100, 210, **BOUND)
    assert large.size == pytest.approx(0.93)
    assert "at most 10% of the other 200 have an |effect| above 0.93" in repr(large)
    everything = audited(first, np.arange(20.0), 30, **BOUND)
    assert (everything.missed, everything.recall, everything.estimate) == (0, 1, 1)
    assert everything.size == 17
    assert audited(first, np.zeros(0), 10, **BOUND).recall == 1


@pytest.mark.filterwarnings("error::featpatch.errors.FeatpatchWarning")
def test_a_screen_that_proves_nothing_or_runs_nearly_everything_says_so_before_the_start(
    small: Small, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the audit of a sample without an effect, at every size."""
    first, rest, top = np.ones(20), 124, 5
    for looks in (1, 3):
        about: dict[str, Any] = {"top": top, "confidence": 0.95, "looks": looks}
        bounds = [audited(first, np.zeros(n), 20 + rest, share=0.05, **about).recall for n in range(rest + 1)]
        assert [provable(rest, n, **about) for n in range(rest + 1)] == bounds
        for recall in (0.01, 0.5, 1.0):
            assert needed(rest, recall, **about) == next(n for n, bound in enumerate(bounds) if bound >= recall)
    assert needed(0, 1.0, top=5, confidence=0.95, looks=1) == 0
    sae, calls = small.at(SITE), counting(monkeypatch)
    candidates = int(
        fp.rank_features(small.model, sae, pairs_of(small), method="atp", positions="each", progress=False).ranked.sum()
    )
    good = needed(candidates - 20, 0.5, top=5, confidence=0.95, looks=1)
    options: dict[str, Any] = {"positions": "each", "k": 20, "top": 5}
    calls.clear()
    for given, message in (
        ({"audit": good - 1}, f"audit={good - 1} of the {candidates - 20} candidates .* audit={good} or more"),
        (
            {"audit": int(0.8 * candidates) - 19},
            f"{int(0.8 * candidates) + 1} of {candidates} candidates are patched, .*leave screen out",
        ),
        ({"k": 500}, f"k=500 and audit=100 mean that {candidates} of {candidates} candidates are patched"),
        ({"audit": 3, "target": 1.0}, "target=1.0 and k=20 mean that at least .*leave screen out"),
    ):
        with pytest.raises(FeatpatchWarning, match=f"screening: .*{message}"):
            screened(small, sae, **{**options, **given})
    assert not calls
    assert screened(small, sae, **options, audit=good).audit(top=5).candidates == candidates
    screened(small, sae, **options, audit=int(0.8 * candidates) - 20)
    screened(small, sae, **options, audit=3, target=0.2)


def test_sample_sizes() -> None:
    assert sample_sizes(100, 1000) == [100, 200, 400, 800, 1000]
    assert sample_sizes(100, 60) == [60]
    assert sample_sizes(100, 0) == [0]


@pytest.fixture(scope="module")
def full() -> fp.Effects:
    """A full exact sweep of the shipped model."""
    demo = fp.load_demo()
    return fp.rank_features(demo.model, demo.saes, demo.pairs("ioi", n=8, seed=1), positions=["S2", "end"], progress=False)


@pytest.mark.parametrize("informed", [pytest.param(True, marks=pytest.mark.extended), False])
def test_coverage(full: fp.Effects, informed: bool) -> None:
    """How often the bounds hold, over 1000 samples of a full sweep; by a bad ranking, where they are tight."""
    sizes = full.take(full.ranked).sizes()
    generator = np.random.default_rng(5)
    noise = 1.0 if informed else 1e6
    order = np.argsort(-np.log(sizes + 1e-9) - noise * generator.standard_normal(len(sizes)))
    first, rest = sizes[order[:150]], sizes[order[150:]]
    threshold = np.sort(first)[-20]
    truth = np.sort(np.concatenate([first, rest]))[-20]
    held = {"missed": 0, "recall": 0, "size": 0}
    draws, drawn = 1000, 120
    for _ in range(draws):
        sample = generator.permutation(rest)
        audit = audited(first, sample[:drawn], len(sizes), top=20, confidence=0.95, share=0.05, looks=1)
        held["missed"] += int((sample[drawn:] > threshold).sum()) <= audit.missed
        run = np.concatenate([first, sample[:drawn]])
        held["recall"] += (run >= truth).sum() / 20 >= audit.recall
        held["size"] += int((rest > audit.size).sum()) <= 0.05 * len(rest)
    assert all(count / draws > 0.935 for count in held.values()), held
    if not informed:
        assert held["missed"] / draws < 0.99, held
        assert held["size"] / draws < 0.99, held


@pytest.mark.extended
def test_coverage_of_looking_until_a_target_is_met() -> None:
    """Over 1000 samples of a population in which the target is missed by one: how often it is claimed."""
    generator = np.random.default_rng(2)
    first, rest = np.arange(1.0, 41.0), np.zeros(300)
    rest[:5] = 100.0
    sizes = sample_sizes(40, len(rest))
    looks, wrong, draws = sum(size < len(rest) for size in sizes), 0, 1000
    for _ in range(draws):
        sample = generator.permutation(rest)
        for size in sizes:
            audit = audited(first, sample[:size], 340, top=40, confidence=0.8, share=0.05, looks=looks)
            if audit.recall >= 0.9:
                wrong += (sample[size:] > 50).sum() > 0.1 * 40
                break
    assert wrong / draws <= 0.2
    assert wrong > 0


def test_a_target_is_met(small: Small) -> None:
    sae = small.at(SITE)
    options: dict[str, Any] = {"positions": "each", "k": 20, "top": 5, "audit": 4}
    once = screened(small, sae, **options)
    assert once.metadata["screening"]["sampled"] == 4
    found = screened(small, sae, target=0.4, **options)
    sampled, candidates = found.metadata["screening"]["sampled"], found.metadata["screening"]["candidates"]
    assert found.audit(top=5).recall >= 0.4
    assert sampled in sample_sizes(4, candidates - 20)
    assert sampled > 4
    before = found.metadata["screening"] | {"sampled": sampled // 2}
    sizes = found.take(found.ranked).sizes()[: 20 + sampled // 2]
    assert audited(sizes[:20], sizes[20:], candidates, top=5, confidence=0.95, share=0.05, looks=before["looks"]).recall < 0.4
    full = fp.rank_features(small.model, sae, pairs_of(small), positions="each", progress=False)
    every = screened(small, sae, target=1.0, **options)
    assert set(every.nodes) == set(full.nodes)
    same(every, full)
    assert (found.audit(top=5).confidence, every.audit().recall) == (0.95, 1)
    few = screened(small, sae, positions="each", k=7, audit=4)
    assert (found.audit().top, few.audit().top) == (20, 7)


def test_more_than_there_is(small: Small) -> None:
    """All features are run for their estimates."""
    found = screened(small, small.at(SITE), positions="each")
    audit = found.audit(top=10)
    assert (audit.recall, audit.missed, audit.sampled) == (1, 0, 0)
    assert repr(audit) == f"All {audit.candidates} candidates were patched: none was missed, and the top 10 are exact"


def test_a_screened_table_is_a_table(small: Small, tmp_path: Path) -> None:
    found = screened(small, small.at(SITE), positions="each", k=12, audit=5, top=3, metric=["logit_diff", "prob"])
    again = fp.Effects.load(found.save(tmp_path / "screened.safetensors"))
    audit = found.audit(top=3)
    assert again.audit(top=3) == audit
    assert found.top(4).audit(top=3) == audit
    assert found.for_metric("prob").audit(top=3).threshold == np.sort(found.for_metric("prob").sizes()[:12])[-3]
    assert found.audit("recovery", top=3).threshold == np.sort(np.abs(found.pooled("recovery")[:12]))[-3]
    assert found.rows_ranked == found.metadata["screening"]["candidates"] > 17
    assert "recovery_estimate" in again.to_pandas()
    part = fp.Effects.load(found.top(4).save(tmp_path / "part.safetensors"))
    assert "recovery_estimate" not in part.to_pandas()
    with pytest.raises(fp.FeatpatchError, match="this table has no finished screening"):
        part.audit()
    assert found.of_pairs([0, 1]).audit(top=3).candidates == audit.candidates
    assert "recovery_estimate" not in found.of_pairs([0, 1]).to_pandas()
    assert "prob_recovery_estimate" not in found.to_pandas()
    one = screened(small, small.at(SITE), positions="each", k=12, audit=5, top=3, directions=["denoising"])
    np.testing.assert_array_equal(fp.Effects.load(one.save(tmp_path / "one.safetensors")).denoised, one.denoised)
    with pytest.raises(fp.FeatpatchError, match="expected some of the measured effects, recovery"):
        one.audit("degradation", top=3)


@pytest.mark.extended
def test_interrupted_and_gone_on(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal holds all looks; Ctrl-C in a later one keeps what the earlier ones say."""
    options: dict[str, Any] = {"positions": "each", "k": 20, "top": 5, "audit": 4, "target": 1.0, "batch_rows": 40}
    sae, seen = small.at(SITE), set()
    with monkeypatch.context() as patch:
        calls = counting(patch)
        whole = screened(small, sae, **options)
    for passes in range(0, len(calls) - len(SITES), 9):
        journal = tmp_path / f"journal {passes}"
        with monkeypatch.context() as patch:
            interrupt_after(patch, passes)
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    cut = screened(small, sae, journal=journal, **options)
            except KeyboardInterrupt:
                seen.add("nothing")
            else:
                assert any("interrupted: the table holds" in str(each.message) for each in told) == (not cut.finished)
                seen.add("looks" if cut.finished else "rows")
                check_cut(cut, whole)
        with monkeypatch.context() as patch:
            again_calls = counting(patch)
            again = screened(small, sae, journal=journal, **options)
        assert again.nodes == whole.nodes
        assert values(again) == values(whole)
        assert len(again_calls) < len(calls) or not passes
    assert seen == {"nothing", "rows", "looks"}


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every forward pass of patches."""
    logits, calls = SuffixPath.logits, list[int]()

    def counted(path: SuffixPath, units: Any, columns: Any) -> Any:
        calls.append(1)
        return logits(path, units, columns)

    monkeypatch.setattr(SuffixPath, "logits", counted)
    return calls


def check_cut(cut: fp.Effects, whole: fp.Effects) -> None:
    """What there is is right, and is audited only where a look was finished."""
    assert len(cut.row) < len(whole.row)
    same(cut, whole)
    if cut.finished:
        assert cut.audit(top=5).recall < 1
        return
    with pytest.raises(fp.FeatpatchError, match="no finished screening"):
        cut.audit()


def test_a_plan_says_which_is_quicker(small: Small) -> None:
    sae = standard(SITE, 3)
    plan = fp.plan(small.model, sae, pairs_of(small), positions="each")
    full = fp.rank_features(small.model, sae, pairs_of(small), positions="each", progress=False)
    assert plan.nodes == full.ranked.sum()
    assert plan.estimate_seconds is not None
    assert plan.screened_seconds(10, 10) == pytest.approx(plan.estimate_seconds + plan.seconds * 20 / plan.nodes)
    assert plan.screened_seconds(10**6, 1) == pytest.approx(plan.estimate_seconds + plan.seconds)
    console = Console(record=True, width=120)
    console.print(planned(plan))
    assert "the full sweep" in console.export_text()
    without = fp.plan(small.model, sae, pairs_of(small), metric="accuracy")
    assert without.estimate_seconds is None
    assert without.screened_seconds(1, 1) is None
    console.print(planned(without))
    assert "the metric has no gradient" in console.export_text()


def test_a_plan_of_components_and_of_paths(small: Small) -> None:
    """Against the tables themselves: each has a value in both directions for every row and pair in which it differs."""
    pairs, receivers = pairs_of(small), ["logits", fp.Node("blocks.2.hook_mlp_out", "activation")]
    options: dict[str, Any] = {"sites": ["z", "mlp_out"], "layers": [1, 2], "positions": "each"}
    plan = fp.plan(small.model, None, pairs, **options)
    full = fp.rank_components(small.model, pairs, progress=False, **options)
    assert (plan.patches, plan.nodes) == (2 * len(full.row), sum(node.kind == "head" for node in full.nodes))
    assert (plan.screens, plan.estimate_seconds, plan.counted) == (False, None, 3)
    assert fp.plan(small.model, None, pairs).patches == 2 * len(fp.rank_components(small.model, pairs, progress=False).row)
    senders = [fp.Node("blocks.0.attn.hook_z", "head", 1), fp.Node("blocks.0.hook_mlp_out", "activation")]
    nodes: dict[str, Any] = {"senders": senders, "receivers": receivers, "route": "through_mlps"}
    paths = fp.rank_paths(small.model, pairs, progress=False, **nodes)
    found = fp.plan(small.model, None, pairs, **nodes)
    assert (found.patches, found.nodes) == (2 * len(paths.row), len(paths))
    console = Console(record=True, width=120)
    console.print(planned(found))
    text = console.export_text()
    assert "patches (one exact run each)" in text
    assert "gradient" not in text
    assert "screened" not in text
    assert "counted" not in text
    for arguments in (
        {"sites": "z", "senders": senders, "receivers": receivers}, {"senders": senders}, {"route": "direct", "receivers": receivers},
        {"route": "through_mlps"}, {"positions": "each", "senders": senders, "receivers": receivers},
    ):  # fmt: skip
        with pytest.raises(
            fp.FeatpatchError, match=r"expected senders and receivers \(and optionally route, but not positions\) for paths"
        ):
            fp.plan(small.model, None, pairs, **arguments)
    with pytest.raises(fp.FeatpatchError, match="fp.plan got layers, saes: expected"):
        fp.plan(small.model, small.at(SITE), pairs, layers=[1])


def test_a_plan_counts_some_pairs_of_all_lengths(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three pairs the shortest and the longest; the third is not run at all."""
    long = pairs_of(bridge)
    short = [
        fp.Pair(p.clean[:n], p.corrupted[:n], correct=p.correct, wrong=p.wrong) for n, p in zip((5, 6), long, strict=False)
    ]
    pairs = fp.Pairs((short[1], long[2], short[0]))
    monkeypatch.setattr("featpatch.ranking.plan.COUNTED", 2)
    lengths: set[int] = set()
    hook = bridge.model.blocks[0].register_forward_hook(lambda module, args, out: lengths.add(args[0].shape[1]))
    try:
        plan = fp.plan(bridge.model, bridge.at(SITE), pairs, metric="accuracy")
    finally:
        hook.remove()
    some = fp.rank_features(bridge.model, bridge.at(SITE), pairs[1:], progress=False)
    assert lengths >= {5, 7}
    assert 6 not in lengths
    assert (plan.patches, plan.counted, plan.pairs) == (round(2 * len(some.row) * 3 / 2), 2, 3)
    console = Console(record=True, width=120)
    console.print(planned(plan))
    assert "2 of 3 pairs, scaled to all" in console.export_text()


def test_a_plan_estimates_how_many_features_differ_in_any_pair() -> None:
    """Features that differ in any pair with chances of their own: from 8 of 100 pairs, at most and nearly the truth."""
    random = np.random.default_rng(0)
    differs = random.random((3000, 100)) < random.beta(0.5, 4, (3000, 1))
    seen = Counter({fp.Node(SITE, "feature", row): int(count) for row, count in enumerate(differs[:, :8].sum(1)) if count})
    true = int(differs.any(1).sum())
    assert len(seen) < 0.6 * true
    assert 0.75 * true < _in_all(seen, 8, 100) <= 1.05 * true
    assert _in_all(seen, 8, 8) == len(seen)
    assert _in_all(Counter(dict.fromkeys(seen, 8)), 8, 100) == len(seen)


def test_the_time_of_estimates_is_that_of_the_second_try(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one warms up; both run one pair."""
    clock = iter([1.0, 5.0, 7.0, 9.5])
    monkeypatch.setattr("featpatch.attribution.features.time", SimpleNamespace(perf_counter=clock.__next__))
    assert estimation_time(small.model, small.at(SITE), pairs_of(small), "all", DIRECTIONS, "logit_diff") == 2.5 * 3


def test_errors(small: Small) -> None:
    sae, noise = small.at(SITE), fp.Noise([3])
    for options, message in (
        ({"k": 0}, "k=0: expected an integer, 1 or more"),
        ({"audit": 0}, "audit=0"),
        ({"k": 5, "top": 6}, "top=6: expected at most 5"),
        ({"k": 5, "top": 0}, "top=0: expected an integer"),
        ({"k": 50, "top": 45}, "top=45: expected at most"),
        ({"target": 1.5}, "target=1.5: expected a fraction"),
        ({"noise": noise}, "with noise: expected no noise"),
        ({"metric": "accuracy"}, "'accuracy' is not supported for estimates"),
        ({"metric": "sequence_log_prob"}, "not supported for estimates.*: expected one of logit_diff"),
        ({"metric": []}, "metric=\\[\\]: expected at least one"),
        ({"seed": -1}, "seed=-1: expected an integer, 0 or more"),
        ({"method": "shap"}, "method='shap'"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            screened(small, sae, **options)
    with pytest.raises(fp.FeatpatchError, match="with screen, journal: expected them only with method='exact'"):
        fp.rank_features(small.model, sae, pairs_of(small), method="atp", screen=fp.Screen(), journal="j", progress=False)
    found = screened(small, sae, positions="each", k=6, audit=3, top=3)
    with pytest.raises(fp.FeatpatchError, match="top=7, confidence=0.95, share=0.05: expected top from 1 to 6"):
        found.audit(top=7)
    with pytest.raises(fp.FeatpatchError, match="a full sweep needs no audit"):
        fp.rank_features(small.model, sae, pairs_of(small), progress=False).audit()
