"""The table of effects: pooling, intervals, order, summary and storage."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pandas as pd
import pytest
from small import Small
from test_statistics import made

import featpatch as fp
from featpatch.effects.collector import without_folder
from featpatch.errors import decimal

SITE = "blocks.1.hook_resid_pre"


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


@pytest.fixture(scope="module")
def table() -> fp.Effects:
    """Three features over four pairs; feature 7 differs in two pairs only. Written out so that every number is plain."""
    nodes = (*(fp.Node(SITE, "feature", index, "all", SITE) for index in (3, 7, 9)), fp.Node(SITE, "error", None, "all", SITE))
    clean, corrupted = np.array([10.0, 8.0, 6.0, 4.0]), np.array([2.0, 0.0, -2.0, 0.0])
    row, pair = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2, 2, 3]), np.array([0, 1, 2, 3, 1, 3, 0, 1, 2, 3, 2])
    denoised = np.array([6.0, 4.0, 2.0, 4.0, 8.0, 2.0, 1.0, 0.0, -2.0, -3.0, 5.0])
    noised = np.array([10.0, 8.0, 2.0, 4.0, 0.0, 0.0, 10.0, 8.0, 6.0, 4.0, 6.0])
    metadata = {"directions": ["denoising", "noising"], "metric": "logit_diff"}
    return fp.Effects(nodes, clean, corrupted, row, pair, denoised, noised, metadata)


def test_one_pair_has_no_interval(bridge: Small) -> None:
    pairs = fp.Pairs.from_tokens(bridge.clean[:1], bridge.corrupted[:1], bridge.correct[:1], bridge.wrong[:1])
    frame = fp.rank_features(bridge.model, bridge.at(SITE), pairs).to_pandas()
    assert frame[["recovery_low", "recovery_high"]].isna().to_numpy().all()
    assert frame["recovery"].notna().all()


def test_top_orders_features_by_effect(table: fp.Effects) -> None:
    assert [node.index for node in table.top(2).nodes] == [3, 7]
    assert [node.index for node in table.top(2, by="degradation").nodes] == [7, 3]
    assert [node.kind for node in table.top(4, kind=None).nodes] == ["feature", "feature", "error", "feature"]
    assert table.top(2, by="degradation").pooled("recovery") == pytest.approx([10 / 28, 16 / 28])
    with pytest.raises(fp.FeatpatchError, match=r"unknown columns 'layer': expected some of site, kind"):
        table.where(layer=1)
    with pytest.raises(fp.FeatpatchError, match="kind='featur': expected one of feature, error, all_features"):
        table.top(2, kind="featur")
    assert len(table.where(kind="head")) == 0
    with pytest.raises(fp.FeatpatchError, match="effect 'strength' is unknown"):
        table.pooled("strength")


@pytest.mark.parametrize("rows", [[0.0, 1.0], [[0, 1]], ["a"], [-1], [4], [1, 1], [True, False]])
def test_rows_that_can_not_be_taken(table: fp.Effects, rows: list[object]) -> None:
    with pytest.raises(fp.FeatpatchError, match="expected (a list of )?indices"):
        table.take(np.array(rows))
    assert table.take([3, 0]).nodes == (table.nodes[3], table.nodes[0])
    assert table.take([False, False, True, False]).nodes == table.nodes[2:3]


def test_pandas_has_a_row_per_node(table: fp.Effects) -> None:
    frame = table.to_pandas()
    assert list(frame["index"][:3]) == [3, 7, 9]
    assert set(frame["value"]) == {"exact"}
    assert list(frame["changed_pairs"]) == [4, 2, 4, 1]
    assert (frame["recovery_low"] <= frame["recovery"]).all()
    assert (frame["recovery"] <= frame["recovery_high"]).all()
    assert "0.57" in repr(table)
    assert "<table" in table._repr_html_()


@pytest.mark.parametrize("rows", [1, 20, 21, 45])
def test_twenty_rows_are_shown(rows: int) -> None:
    nodes, none = tuple(fp.Node(SITE, "feature", index) for index in range(rows)), np.zeros(0)
    entries = none.astype(np.int64)
    table = fp.Effects(nodes, np.ones(2), np.zeros(2), entries, entries, none, none, {"directions": ["noising"], "metric": "m"})
    assert table.finished
    first, *lines = repr(table).splitlines()
    assert first == f"exact effects over 2 pairs{', the first 20 of' if rows > 20 else ','} {rows} row{'s' * (rows > 1)}:"
    assert [line.split()[0] for line in lines] == ["site", *[SITE] * min(rows, 20)]


def test_one_direction_leaves_the_other_out(bridge: Small) -> None:
    pairs = fp.Pairs.from_tokens(bridge.clean, bridge.corrupted, bridge.correct, bridge.wrong)
    both = fp.rank_features(bridge.model, bridge.at(SITE), pairs)
    one = fp.rank_features(bridge.model, bridge.at(SITE), pairs, directions=["noising"])
    assert "recovery" not in one.to_pandas()
    np.testing.assert_allclose(one.pooled("degradation"), both.pooled("degradation"), rtol=0, atol=1e-12)
    assert one.top(1).nodes == both.top(1, by="degradation").nodes
    assert list(one.sites().columns[4:]) == [
        f"degradation_{part}" for part in ("activation", "all_features", "error", "interaction")
    ]


def test_sites_has_whole_features_and_error_side_by_side(bridge: Small) -> None:
    pairs = fp.Pairs.from_tokens(bridge.clean, bridge.corrupted, bridge.correct, bridge.wrong)
    effects = fp.rank_features(bridge.model, bridge.saes, pairs, positions=[3, 5])
    summary = effects.sites()
    assert len(summary) == 2 * len(bridge.saes)
    for _, row in summary.iterrows():
        for kind in ("all_features", "error"):
            part = effects.where(kind=kind, sae=row["sae"], position=row["position"])
            assert row[f"recovery_{kind}"] == part.pooled("recovery")[0]
        left = row["recovery_activation"] - row["recovery_all_features"] - row["recovery_error"]
        assert row["recovery_interaction"] == pytest.approx(left, abs=1e-12)
        features = effects.where(kind="feature", sae=row["sae"], position=row["position"])
        assert row["changed_features"] == len(features)


def test_what_has_no_row_has_no_effect_in_the_summary(table: fp.Effects) -> None:
    (row,) = table.sites().to_dict("records")
    assert (row["sae"], row["site"], row["position"], row["changed_features"]) == (SITE, SITE, "all", 3)
    assert (row["recovery_activation"], row["recovery_all_features"], row["recovery_error"]) == (0, 0, 0.25)
    assert row["recovery_interaction"] == -0.25
    assert row["degradation_interaction"] == 0


def test_saved_and_loaded_is_the_same(bridge: Small, tmp_path: Path) -> None:
    pairs = fp.Pairs.from_tokens(bridge.clean, bridge.corrupted, bridge.correct, bridge.wrong)
    effects = fp.rank_features(bridge.model, bridge.at(SITE), pairs, positions=[3, 6])
    again = fp.Effects.load(effects.save(tmp_path / "deep" / "effects.safetensors"))
    assert again.nodes == effects.nodes
    assert again.value == "exact"
    for column in ("clean", "corrupted", "row", "pair", "denoised", "noised"):
        assert np.array_equal(getattr(again, column), getattr(effects, column))
    assert again.metadata == json.loads(json.dumps(effects.metadata))
    assert again.metadata["pairs"] == pairs.digest()
    assert set(again.metadata["versions"]) == {"featpatch", "featpatch's code", "torch", "sae-lens", "transformer-lens"}


def test_positions_in_long_prompts_are_loaded_again(tmp_path: Path) -> None:
    table = made([[1.0], [2.0], [3.0]], [4.0], positions=[100_003, -1, "end"])
    nodes = tuple(fp.Node(SITE, "feature", 2**40, place, SITE) for place in (100_003, -1, "end"))
    assert fp.Effects.load(replace(table, nodes=nodes).save(tmp_path / "effects")).nodes == nodes


def test_digests_tell_pairs_and_models_apart(bridge: Small) -> None:
    def run(slots: slice, which: int) -> dict[str, object]:
        pairs = fp.Pairs.from_tokens(bridge.clean[slots], bridge.corrupted[slots], bridge.correct[slots], bridge.wrong[slots])
        metadata = fp.rank_features(bridge.model, bridge.saes[which], pairs).metadata
        return {name: value for name, value in metadata.items() if name != "finished_at"}

    one, same, other = run(slice(0, 2), 0), run(slice(0, 2), 0), run(slice(1, 3), 1)
    assert one == same
    assert one["model"] == other["model"]
    assert one["pairs"] != other["pairs"]
    assert list(one["saes"].values()) != list(other["saes"].values())  # type: ignore[attr-defined]


def next_steps() -> dict[str, tuple[Callable[[Any, fp.Pairs, fp.Effects], Any], str]]:
    """Mistakes, each as a function of a small model, pairs and a table, with what the error says to do next."""
    feature, head, site = fp.feature(SITE, 3, 3), fp.head(1, 3), "blocks.3.hook_resid_pst"
    return {
        "position": (lambda m, p, e: e.where(position="S3"), "position='S3' was not measured: expected one of 3, 1$"),
        "site": (lambda m, p, e: e.where(site=f"{SITE}x"), f"expected one of {SITE}; did you mean '{SITE}'"),
        "sae": (lambda m, p, e: e.where(sae="other"), f"sae='other' was not measured: expected one of {SITE}$"),
        "array": (lambda m, p, e: e.where(position=np.array([3, 1])), "position is of type ndarray: expected str or int"),
        "taken": (lambda m, p, e: e.top(1).where(position=5), "position=5 was not measured"),
        "no saes": (
            lambda m, p, e: fp.rank_nodes(m, p, [feature]),
            "^node .* is of the SAE .* no SAEs were passed: .* pass saes=",
        ),
        "swapped": (lambda m, p, e: fp.rank_features(m, p, [m]), "^pairs is a list and saes is a Pairs: .* swap the two"),
        "swapped nodes": (lambda m, p, e: fp.rank_nodes(m, [head], p), "pairs is a list and nodes is a Pairs"),
        "swapped model": (lambda m, p, e: fp.rank_components(p, m), "and model is a Pairs"),
        "logit": (lambda m, p, e: fp.rank_paths(m, p, senders=[head], receivers=["logit"]), "write 'logits' for the output"),
        "one node": (lambda m, p, e: fp.rank_nodes(m, p, head), r"write nodes=\[...\]"),
        "by": (lambda m, p, e: e.top(2, by="prob"), r"write effects.for_metric\('prob'\).top"),  # type: ignore[arg-type]
        "drop": (lambda m, p, e: p.drop("fail"), r"write pairs.drop\(pairs.check\(model\), 'fail'\)"),  # type: ignore[arg-type]
        "sites": (lambda m, p, e: fp.rank_components(m, p, sites=site), rf"\['{site}'\]: .* mean 'hook_resid_post'"),
        "short": (lambda m, p, e: fp.rank_components(m, p, sites=["resid_pst"]), "did you mean 'resid_post'"),
        "task": (lambda m, p, e: fp.load_demo(progress=False).pairs("iio"), "did you mean 'ioi'"),
    }


@pytest.mark.parametrize("mistake", next_steps())
def test_errors_say_what_to_do_next(mistake: str, bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing checks annotations, as outside these tests."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    effects = fp.rank_features(
        bridge.model, bridge.at(SITE), pairs_of(bridge), positions=[3, 1], metric=["logit_diff", "prob"], progress=False
    )
    make, message = next_steps()[mistake]
    with pytest.raises(fp.FeatpatchError, match=message):
        make(bridge.model, pairs_of(bridge), effects)


def test_values_that_were_studied_may_have_no_rows(bridge: Small) -> None:
    """The prompts are the same at position 1, so no node differs there; whole tables and those of components are no different."""
    pairs = pairs_of(bridge)
    for positions in ([3, 1], "each"):
        effects = fp.rank_features(bridge.model, bridge.at(SITE), pairs, positions=positions, progress=False)
        assert 1 not in {node.position for node in effects.nodes}
        assert not len(effects.where(position=1))
        assert not len(effects.where(sae="", kind="feature"))
        assert len(effects.top(1).where(position=3, site=SITE, sae=SITE)) == 1


def test_labels_that_some_pairs_lack(bridge: Small) -> None:
    """The error names the first of these pairs, and their number."""
    pairs = fp.Pairs(tuple(replace(pair, labels={"S2": 3} if slot != 1 else {}) for slot, pair in enumerate(pairs_of(bridge))))
    calls: list[Callable[..., Any]] = [
        lambda **given: fp.rank_features(bridge.model, bridge.at(SITE), pairs, **given),
        lambda **given: fp.rank_features(bridge.model, bridge.at(SITE), pairs, method="atp", **given),
        lambda positions: fp.rank_nodes(bridge.model, pairs, [fp.head(1, 3, position=positions[0])]),
        lambda positions: fp.find_circuit(bridge.model, pairs, positions=positions),
    ]
    for call in calls:
        with pytest.raises(
            fp.FeatpatchError, match="^pair 1 has no label 'S2', like 1 of 3 pairs: expected it in every pair; add"
        ):
            call(positions=["S2"])


def test_no_minus_zero() -> None:
    numbers = (-0.001, 0.0, -0.005001, -0.1, float("nan"), float("-inf"), -10.0)
    assert [decimal(number) for number in numbers] == ["0.00", "0.00", "-0.01", "-0.10", "nan", "-inf", "-10.00"]
    assert [decimal(number, ".0%") for number in (-0.001, -0.1, -1.0)] == ["0%", "-10%", "-100%"]


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("org/model", "org/model"),
        ("/a/b/model", "model"),
        ("../model", "model"),
        ("~/a/model", "model"),
        (r"C:\a\model", "model"),
    ],
)
def test_names_in_files_have_no_folder_of_this_machine(name: str, kept: str) -> None:
    assert without_folder(name) == kept


def test_the_summary_of_rows_is_that_of_the_whole_table(small: Small) -> None:
    """Rows that were taken have the whole's numbers; what was not measured is unknown, and what is unchanged has no effect."""
    saes, options = [small.at(SITE), small.at("blocks.2.hook_resid_pre")], {"progress": False}
    pairs = fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)
    whole = fp.rank_features(small.model, saes, pairs, **options)
    summary = whole.sites().set_index("sae")
    part = whole.where(sae=SITE).top(2, kind="feature").sites().set_index("sae")
    pd.testing.assert_frame_equal(part, summary.loc[[SITE]])
    assert summary.notna().to_numpy().all()
    nodes = list(whole.top(3, kind="feature").nodes)
    for table in (
        fp.rank_nodes(small.model, pairs, nodes, saes=saes, **options),
        fp.group_features(small.model, saes, pairs, {"a": nodes}, **options).effects,
    ):
        numbers = table.sites().filter(like="recovery")
        assert numbers.isna().to_numpy().all()
        with pytest.raises(fp.FeatpatchError, match="nodes that were named, or sets of nodes: expected all features"):
            fp.compare(table, fp.rank_components(small.model, pairs, sites="resid_pre", **options))
    errors = fp.rank_nodes(small.model, pairs, [fp.Node(SITE, "error")], saes=saes, together=False, **options).sites()
    assert errors["recovery_error"].notna().all()
    assert errors[["recovery_activation", "recovery_all_features"]].isna().to_numpy().all()
    kept = [node for node in whole.nodes if node.kind == "feature"]
    assert fp.rank_nodes(small.model, pairs, kept, saes=saes, **options).sites().filter(like="recovery").isna().to_numpy().all()
