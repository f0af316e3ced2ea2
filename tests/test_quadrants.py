"""Quadrants: of tables by hand, and of circuits that are AND gates, OR gates and backups because they were built so."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from constructed import LAST, Constructed, and_gate, backup, or_gate
from numpy.typing import NDArray
from rich.console import Console
from test_statistics import made

import featpatch as fp
from featpatch.effects import statistics
from featpatch.reporting.terminal import ranked

HEADS = "blocks.0.attn.hook_z"
NAN = float("nan")


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.0, NAN])
def test_a_threshold_that_decides_nothing_is_refused(threshold: float) -> None:
    with pytest.raises(fp.FeatpatchError, match=f"threshold={threshold}: expected a number between 0 and 1"):
        made([[1.0, 1.0]], [1.0, 1.0]).with_threshold(threshold)


def test_the_threshold_decides() -> None:
    """Both effects of the rows are exactly 0.5 and 0.05."""
    table = made([[2.0, 4.0], [0.2, 0.4]], [4.0, 8.0])
    assert table.with_threshold(0.1).quadrants() == ["both directions", "below threshold"]
    assert table.with_threshold(0.6).quadrants() == ["below threshold", "below threshold"]
    assert table.quadrants() == table.with_threshold(0.04).quadrants() == ["both directions", "both directions"]
    assert list(table.with_threshold(0.1).to_pandas()["quadrant"]) == ["both directions", "below threshold"]


def hook_point(metric: str = "m", scale: float = 1.0) -> fp.Effects:
    """Features with exactly 0.02 and 0.001 of the behaviour at a hook point that carries 0.5 of it, and the whole of it."""
    table = made(scale * np.array([[0.04, 0.08], [0.002, 0.004], [1.0, 2.0]]), [2.0, 4.0], metric=metric)
    return replace(table, nodes=(*table.nodes[:2], fp.Node(table.nodes[0].site, "activation", None, "all")))


def test_the_threshold_is_a_share_of_what_the_hook_point_carries(tmp_path: Path) -> None:
    table = hook_point()
    assert list(table.carried("recovery")) == [0.5, 0.5, 1.0]
    above, below = "both directions", "below threshold"
    assert table.quadrants() == [above, below, above]  # at 1 % of 0.5
    assert table.with_threshold(0.03).quadrants() == [above, below, above]
    assert table.with_threshold(0.05).quadrants() == [below, below, above]
    assert table.with_threshold(0.0015).quadrants() == [above, above, above]
    # rows that were taken, and saved and loaded without the whole activation, keep it
    features = replace(table, others={"prob": hook_point("prob", 0.5)}).with_threshold(0.03).take([1, 0])
    assert features.quadrants() == [below, above]
    loaded = fp.Effects.load(features.save(tmp_path / "few.safetensors"))
    for name, carried in (("m", 0.5), ("prob", 0.25)):
        assert loaded.for_metric(name).threshold == 0.03
        assert list(loaded.for_metric(name).carried("recovery")) == [carried] * 2
        assert loaded.for_metric(name).quadrants() == features.for_metric(name).quadrants()
        assert loaded.for_metric(name).take([1]).quadrants() == [above]
    assert loaded.for_metric("prob").to_pandas()["quadrant"][1] == above  # 0.01 of 0.25
    assert loaded.nodes == features.nodes
    assert len(loaded.to_pandas()) == 2
    # and the share follows the pairs that are chosen
    one = replace(table, denoised=table.denoised * [1, 1, 1, 1, 3, 1]).take([0])
    again = fp.Effects.load(one.save(tmp_path / "one.safetensors"))
    assert one.of_pairs([0]).carried("recovery") == again.of_pairs([0]).carried("recovery") == [1.5]
    # also where the whole activation was not run before an interruption
    cut = replace(
        table, denoised=np.where(table.row == 2, np.nan, table.denoised), metadata={**table.metadata, "finished": False}
    )
    known = fp.Effects.load(cut.take([0, 1]).save(tmp_path / "cut.safetensors"))
    assert known.quadrants() == ["undecided", "undecided"]


def test_a_hook_point_that_carries_nothing_decides_nothing() -> None:
    """All of it would be above 1 % of itself; what is above 0.01 % of the behaviour still counts."""
    table = made([[2e-9, 2e-9], [0.002, 0.002], [2e-9, 2e-9]], [2.0, 2.0])
    table = replace(table, nodes=(*table.nodes[:2], fp.Node(table.nodes[0].site, "activation", None, "all")))
    assert table.quadrants() == ["below threshold", "both directions", "below threshold"]


def test_directions_do_not_stand_for_each_other() -> None:
    """Recovery of the rows 1 and 0, degradation 0 and -1."""
    table = made([[4.0, 8.0], [0.5, 0.5]], [4.0, 8.0])
    table = replace(table, denoised=np.array([4.0, 8.0, 0.0, 0.0]), noised=np.array([4.0, 8.0, 8.0, 16.0]))
    assert table.quadrants() == ["denoising only", "opposing"]


def test_what_is_not_known_is_undecided() -> None:
    both = made([[2.0, 2.0, 2.0], [0.0, 0.0, 0.01]], [2.0, 2.0, 2.0])
    assert both.quadrants() == ["both directions", "below threshold"]
    assert both.of_pairs([0]).quadrants() == ["undecided"]
    assert made([[0.0], [1.0]], [2.0]).quadrants() == ["undecided", "undecided"]
    for direction in ("denoising", "noising"):
        one = replace(both, metadata={**both.metadata, "directions": [direction]})
        assert one.quadrants() == ["undecided"] * 2
        assert "quadrant" not in one.to_pandas()


def shown(table: Any) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_the_column(monkeypatch: pytest.MonkeyPatch) -> None:
    other = made([[0.0, 0.01], [2.0, 2.0]], [2.0, 2.0], metric="prob")
    effects = replace(made([[2.0, 2.0], [0.0, 0.01]], [2.0, 2.0]), others={"prob": other})
    computed, interval = [], statistics.interval

    def counting(change: NDArray[np.float64], gap: NDArray[np.float64]) -> NDArray[np.float64]:
        computed.append(change)
        return interval(change, gap)

    monkeypatch.setattr(statistics, "interval", counting)
    frame = effects.to_pandas()
    assert len(computed) == 8  # metrics times directions, over all pairs and over those in which a row differs
    columns = list(frame.columns)
    assert columns.index("quadrant") == columns.index("degradation_q") + 1 == columns.index("changed_pairs") - 1
    assert list(frame["quadrant"]) == ["both directions", "below threshold"] == effects.quadrants()
    assert list(frame["prob_quadrant"]) == ["below threshold", "both directions"]


def test_a_report_computes_the_interval_of_each_row_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Once in each direction, although the conclusion, the chart and the table need it; one of the rows is not ranked."""
    features = made(np.random.default_rng(0).normal(size=(300, 4)), [2.0, 3.0, 2.0, 2.0], pairs="none")
    effects = replace(features, nodes=(*features.nodes[:-1], fp.Node(features.nodes[0].site, "activation")))
    computed, interval = [], statistics.interval

    def counting(change: NDArray[np.float64], gap: NDArray[np.float64]) -> NDArray[np.float64]:
        computed.append(len(change) if gap.ndim == 1 else 0)  # others are over the pairs in which a row differs
        return interval(change, gap)

    monkeypatch.setattr(statistics, "interval", counting)
    fp.report(effects, tmp_path / "report.html")
    assert sum(computed) == 2 * len(effects)


def test_the_report_shows_it() -> None:
    table = made([[2.0, 2.0], [0.0, 0.01]], [2.0, 2.0])
    lines = shown(ranked(table)).splitlines()
    (first,), (second,) = ([line for line in lines if label in line and "/2" in line] for label in ("both", "below threshold"))
    assert ("2/2" in first, "1/2" in second) == (True, True)
    assert "where changed" in " ".join(lines)
    assert first.rstrip().endswith("1.00 [1.00, 1.00]")  # over the pairs in which it differs
    assert second.rstrip().endswith("0.0050")
    assert any("quadrant" in line for line in lines)
    one = shown(ranked(replace(table, metadata={**table.metadata, "directions": ["noising"]})))
    assert "quadrant" not in one
    assert "undecided" not in one


def pairs_of(built: Constructed) -> fp.Pairs:
    return fp.Pairs.from_tokens(built.clean, built.corrupted, built.correct, built.wrong)


def heads(built: Constructed, layer: int = 0) -> fp.Effects:
    sites = ["z", "attn_out"]
    return fp.rank_components(built.model, pairs_of(built), sites=sites, layers=[layer], positions=[LAST], progress=False)


def row(effects: fp.Effects, head: int) -> tuple[float, float, str]:
    of_head = effects.where(kind="head", index=head)
    return float(of_head.pooled("recovery")[0]), float(of_head.pooled("degradation")[0]), of_head.quadrants()[0]


@pytest.mark.parametrize(("build", "expected"), [(and_gate, (0, 1, "noising only")), (or_gate, (1, 0, "denoising only"))])
def test_gates(build: Any, expected: tuple[float, float, str]) -> None:
    """Head 2 copies a flag, too, but nothing reads it; all heads together are the whole circuit."""
    built = build()
    effects = heads(built)
    assert effects.clean == pytest.approx(1, abs=1e-12)
    assert effects.corrupted == pytest.approx(0, abs=1e-12)
    assert np.unique(built.clean, axis=0).shape[0] == len(built.clean)
    for head in (0, 1):
        assert row(effects, head) == (pytest.approx(expected[0], abs=1e-12), pytest.approx(expected[1], abs=1e-12), expected[2])
    assert row(effects, 2) == (0, 0, "below threshold")
    assert effects.where(kind="activation").quadrants() == ["both directions"]


def test_a_head_with_a_backup_is_redundant() -> None:
    """And the backup, which is silent in both runs, is no row at all: it shows only while the main head is patched."""
    built = backup()
    effects = heads(built)
    assert effects.clean == pytest.approx(1, abs=1e-12)
    assert effects.corrupted == pytest.approx(0, abs=1e-12)
    assert row(effects, 0) == (pytest.approx(1, abs=1e-12), pytest.approx(0, abs=1e-12), "denoising only")
    assert not len(heads(built, 1))


def test_noising_main_and_backup_together_destroys_the_behaviour() -> None:
    """Set to the corrupted values, both are silent. Added, the change of the backup is 0, and it wakes up all the same."""
    built = backup()
    sites = (HEADS, "blocks.1.attn.hook_z")
    main, other = (fp.Node(site, "head", 0, LAST) for site in sites)

    def run(*nodes: fp.Node, how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the right answer, and what the backup head writes, by pair."""
        base = {"base": built.clean} if how == "add" else {}
        with fp.do(built.model, fp.Patch(nodes), source=built.corrupted, how=how, **base):
            logits, cache = built.model.run_with_cache(built.clean)
        return logits[:, -1, built.correct[0]], cache[sites[1]][:, -1, 0, 0]

    silent = built.model.run_with_cache(built.clean)[1][sites[1]][:, -1, 0, 0]
    assert not silent.any()
    for how in ("add", "set"):
        logit, woken = run(main, how=how)
        assert (logit == 1).all(), how
        assert (woken == 1).all(), how
    assert (run(main, other, how="set")[0] == 0).all()
    assert (run(main, other, how="add")[0] == 1).all()
    assert (run(other, how="set")[0] == 1).all()
