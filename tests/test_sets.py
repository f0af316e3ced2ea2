"""Several features together: curves, selection, interactions, and random directions, against the oracle."""

from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from small import FEATURES, Small, at, randomised, standard
from test_statistics import made

import featpatch as fp
from featpatch.engine.patches import NEVER
from featpatch.engine.suffix import SuffixPath
from featpatch.patching import sets
from featpatch.patching.controls import Controls

SITE = "blocks.1.hook_resid_pre"


class Squares(torch.nn.Module):
    """A dictionary whose features add no fixed direction."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(16, 12, generator=torch.Generator().manual_seed(4), dtype=torch.float64))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.weight).relu()

    def decode(self, features: torch.Tensor) -> torch.Tensor:
        return (features**2 + features) @ self.weight.T * 0.05


def dictionary(small: Small, kind: str) -> Any:
    if kind == "normalising":
        config = StandardSAEConfig(16, FEATURES, "float64", normalize_activations="layer_norm", metadata=at(SITE))
        return randomised(StandardSAE(config), 3)
    if kind == "nonlinear":
        return fp.dictionaries.adapt(Squares(), SITE, d_in=16, name="squares")
    return small.at("blocks.2.hook_resid_pre" if kind == "topk" else "blocks.1.attn.hook_z" if kind == "z" else SITE)


def pairs_of(small: Small, slots: Any = slice(None)) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean[slots], small.corrupted[slots], small.correct[slots], small.wrong[slots])


def together(small: Small, sae: Any, slot: int, direction: str, features: Any, positions: list[int]) -> float:
    runs = small.corrupted[[slot]], small.clean[[slot]]
    base, source = runs if direction == "denoising" else runs[::-1]
    logits = oracle.patched_logits(small.model, sae, base, source, features=list(features), positions=positions, error=False)
    return oracle.logit_diff(logits, int(small.correct[slot]), int(small.wrong[slot]))


@pytest.mark.parametrize("kind", ["standard", "topk", "z", "normalising", "nonlinear"])
@pytest.mark.parametrize("positions", ["all", [3, 6]])
def test_curves_against_the_oracle(small: Small, kind: str, positions: Any) -> None:
    sae = dictionary(small, kind)
    curve = fp.top_k_curve(small.model, sae, pairs_of(small), positions=positions, most=8, progress=False)
    for entry in range(len(curve.sets.row)):
        node, slot = curve.sets.nodes[curve.sets.row[entry]], int(curve.sets.pair[entry])
        key = node.sae, node.position
        features = curve.features[key][: curve.sizes[key][node.index]]
        where = list(range(7)) if node.position == "all" else [node.position]
        for direction, values in (("denoising", curve.sets.denoised), ("noising", curve.sets.noised)):
            expected = together(small, sae, slot, direction, features, where)
            assert values[entry] == pytest.approx(expected, abs=1e-9), (node, direction)
    for (_, position), features in curve.features.items():
        alone = curve.single.where(kind="feature", position=position)
        assert [*features] == alone.top(8).indices.tolist()
        assert len(set(features)) == len(features)


def test_the_text_of_a_curve_names_its_largest_set(small: Small) -> None:
    curve = fp.top_k_curve(small.model, small.at(SITE), pairs_of(small), positions=[6], most=5, progress=False)
    assert list(curve.table()["k"]) == [1, 2, 3, 4, 5]
    last = curve.table().iloc[-1]
    assert f"5 sets, recovery {last['recovery']:.2g}, degradation {last['degradation']:.2g} with the top 5" in repr(curve)


def test_all_features_of_the_curve_are_all_features(small: Small) -> None:
    """The law at the end of the curve; and the table beside it."""
    curve = fp.top_k_curve(small.model, small.at(SITE), pairs_of(small), positions=[3, 6], most=99, progress=False)
    table = curve.table()
    for position in (3, 6):
        sizes = table[table["position"] == position]["k"].tolist()
        assert sizes == [*[k for k in (*range(1, 13), 14, 16, 18, 21) if k < sizes[-1]], sizes[-1]]
        assert sizes[-1] > 14
        end = table[table["position"] == position].iloc[-1]
        single = curve.single.where(kind="all_features", position=position)
        assert end["k"] == len(curve.features[end["sae"], position])
        assert end["recovery"] == pytest.approx(single.pooled("recovery")[0], abs=1e-9)
        assert end["degradation_of_all_features"] == pytest.approx(1, abs=1e-9)
        first = table[table["position"] == position].iloc[0]
        best = curve.single.where(kind="feature", position=position).top(1)
        assert first["k"] == 1
        assert first["recovery"] == pytest.approx(best.pooled("recovery")[0], abs=1e-9)
        assert first["recovery_low"] <= first["recovery"] <= first["recovery_high"]
    for line, (_, rows) in zip(curve.plot("degradation").data, table.groupby("position", sort=False), strict=True):
        assert [*line.x] == [*rows["k"]]
        np.testing.assert_array_equal(line.y, rows["degradation"])
        np.testing.assert_allclose(line.y + line.error_y.array, rows["degradation_high"])
        np.testing.assert_allclose(line.y - line.error_y.arrayminus, rows["degradation_low"])


def test_ranking_on_other_pairs(small: Small) -> None:
    one, other = pairs_of(small, [0, 1]), pairs_of(small, [2])
    sae = small.at(SITE)
    curve = fp.top_k_curve(small.model, sae, one, rank_on=other, by="degradation", most=5, progress=False)
    expected = fp.rank_features(small.model, sae, other, progress=False).top(5, by="degradation").indices.tolist()
    assert [*curve.features[SITE, "all"]] == expected
    assert len(curve.sets.clean) == 2


def test_controls_of_the_same_size_side_by_side(small: Small) -> None:
    pairs = pairs_of(small)
    saes = [small.at(SITE), fp.dictionaries.identity(small.model, SITE), fp.dictionaries.pca(small.model, SITE, pairs)]
    together = fp.top_k_curve(small.model, saes, pairs, most=4, progress=False)
    assert together.table().groupby("sae")["k"].apply(list).tolist() == [[1, 2, 3, 4]] * 3
    for sae in saes:
        alone = fp.top_k_curve(small.model, sae, pairs, most=4, progress=False)
        rows = together.sets.where(sae=alone.sets.nodes[0].sae)
        assert rows.nodes == alone.sets.nodes
        np.testing.assert_allclose(rows.pooled("recovery"), alone.sets.pooled("recovery"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("effect", ["recovery", "degradation"])
def test_greedy_selection_step_by_step(small: Small, effect: Any) -> None:
    """Every step by hand over all features."""
    sae, pairs = small.at(SITE), pairs_of(small)
    found = fp.select_features(
        small.model, sae, pairs, effect=effect, target=1.0, candidates=99, most=3, position=3, progress=False
    )
    direction = "denoising" if effect == "recovery" else "noising"
    clean, corrupted = found.effects.clean, found.effects.corrupted

    def value(features: list[int]) -> float:
        patched = np.array([together(small, sae, slot, direction, features, [3]) for slot in range(3)])
        change = patched - corrupted if effect == "recovery" else clean - patched
        return float(change.sum() / (clean - corrupted).sum())

    chosen: list[int] = []
    for size in range(len(found.features)):
        values = {feature: value([*chosen, feature]) for feature in range(FEATURES) if feature not in chosen}
        best = max(values, key=lambda feature: values[feature])
        assert found.features[size] == best
        assert found.effects.pooled(effect)[size] == pytest.approx(values[best], abs=1e-9)
        chosen.append(best)
    assert found.reached == (values[best] >= 1)
    assert ("short of 100%" in str(found)) != found.reached


def test_selection_ends_where_it_should(small: Small) -> None:
    sae, pairs = small.at(SITE), pairs_of(small)
    options = {"position": 3, "candidates": 99, "most": 24, "progress": False}
    all_steps = fp.select_features(small.model, sae, pairs, target=1.0, **options).effects.pooled("recovery")
    assert (np.diff(all_steps) > 0).all(), "ends where nothing is added"
    target = float(all_steps[1])
    found = fp.select_features(small.model, sae, pairs, target=target, **options)
    assert (len(found.features), found.reached) == (2, True)
    assert str(found).startswith(f"2 features bring back {all_steps[1]:.0%}: ")
    one = fp.select_features(small.model, sae, pairs, target=1.0, **{**options, "most": 1})
    assert str(one).startswith(f"1 feature brings back {all_steps[0]:.0%}, short of 100%: ")


def test_a_long_selection_is_announced_after_its_first_step(
    small: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """There are three steps with 5, 4 and 3 sets, each of which takes 50 seconds."""
    clock, measured = [0.0], sets.Sets.measured

    def timed(*asked: Any, **options: Any) -> fp.Effects:
        clock[0] += 50
        return measured(*asked, **options)

    monkeypatch.setattr(sets.Sets, "measured", timed)
    monkeypatch.setattr("featpatch.engine.sweep.time", SimpleNamespace(monotonic=lambda: clock[0]))
    pairs = pairs_of(small)
    fp.select_features(small.model, small.at(SITE), pairs, candidates=5, most=3, target=1.0)
    total, left = len(pairs) * 12, round(50 * 7 / 5)
    assert f"{total} patches in total, about {timedelta(seconds=left)} left" in capsys.readouterr().err


def test_interactions_against_the_oracle(small: Small) -> None:
    sae, pairs = small.at(SITE), pairs_of(small)
    table = fp.interactions(small.model, sae, pairs, top=4, position=3, progress=False)
    assert len(table) == 6
    assert table["recovery_interaction"].abs().is_monotonic_decreasing
    clean, corrupted = (
        np.array([together(small, sae, slot, way, [], [3]) for slot in range(3)]) for way in ("noising", "denoising")
    )
    gap = (clean - corrupted).sum()
    for _, row in table.iterrows():
        one, other = int(row["one"]), int(row["other"])
        for effect, way in (("recovery", "denoising"), ("degradation", "noising")):

            def change(features: list[int], way: str = way) -> float:
                patched = np.array([together(small, sae, slot, way, features, [3]) for slot in range(3)])
                return float((patched - corrupted).sum() if way == "denoising" else (clean - patched).sum()) / gap

            both = change([one, other])
            assert row[effect] == pytest.approx(both, abs=1e-9)
            assert row[f"{effect}_interaction"] == pytest.approx(both - change([one]) - change([other]), abs=1e-9)
            assert row[f"{effect}_interaction_low"] <= row[f"{effect}_interaction"] <= row[f"{effect}_interaction_high"]
    chosen = fp.interactions(
        small.model, sae, pairs, features=[int(table["other"][0]), int(table["one"][0])], position=3, progress=False
    )
    assert chosen["recovery_interaction"][0] == pytest.approx(table["recovery_interaction"][0], abs=1e-12)


@pytest.mark.parametrize("kind", ["standard", "nonlinear"])
def test_random_directions(small: Small, kind: str) -> None:
    """Each adds a vector as long as the feature's, along its own direction, with the feature's sign."""
    sae, pairs = dictionary(small, kind), pairs_of(small)
    found = fp.random_controls(small.model, sae, pairs, n=30, position=3, seed=5, progress=False)
    assert found.feature.nodes == fp.rank_features(small.model, sae, pairs, positions=[3], progress=False).top(1).nodes
    assert len(found.random) == 30
    feature = found.feature.nodes[0].index
    drawn = torch.randn(30, 16, generator=torch.Generator().manual_seed(5)).double()
    units = drawn / drawn.norm(dim=1, keepdim=True)
    for entry in range(0, len(found.random.row), 7):
        number, slot = found.random.nodes[found.random.row[entry]].index, int(found.random.pair[entry])
        for base, source, values in (
            (small.corrupted[[slot]], small.clean[[slot]], found.random.denoised),
            (small.clean[[slot]], small.corrupted[[slot]], found.random.noised),
        ):
            x = oracle.activations(small.model, base)[SITE]
            f, other = oracle.encode(sae, x), oracle.encode(sae, oracle.activations(small.model, source)[SITE])
            new = f.clone()
            new[0, 3, feature] = other[0, 3, feature]
            added = (oracle.decode(sae, new, x, x) - oracle.decode(sae, f, x, x))[0, 3]
            pushed = x.clone()
            pushed[0, 3] += added.norm() * units[number] * (other - f)[0, 3, feature].sign()
            with torch.no_grad():
                logits = oracle.replaced(small.model, base, SITE, x, pushed)
            expected = oracle.logit_diff(logits, int(small.correct[slot]), int(small.wrong[slot]))
            assert values[entry] == pytest.approx(expected, abs=1e-6), (number, slot)
    beaten = (found.random.pooled("recovery") >= found.feature.pooled("recovery")[0]).mean()
    assert found.share("recovery") == beaten
    assert f"{beaten:.1%} of 30 random directions" in str(found)


def test_controls_that_reach_the_feature_count() -> None:
    """One is larger, one as large, one smaller."""
    feature, random = made([[1, 1]], [2, 2]), made([[2, 1], [1, 1], [1, 0]], [2, 2])
    assert Controls(feature, random).share() == Controls(feature, random).share("degradation") == pytest.approx(2 / 3)


def test_controls_of_one_direction(small: Small) -> None:
    found = fp.random_controls(
        small.model, small.at(SITE), pairs_of(small), n=3, position="all", directions=["noising"], progress=False
    )
    assert found.share() == found.share("degradation")
    with pytest.raises(fp.FeatpatchError, match="top=1: expected an integer, 2 or more"):
        fp.interactions(small.model, small.at(SITE), pairs_of(small), top=1, progress=False)
    with pytest.raises(fp.FeatpatchError, match="effect='recovery': expected one of the measured effects, degradation"):
        found.share("recovery")


def test_sets_that_change_nothing_are_not_run() -> None:
    changes = torch.zeros(3, 2, 4)
    changes[1, 1, 2] = -1
    assert sets._deltas(changes, torch.tensor([4, 6])).first.tolist() == [NEVER, 6, NEVER]


@pytest.mark.filterwarnings("ignore:token index 1 has no rows")
def test_errors(small: Small) -> None:
    sae, pairs, model = small.at(SITE), pairs_of(small), small.model
    two = [sae, standard("blocks.0.hook_resid_pre", 1)]
    for call, message in (
        (lambda: fp.top_k_curve(model, sae, pairs, most=0), "most=0: expected an integer, 1 or more"),
        (lambda: fp.select_features(model, sae, pairs, target=0.0), "target=0.0: expected a fraction above 0, up to 1"),
        (lambda: fp.select_features(model, sae, pairs, target=80.0), "target=80.0: expected .*; for 80.0 %, write target=0.8"),
        (lambda: fp.Screen(target=95.0), "target=95.0: expected .*; for 95.0 %, write target=0.95"),
        (lambda: fp.find_circuit(model, pairs, method="greedy", target=90.0), "target=90.0: expected .*, write target=0.9"),
        (lambda: fp.select_features(model, sae, pairs, most=0), "most=0: expected an integer, 1 or more"),
        (lambda: fp.select_features(model, sae, pairs, position=1, progress=False), "no feature of .* differs between the runs at 1"),
        (lambda: fp.interactions(model, two, pairs, features=[1, 2]), r"features=\[1, 2\]: expected .* as nodes of kind 'feature'"),
        (lambda: fp.interactions(model, sae, pairs, combine="add"), "combine='add': expected None"),
        (lambda: fp.interactions(model, two, pairs, combine="sum"), "combine='sum': expected one of add, set"),
        (lambda: fp.interactions(model, sae, pairs, features=[1, 1]), r"features=\[1, 1\]: expected at least two features"),
        (lambda: fp.interactions(model, sae, pairs, features=[1, 24]), "from 0 to 23"),
        (lambda: fp.random_controls(model, sae, pairs, n=0), "n=0: expected an integer, 1 or more"),
        (lambda: fp.random_controls(model, two, pairs), "there are 2 SAEs"),
        (lambda: fp.random_controls(model, sae, pairs, feature=3, position=1, progress=False), "feature 3 of .* is the same"),
        (
            lambda: fp.random_controls(model, sae, pairs, feature=5000, position=3, progress=False),
            rf"feature 5000 of .* is out of range: expected 0 to {FEATURES - 1}",
        ),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=message):
            call()


def test_more_errors(small: Small) -> None:
    sae, pairs, model = small.at(SITE), pairs_of(small), small.model
    silent, quiet = standard(SITE, 2), standard(SITE, 3)
    with torch.no_grad():
        silent.W_dec[:] = 0
        quiet.b_enc[:] = -1e3
    table = fp.rank_features(model, sae, pairs, directions=["denoising"], progress=False)
    for call, message in (
        (lambda: fp.top_k_curve(model, sae, pairs, by="degradation", directions=["denoising"]), "by='degradation' with directions=.*: expected"),
        (lambda: table.top(3, by="degradation"), "by='degradation': expected one of the measured effects, recovery"),
        (lambda: table.top(-1), "n=-1: expected an integer"),
        (lambda: fp.random_controls(model, silent, pairs, feature=3, progress=False), "is zero: expected a feature"),
        (lambda: fp.random_controls(model, quiet, pairs, progress=False), "no feature of .* differs between the runs"),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=message):
            call()


def test_pairs_of_several_lengths_at_each_position(small: Small) -> None:
    """A position that a pair doesn't have is none of its patches."""
    short = fp.Pair((1, 2, 3, 4), (1, 9, 3, 4), (5,), (6,))
    pairs = fp.Pairs((*pairs_of(small), short))
    curve = fp.top_k_curve(small.model, small.at(SITE), pairs, positions="each", most=2, progress=False)
    assert {pair for pair, row in zip(curve.sets.pair, curve.sets.row, strict=True) if curve.sets.nodes[row].position == 6} == {
        0,
        1,
        2,
    }
    ends = curve.table()
    assert list(dict.fromkeys(ends["position"])) == list(dict.fromkeys(position for _, position in curve.sizes))


@pytest.mark.parametrize("call", ["top_k_curve", "select_features", "interactions", "random_controls"])
def test_ctrl_c_is_passed_on(small: Small, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """What is made of several sweeps can't be made of parts of them."""
    monkeypatch.setattr("featpatch.patching.runs.TOKENS_AT_ONCE", 7)
    logits, calls = SuffixPath.logits, [0]

    def interrupted(path: SuffixPath, units: Any, columns: Any) -> Any:
        calls[0] += 1
        if calls[0] == 20:
            raise KeyboardInterrupt
        return logits(path, units, columns)

    monkeypatch.setattr(SuffixPath, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        getattr(fp, call)(small.model, small.at(SITE), pairs_of(small), batch_rows=10, progress=False)
