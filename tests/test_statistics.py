"""Statistics over pairs: numbers by hand, intervals and p-values where the truth is known, stability, breakdown by tag."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy.stats import DegenerateDataWarning, binom, bootstrap, false_discovery_control, kstest, permutation_test
from small import Small

import featpatch as fp
from featpatch.effects import statistics
from featpatch.effects import statistics as significance
from featpatch.effects.frames import number
from featpatch.effects.statistics import MORE_FLIPS, smallest

SITE = "blocks.1.hook_resid_pre"
Array = NDArray[np.float64]


def made(changes: Any, gap: Any, tags: list[dict[str, str]] | None = None, **metadata: Any) -> fp.Effects:
    """A table of features with these changes `[rows, pairs]` in both directions; zeros are not stored."""
    changes, gap = np.asarray(changes, dtype=np.float64), np.asarray(gap, dtype=np.float64)
    row, pair = np.nonzero(changes)
    nodes = tuple(fp.Node(SITE, "feature", index, "all", SITE) for index in range(len(changes)))
    known = {"metric": "m", "directions": ["denoising", "noising"], **({"tags": tags} if tags else {}), **metadata}
    return fp.Effects(nodes, gap, np.zeros(len(gap)), row, pair, changes[row, pair], gap[pair] - changes[row, pair], known)


@pytest.fixture(scope="module")
def tiny() -> fp.Effects:
    """Four features over five pairs, and the error as a fifth row; the last pair has a gap of 0."""
    changes = [[2, 4, 6, 8, 1], [0, 0, 0, 4, 0], [-1, -3, 2, 0, 0], [1, -1, 0, 0, 0], [4, 4, 4, 4, 0]]
    table = made(changes, [4, 8, 8, 8, 0])
    return replace(table, nodes=(*table.nodes[:4], fp.Node(SITE, "error", None, "all", SITE)))


def test_effects_over_the_pairs_in_which_a_row_differs(tiny: fp.Effects) -> None:
    """Gaps 4, 8, 8, 8, 0: row 1 differs in the fourth pair alone, row 2 in the first three, row 3 in the first two."""
    assert list(tiny.changed_pairs) == [5, 1, 3, 2, 4]
    expected = [21 / 28, 4 / 8, -2 / 20, 0, 16 / 28]
    for effect in ("recovery", "degradation"):
        assert list(tiny.pooled(effect, over="changed")) == expected
        for row, pairs in ((0, [0, 1, 2, 3, 4]), (2, [0, 1, 2]), (3, [0, 1]), (4, [0, 1, 2, 3])):
            alone = statistics.interval(tiny.changes(effect).toarray()[row : row + 1, pairs], tiny.gap[pairs])
            np.testing.assert_array_equal(tiny.interval(effect, over="changed")[row], alone[0])
        assert np.isnan(tiny.interval(effect, over="changed")[1]).all()  # a single pair
        np.testing.assert_array_equal(tiny.interval(effect, over="changed")[0], tiny.interval(effect)[0])
    frame = tiny.to_pandas()
    assert list(frame["recovery_where_changed"]) == expected
    np.testing.assert_array_equal(frame[["degradation_where_changed_low", "degradation_where_changed_high"]],
                                  tiny.interval("degradation", over="changed"))  # fmt: skip
    none = made([[1.0, 0.0], [1.0, 1.0]], [0.0, 4.0])
    assert np.isnan(none.pooled("recovery", over="changed")[0])  # its only pair has no gap
    assert np.isnan(none.interval("recovery", over="changed")[0]).all()
    assert none.pooled("recovery", over="changed")[1] == 0.5


def test_rows_are_sorted_by_the_effect_over_their_own_pairs() -> None:
    """Row 1 decides the three pairs in which it differs; row 2 has the largest ratio, in one pair."""
    table = made([[2, 2, 2, 2, 2, 2], [4, 4, 4, 0, 0, 0], [0, 0, 0, 0, 0, 8]], [4.0] * 6)
    assert [node.index for node in table.top().nodes] == [0, 1, 2]
    by = "recovery_where_changed"
    assert [node.index for node in table.top(by=by).nodes] == [0]
    assert [node.index for node in table.top(by=by, least_changed=3).nodes] == [1, 0]
    assert [node.index for node in table.top(by=by, least_changed=1).nodes] == [2, 1, 0]
    assert [node.index for node in table.top(least_changed=2).nodes] == [0, 1]
    assert [node.index for node in table.top(1, by="degradation_where_changed").nodes] == [0]
    with pytest.raises(fp.FeatpatchError, match="least_changed"):
        table.top(least_changed=-1)
    one = replace(table, metadata={**table.metadata, "directions": ["noising"]})
    with pytest.raises(fp.FeatpatchError, match="expected one of the measured effects, degradation, degradation_where_ch"):
        one.top(by=by)


@pytest.mark.parametrize("pairs", [8, 13, 14, 40])
def test_the_smallest_p_value_that_the_changed_pairs_allow(pairs: int) -> None:
    """It is reached where all changes have one sign, and no row is below it."""
    table = made(np.tri(pairs), np.ones(pairs))
    p, smallest = table.p_values("recovery"), table.smallest_p
    if pairs <= 13:
        np.testing.assert_allclose(p, smallest, rtol=1e-12)
        np.testing.assert_allclose(smallest, 2.0 ** (1 - np.arange(1, pairs + 1)), rtol=1e-12)
    else:
        assert (p >= smallest / 2).all()  # signs are drawn
        assert p.min() <= 2 * smallest.min()
        assert smallest.min() == max(1e-5, 2.0 ** (1 - pairs))
    assert np.isnan(made([[1.0]], [1.0]).smallest_p).all()
    assert list(table.to_pandas()["smallest_p"]) == list(smallest)


def test_rows_that_no_test_could_tell_from_chance_do_not_raise_the_q_values_of_others() -> None:
    """100 rows differ in 5 pairs, for which p is never below 0.06; two of three others have the smallest p of 8 pairs."""
    changes = np.zeros((103, 8))
    changes[:100, :5] = 1
    changes[100:102] = 1
    changes[102] = [1, -1] * 4
    table = made(changes, np.ones(8))
    q = table.q_values("recovery")
    assert np.isnan(q[:100]).all()
    np.testing.assert_allclose(q[100:], [1.5 / 128, 1.5 / 128, 1.0])  # p = 2/256 of both, among three tests
    np.testing.assert_array_equal(table.take([101, 0]).q_values("recovery"), q[[101, 0]])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1.0, "1.00"), (0.143, "0.14"), (-0.0534, "-0.053"), (0.00531, "0.0053"), (12.344, "12.34"), (0.999, "1.00"),
     (0.000512, "0.0005"), (-4.4e-6, "0.00"), (float("nan"), "nan")],
)  # fmt: skip
def test_numbers_have_two_significant_digits_within_four_decimals(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(("pairs", "least"), [(3, 0.70), (5, 0.90), (8, 0.92), (32, 0.93)])
def test_intervals_of_few_pairs_cover_the_truth_nearly_as_often_as_they_say(pairs: int, least: float) -> None:
    """Plain percentiles cover 0.84 with 5 pairs. With 3, no interval within the pairs can cover more than 0.75."""
    changes = np.random.default_rng(1).normal(1, 1, (1500, pairs))
    low, high = statistics.interval(changes, np.full(pairs, 2.0)).T
    assert least < float(((low <= 0.5) & (high >= 0.5)).mean()) < 0.97


def test_median_of_ratios_by_hand(tiny: fp.Effects) -> None:
    """Ratios of row 0: 1/2, 1/2, 3/4, 1; of row 1: 0, 0, 0, 1/2; row 2: -1/4, -3/8, 1/4, 0; row 3: 1/4, -1/8, 0, 0."""
    assert list(tiny.median("recovery")) == [0.625, 0, -0.125, 0, 0.5]
    assert list(tiny.median("degradation")) == [0.625, 0, -0.125, 0, 0.5]
    assert tiny.pooled("recovery")[0] == 21 / 28


def test_pairs_with_a_gap_near_zero_have_no_ratio_and_are_counted(tiny: fp.Effects) -> None:
    assert list(tiny.with_gap) == [True, True, True, True, False]
    assert np.isnan(tiny.per_pair("recovery")[:, 4]).all()
    assert np.isfinite(tiny.per_pair("recovery")[:, :4]).all()
    frame = tiny.to_pandas()
    assert set(frame["pairs"]) == {5}
    assert set(frame["pairs_with_gap"]) == {4}
    small = made([[1.0, 1.0, 1.0]], [10.0, 10.0, 0.005])
    assert list(small.with_gap) == [True, True, False]
    assert small.median("recovery") == pytest.approx(0.1)
    none = made([[1.0, 1.0]], [0.0, 0.0])
    assert np.isnan(none.median("recovery")).all()


def test_sign_consistency_counts_changed_pairs_only(tiny: fp.Effects) -> None:
    """Row 2 adds up to -2: two of its three changed pairs are negative. Row 3 adds up to 0 and has no sign.

    With gaps of -1 changes of -1, -2, 5 are effects of 1, 2, -5, pooled -2/3: one of three.
    """
    np.testing.assert_array_equal(tiny.sign_consistency("recovery"), [1, 1, 2 / 3, np.nan, 1])
    np.testing.assert_array_equal(made([[-1.0, -2.0, 5.0]], [-1.0, -1.0, -1.0]).sign_consistency("recovery"), [1 / 3])


def test_unknown_values_are_unknown_everywhere() -> None:
    """An unfinished row is NaN, and is no test that the others would pay for."""
    table = made([[1.0, 2.0, np.nan, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], [4.0] * 6)
    for statistic in ("median", "sign_consistency", "p_values", "q_values"):
        assert np.isnan(getattr(table, statistic)("recovery")) == pytest.approx([True, False])
    assert table.q_values("recovery")[1] == table.p_values("recovery")[1] == 2 / 64


def test_a_single_pair_has_a_ratio_but_no_p_value(bridge: Small) -> None:
    pairs = fp.Pairs.from_tokens(bridge.clean[:1], bridge.corrupted[:1], bridge.correct[:1], bridge.wrong[:1])
    frame = fp.rank_features(bridge.model, bridge.at(SITE), pairs).to_pandas()
    assert frame[["recovery_p", "recovery_q", "degradation_p", "degradation_q"]].isna().to_numpy().all()
    np.testing.assert_allclose(frame["recovery_median"], frame["recovery"], rtol=1e-12)
    assert set(frame["recovery_sign_consistency"].dropna()) == {1.0}
    with pytest.raises(fp.FeatpatchError, match="stability of 1 pair: expected at least 4"):
        made([[1.0], [2.0]], [1.0]).stability("recovery")


def test_one_direction_has_one_set_of_columns(tiny: fp.Effects) -> None:
    frame = replace(tiny, metadata={"directions": ["noising"]}).to_pandas()
    assert not [column for column in frame.columns if column.startswith("recovery")]
    statistics = ["", "_low", "_high", "_median", "_sign_consistency", "_p", "_q"]
    expected = [f"degradation{end}" for end in statistics]
    assert list(frame.columns) == [
        "site", "kind", "index", "position", "sae", *expected, "changed_pairs", "smallest_p",
        *(f"degradation_where_changed{end}" for end in ("", "_low", "_high")), "pairs", "pairs_with_gap", "value", "unit",
    ]  # fmt: skip
    for end, statistic in (
        ("_median", "median"),
        ("_p", "p_values"),
        ("_q", "q_values"),
        ("_sign_consistency", "sign_consistency"),
    ):
        np.testing.assert_array_equal(frame[f"degradation{end}"], getattr(tiny, statistic)("degradation"))


def test_interval_covers_the_truth() -> None:
    """200 tables of 30 pairs, change = 0.3 gap + noise that grows with the gap: true pooled effect 0.3.

    At a coverage of 95 % the hits lie within the binomial's central 99.9 %, 178 to 198 of 200.
    """
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        gap = rng.gamma(4, 1, 30)
        low, high = made([0.3 * gap + rng.normal(0, 0.05, 30) * gap], gap).interval("recovery")[0]
        hits += low <= 0.3 <= high
    least, most = binom.interval(0.999, 200, 0.95)
    assert least <= hits <= most


@pytest.mark.parametrize("pairs", [5, 9, 16])
def test_p_values_are_those_of_scipy(pairs: int) -> None:
    """Exact for 5 and 9 pairs, where scipy enumerates too; drawn for 16, within 5 standard errors of scipy's 99,999 draws."""
    rng = np.random.default_rng(2)
    changes = np.round(rng.normal(rng.normal(0, 0.6, (12, 1)), 1, (12, pairs)), 1) * (rng.random((12, pairs)) < 0.8)
    changes[0], changes[1, 0] = 0, 1.0
    changes[1, 1:] = 0
    expected = permutation_test(
        (changes,),
        lambda x, axis: x.mean(axis),
        permutation_type="samples",
        vectorized=True,
        axis=-1,
        n_resamples=99_999,
        batch=9_999,
        rng=np.random.default_rng(3),
    ).pvalue
    found = significance.sign_flip(changes)
    exact = 2**pairs <= significance.FLIPS
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 if exact else 5 * np.sqrt(0.25 / significance.FLIPS))
    assert list(found[:2]) == [1, 1]
    assert made(changes, np.ones(pairs)).p_values("recovery")[2:] == pytest.approx(found[2:])


def test_p_values_by_hand(tiny: fp.Effects) -> None:
    """Five pairs, of which row 0 changes all the same way: 2 of 2^5 signs. Row 1 changes in one pair: any sign is as far."""
    p = tiny.p_values("recovery")
    assert list(p[:2]) == [2 / 32, 1]
    assert p[3] == 1  # adds up to 0
    assert np.isnan(made([[0.0, 0.0], [1.0, 1.0]], [1.0, 1.0]).p_values("recovery")[0])


@pytest.mark.parametrize("pairs", [2, 13, 14])
def test_signs_of_more_than_13_pairs_are_drawn(pairs: int) -> None:
    """Of changes with the same sign, 2 of 2^n signs are as far from 0; drawn, p is a number of the 99,999 draws and one."""
    (p,) = made(np.ones((1, pairs)), np.ones(pairs)).p_values("recovery")
    draws = p * (significance.MORE_FLIPS + 1)
    assert (p == 2 / 2**pairs) == (pairs < 14)
    assert (draws == pytest.approx(round(draws), abs=1e-9)) == (pairs in (2, 14))
    assert p == pytest.approx(2 / 2**pairs, rel=0.9)


def test_rare_rows_are_drawn_more_often() -> None:
    """60 pairs with the same sign are never seen again: p is one in all draws, of the second and larger number of draws."""
    changes = np.abs(np.random.default_rng(4).normal(1, 0.1, (2, 60)))
    changes[1] *= np.where(np.arange(60) % 2, 1, -1)
    p = made(changes, np.ones(60)).p_values("recovery")
    assert p[0] == 1 / (significance.MORE_FLIPS + 1)
    assert p[1] > 0.1


@pytest.mark.parametrize("draws", [1, significance.DRAWS, 2 * significance.DRAWS + 1])
def test_so_many_signs_are_drawn(draws: int) -> None:
    """Where nothing changes every draw is as large; also of more draws than are in memory at a time."""
    assert significance._as_large_of(np.zeros((2, 3)), draws, 0).tolist() == [draws] * 2


def test_p_values_are_uniform_without_an_effect_and_small_with_one() -> None:
    """Skewed sizes, fair signs: 2,000 rows against the uniform distribution (Kolmogorov-Smirnov, p above 0.01)."""
    rng = np.random.default_rng(5)
    null = rng.gamma(1, 1, (2000, 24)) * rng.choice([-1.0, 1.0], (2000, 24))
    assert kstest(made(null, np.ones(24)).p_values("recovery"), "uniform").pvalue > 0.01
    effect = rng.normal(1, 1, (200, 24))
    assert np.median(made(effect, np.ones(24)).p_values("recovery")) < 1e-3
    assert np.median(made(-effect, np.ones(24)).p_values("recovery")) < 1e-3


def test_false_discoveries_are_controlled() -> None:
    """40 tables of 180 nulls and 20 effects: at q <= 0.1 the mean share of false discoveries stays near 0.1 * 180 / 200."""
    rng, shares, found = np.random.default_rng(6), [], []
    for _ in range(40):
        changes = rng.normal(0, 1, (200, 20))
        changes[:20] += 1
        q = made(changes, np.ones(20)).q_values("recovery")
        shares.append((q[20:] <= 0.1).sum() / max((q <= 0.1).sum(), 1))
        found.append((q[:20] <= 0.1).mean())
    assert np.mean(shares) <= 0.09 + 3 * np.std(shares) / np.sqrt(40)
    assert np.mean(shares) >= 0.03  # and the rows that are let through are not fewer than promised
    assert np.mean(found) > 0.8


def test_q_values_are_over_all_features_that_were_ranked(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    table = made(rng.normal(np.linspace(1.5, 0, 40)[:, None], 1, (40, 10)), np.ones(10))
    table = replace(table, nodes=(*table.nodes[:39], fp.Node(SITE, "error", None, "all", SITE)))
    p, q = table.p_values("recovery"), table.q_values("recovery")
    np.testing.assert_array_equal(q[:39], false_discovery_control(p[:39]))
    assert np.isnan(q[39])
    assert not np.isnan(p[39])
    top = table.top(5)
    order = np.argsort(-table.pooled("recovery")[:39], kind="stable")[:5]
    np.testing.assert_array_equal(top.q_values("recovery"), q[order])
    np.testing.assert_array_equal(top.take([3, 1]).to_pandas()["recovery_q"], q[order[[3, 1]]])
    assert (q[order] > false_discovery_control(p[order])).any()
    again = fp.Effects.load(top.save(tmp_path / "top.safetensors"))
    assert again.rows_ranked == 39
    assert (again.q_values("recovery") >= q[order]).all()
    np.testing.assert_array_equal(fp.Effects.load(table.save(tmp_path / "all.safetensors")).q_values("recovery"), q)


def test_q_values_of_some_pairs_are_over_these_pairs() -> None:
    rng = np.random.default_rng(8)
    changes = rng.normal(np.linspace(1.5, 0, 30)[:, None], 1, (30, 12))
    changes[3, :6] = 0
    table, part = made(changes, np.ones(12)), made(np.delete(changes, 3, 0)[:, :6], np.ones(6))
    np.testing.assert_array_equal(table.of_pairs(range(6)).q_values("recovery"), part.q_values("recovery"))
    first = table.take([0, 3]).of_pairs(range(6))
    np.testing.assert_array_equal(first.q_values("recovery"), part.q_values("recovery")[:1])


def test_stability_of_a_strong_signal_and_of_noise() -> None:
    rng = np.random.default_rng(9)
    gap = rng.uniform(4, 6, 40)
    strong = made(np.linspace(0, 1, 200)[:, None] * gap + rng.normal(0, 0.01, (200, 40)), gap).stability("recovery")
    assert strong.correlation > 0.99
    assert strong.overlap > 0.9
    noise = made(rng.normal(0, 1, (2000, 40)), gap).stability("recovery")
    assert abs(noise.correlation) < 3 * np.sqrt(2 / 2000)  # of the same pairs' sums of squares, 3 standard errors
    assert noise.low < 0 < noise.high
    assert noise.overlap == pytest.approx(noise.chance, abs=0.03)
    assert (noise.chance, noise.top, noise.features, noise.pairs, noise.splits) == (0.01, 20, 2000, 40, 100)


def test_stability_by_hand() -> None:
    """Pairs 0 and 1 order three features one way, 2 and 3 the other: halves {0, 1} and {2, 3} give -1.

    In the other two splits a half has one pair of each: all features sum to 4, which ranks nothing and counts as 0. Of the
    200 splits a third is expected to be the first kind.
    """
    found = made([[1, 1, 3, 3], [2, 2, 2, 2], [3, 3, 1, 1]], [2, 2, 2, 2]).stability("recovery", splits=200, top=1, seed=1)
    assert found.correlation == pytest.approx(-1 / 3, abs=0.1)
    assert (found.low, found.high) == pytest.approx((-1, 0))
    assert found.overlap == pytest.approx(2 / 3, abs=0.1)  # ties are in the table's order
    assert found == made([[1, 1, 3, 3], [2, 2, 2, 2], [3, 3, 1, 1]], [2, 2, 2, 2]).stability(
        "recovery", splits=200, top=1, seed=1
    )
    assert np.isnan(made([[1, 2, 1, 2], [3, 3, 3, 3]], [1, 1, 1, 1]).stability("recovery").overlap)


def test_the_top_is_the_largest_effects_also_with_a_negative_gap() -> None:
    """The first feature is always the largest; which of the others is the smallest differs between the halves."""
    changes = np.array([[9, 9, 9, 9], [2, 1, 2, 1], [1, 2, 1, 2]])
    found = made(changes, [3] * 4).stability("recovery", top=1)
    assert found.overlap == 1
    assert found.low < 1
    assert made(-changes, [-3] * 4).stability("recovery", top=1) == found
    assert made(-changes, [3] * 4).stability("recovery", top=1).overlap < 1
    assert made([[9] * 4, [6] * 4, [1] * 4], [9] * 4).stability("recovery", top=2).overlap == 1


def test_stability_ranks_known_features_only(tiny: fp.Effects) -> None:
    assert tiny.stability("recovery").features == 4
    unknown = made([[1, 2, 1, np.nan], [3, 3, 3, 4], [1, 1, 1, 2]], [1, 1, 1, 1])
    assert unknown.stability("recovery").features == 2
    with pytest.raises(fp.FeatpatchError, match="stability of 3 pairs: expected at least 4, two for each half"):
        unknown.of_pairs([0, 1, 2]).stability("recovery")
    with pytest.raises(fp.FeatpatchError, match="stability of 1 feature with known values: expected at least 2"):
        unknown.take([0, 1]).stability("recovery")
    with pytest.raises(fp.FeatpatchError, match="splits=0: expected an integer, 1 or more"):
        tiny.stability("recovery", splits=0)


@pytest.fixture(scope="module")
def tagged() -> fp.Effects:
    """Three features over 24 pairs of two corruptions and three templates; feature 1 works under `swap` alone."""
    rng = np.random.default_rng(10)
    swap, gap = np.arange(24) % 2 == 0, rng.uniform(8, 12, 24)
    ratios = np.stack([np.full(24, 0.5), np.where(swap, 0.4, 0.0), np.full(24, 0.1)])
    changes = (ratios + rng.normal(0, 0.05, (3, 24)) * (ratios != 0)) * gap
    tags = [{"corruption": "swap" if s else "fresh", "template": str(i % 3)} for i, s in enumerate(swap)]
    return made(changes, gap, tags, pairs="digest")


def test_by_tag_pools_within_each_value(tagged: fp.Effects) -> None:
    table = tagged.by_tag("corruption", "recovery")
    for value, part in (("swap", tagged.of_pairs(range(0, 24, 2))), ("fresh", tagged.of_pairs(range(1, 24, 2)))):
        rows = [row for row, node in enumerate(tagged.nodes) if node in part.nodes]
        np.testing.assert_allclose(table[f"recovery_{value}"][rows], part.pooled("recovery"), rtol=1e-12)
        for end, values in zip(("low", "high"), part.interval("recovery").T, strict=True):
            np.testing.assert_allclose(table[f"recovery_{value}_{end}"][rows], values, rtol=1e-12)
    assert list(table["recovery_swap_rank"]) == [1, 2, 3]
    assert list(table["recovery_fresh_rank"]) == [1, 3, 2]
    assert table["recovery_fresh"][1] == 0
    assert list(tagged.take([2, 1]).by_tag("corruption", "recovery")["recovery_fresh_rank"]) == [2, 3]


def test_units_of_the_metric_make_no_difference(tagged: fp.Effects) -> None:
    """A gap is small beside the metric's own size, not beside 1."""
    columns = {name: getattr(tagged, name) * 1e-9 for name in ("clean", "corrupted", "denoised", "noised")}
    pd.testing.assert_frame_equal(
        replace(tagged, **columns).by_tag("corruption", "recovery"), tagged.by_tag("corruption", "recovery")
    )


def test_stability_of_a_loss() -> None:
    """The same with the sign of everything turned, as for a metric that is smaller where the model is right."""
    rng = np.random.default_rng(5)
    changes, gap = rng.normal(0, 1, (9, 1)) + rng.normal(0, 0.5, (9, 20)), rng.uniform(1, 2, 20)
    assert made(-changes, -gap).stability("recovery") == made(changes, gap).stability("recovery")


def test_depends_is_flagged_where_one_corruption_alone_works(tagged: fp.Effects) -> None:
    assert list(tagged.by_tag("corruption", "recovery")["depends"]) == [False, True, False]
    fresh_first = tagged.of_pairs(range(1, 24)).by_tag("corruption", "recovery")
    assert list(fresh_first.columns).index("recovery_fresh") < list(fresh_first.columns).index("recovery_swap")
    assert list(fresh_first["depends"]) == [False, True, False]
    assert list(tagged.by_tag("template", "degradation")["depends"]) == [False, False, False]
    error = replace(tagged, nodes=(tagged.nodes[0], fp.Node(SITE, "error", None, "all", SITE), tagged.nodes[2]))
    table = error.by_tag("corruption", "recovery")
    assert not table["depends"].any()
    assert list(table["recovery_fresh_rank"].isna()) == [False, True, False]


def test_by_tag_says_nothing_where_nothing_can_be_said() -> None:
    """Two pairs whose gaps cancel have no pooled effect, one pair has no interval."""
    tags = [{"corruption": value} for value in ("a", "a", "b", "b", "c")] + [{"template": "1"}]
    table = made([[1, 2, 1, 1, 3, 9], [1, 1, 2, 2, 1, 9]], [4, 4, 3, -3, 4, 1], tags).by_tag("corruption", "recovery")
    assert list(table["recovery_a"]) == [3 / 8, 2 / 8]
    assert table[["recovery_b", "recovery_b_low", "recovery_b_high", "recovery_b_rank"]].isna().to_numpy().all()
    assert list(table["recovery_c"]) == [3 / 4, 1 / 4]
    assert list(table["recovery_c_rank"]) == [1, 2]
    assert table[["recovery_c_low", "recovery_c_high"]].isna().to_numpy().all()
    assert not table["depends"].any()


def test_by_tag_refuses_what_it_cannot_compare(tagged: fp.Effects, tiny: fp.Effects) -> None:
    with pytest.raises(fp.FeatpatchError, match=r"no pair has a tag 'language': expected one of corruption, template"):
        tagged.by_tag("language", "recovery")
    with pytest.raises(fp.FeatpatchError, match=r"expected one of \(the pairs have no tags\); tag the pairs"):
        tiny.by_tag("corruption", "recovery")
    with pytest.raises(fp.FeatpatchError, match="tag 'corruption' is 'swap' in all pairs that have it: expected at least 2"):
        tagged.of_pairs(range(0, 24, 2)).by_tag("corruption", "recovery")


def test_tags_travel_with_the_pairs(bridge: Small, tmp_path: Path) -> None:
    plain = fp.Pairs.from_tokens(bridge.clean, bridge.corrupted, bridge.correct, bridge.wrong)
    assert "tags" not in fp.rank_features(bridge.model, bridge.at(SITE), plain).metadata
    tags = [{"corruption": "ab"[index % 2], "template": str(index)} for index in range(len(plain))]
    pairs = fp.Pairs(tuple(replace(pair, tags=tag) for pair, tag in zip(plain, tags, strict=True)))
    effects = fp.rank_features(bridge.model, bridge.at(SITE), pairs)
    assert effects.metadata["tags"] == tags
    again = fp.Effects.load(effects.save(tmp_path / "effects.safetensors"))
    assert again.metadata["tags"] == tags
    assert again.of_pairs([2, 0]).metadata["tags"] == [tags[0], tags[2]]
    assert again.metadata["tags"] == tags
    assert again.by_tag("corruption", "recovery").equals(effects.by_tag("corruption", "recovery"))


def interval_of_scipy(change: Array, gap: Array) -> Array:
    """The slow reference: scipy's bootstrap of the ratio of means, for one row."""
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        found = bootstrap(
            (change, gap),
            lambda change, gap, axis: change.mean(axis) / gap.mean(axis),
            paired=True,
            vectorized=True,
            n_resamples=999,
            confidence_level=statistics.expanded(len(change)),
            method="percentile",
            rng=np.random.default_rng(0),
        )
    return np.array(found.confidence_interval)


@pytest.mark.parametrize("pairs", [2, 3, 4, 8, 31])
@pytest.mark.parametrize("gaps", ["positive", "signed", "of each row", "cancelling"])
def test_intervals_are_those_of_scipy(pairs: int, gaps: str) -> None:
    """The rows differ in all pairs, in some, in one or in none, some values are infinite, and there is more than one chunk."""
    rng = np.random.default_rng(pairs)
    rows = statistics.CHUNK + 40
    change = rng.normal(size=(rows, pairs)) * (rng.random((rows, pairs)) < rng.choice([0.0, 0.2, 1.0], (rows, 1)))
    change[[0, 1], 0], change[2, :2] = [np.inf, -np.inf], [np.inf, -np.inf]
    gap = {
        "positive": rng.gamma(4, 1, pairs),
        "signed": rng.normal(1, 1, pairs),
        "of each row": rng.gamma(4, 1, (rows, pairs)),
        "cancelling": np.where(np.arange(pairs) % 2, 2.0, -2.0),
    }[gaps]
    expected = np.stack([interval_of_scipy(*row) for row in zip(change, np.broadcast_to(gap, change.shape), strict=True)])
    found = statistics.interval(change, gap)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert gaps != "positive" or np.isfinite(found[3:]).all()


def test_taken_rows_have_the_statistics_of_the_whole_table() -> None:
    """This holds after rows are taken twice too, and their places in the table are those that a search for each node finds."""
    table = made(np.random.default_rng(0).normal(size=(30, 6)), np.ones(6))
    taken = table.take(np.arange(29, 0, -1)).take([3, 20, 0])
    expected = [table.nodes.index(node) for node in taken.nodes]
    assert taken.rows_in_whole().tolist() == replace(taken).rows_in_whole().tolist() == expected
    most = table.take(np.arange(29, 0, -1))  # computes the intervals of the whole table
    alone = np.concatenate([statistics.interval(row[None], table.gap) for row in table.changes("recovery").toarray()])
    np.testing.assert_array_equal(taken.interval("recovery"), alone[expected])
    np.testing.assert_array_equal(most.interval("recovery"), alone[:0:-1])
    np.testing.assert_array_equal(table.interval("recovery"), alone)
    np.testing.assert_array_equal(most.take([3, 20, 0]).interval("recovery"), alone[expected])


def test_rows_with_missing_values_have_no_interval() -> None:
    """And leave the others as they are; without warnings, which are errors here."""
    change, gap = np.array([[1.0, 2.0, 4.0], [1.0, np.nan, 2.0], [0.0, 1.0, 0.0]]), np.array([4.0, 4.0, 4.0])
    found = statistics.interval(change, gap)
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[[0, 2]], statistics.interval(change[[0, 2]], gap))
    table = made([[1.0, 2.0], [1.0, 1.0], [0.0, 1.0]], [4.0, 4.0])  # one value is missing in each direction
    part = replace(table, denoised=np.where(np.arange(5) == 1, np.nan, table.denoised))
    part = replace(part, noised=np.where(np.arange(5) == 2, np.nan, table.noised))
    assert part.known().nodes == table.nodes[2:]


def test_the_smallest_p_value_is_that_of_all_signs_or_of_all_draws() -> None:
    """Two of 2^n signs reach the sum of n equal changes; where signs are drawn, one of the draws at least."""
    np.testing.assert_array_equal(smallest(np.array([0, 1, 3]), 3), [1, 1, 0.25])
    np.testing.assert_array_equal(smallest(np.array([5, 60]), 60), [1 / 16, 1 / (MORE_FLIPS + 1)])
