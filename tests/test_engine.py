"""The engine beyond exactness: its self-check, memory that runs out, interruption, the journal."""

import json
import os
import random
import signal
import time
import warnings
from base64 import b64decode
from dataclasses import replace
from datetime import timedelta
from itertools import chain, groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small import Small, standard
from test_cross import simple_clt
from torch.utils.flop_counter import FlopCounterMode

import featpatch as fp
from featpatch.engine import sweep as budget
from featpatch.engine.executor import Executor
from featpatch.engine.journal import Journal
from featpatch.engine.patches import Deltas
from featpatch.engine.suffix import SuffixPath
from featpatch.engine.sweep import Sweep, batches, units_of
from featpatch.errors import FeatpatchWarning
from featpatch.model.facts import digest
from featpatch.model.transformer_lens import wrap
from featpatch.patching.controls import RandomPart
from featpatch.patching.features import feature_study
from featpatch.patching.joint import node_study
from featpatch.patching.runs import PairRuns, Runner, held
from featpatch.patching.study import Options

BRIDGED = [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation") for layer in (1, 2)]
SITES = ("blocks.1.hook_resid_pre", "blocks.1.attn.hook_z")
KILLS = 30
"""As the README has it."""


def pairs_of(small: Small) -> fp.Pairs:
    return fp.Pairs.from_tokens(small.clean, small.corrupted, small.correct, small.wrong)


def rank(small: Small, **options: Any) -> fp.Effects:
    options = {"positions": "each", "progress": False, **options}
    return fp.rank_features(small.model, [small.at(site) for site in SITES], pairs_of(small), **options)


def same(one: fp.Effects, other: fp.Effects) -> bool:
    """Bit for bit."""
    columns = ("clean", "corrupted", "row", "pair", "denoised", "noised")
    return one.nodes == other.nodes and all(np.array_equal(getattr(one, c), getattr(other, c)) for c in columns)


@pytest.mark.both
def test_a_fast_path_that_is_wrong_is_not_taken(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rank(small)
    stack = type(wrap(small.model)).stack

    def broken(lens: Any, *lengths: int) -> Any:
        made = stack(lens, *lengths)
        object.__setattr__(made.layers[2], "scale", 1.01 * made.layers[2].scale)
        return made

    monkeypatch.setattr("featpatch.model.transformer_lens.BridgeLens.stack", broken)
    monkeypatch.setattr("featpatch.model.transformer_lens.HookedLens.stack", broken)
    with pytest.warns(fp.SlowPathWarning, match=r"the two differ by .* times the tolerance"):
        slow = rank(small)
    assert slow.nodes == right.nodes
    np.testing.assert_allclose(slow.denoised, right.denoised, rtol=0, atol=1e-10)
    np.testing.assert_allclose(slow.noised, right.noised, rtol=0, atol=1e-10)


def test_a_table_says_by_which_command(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["/usr/bin/featpatch", "rank", "a b"])
    assert rank(small).metadata["command"] == "featpatch rank 'a b'"


@pytest.mark.parametrize(("worst", "fast"), [(1.0, True), (1.01, False)])
def test_the_fast_path_may_differ_by_the_tolerance(
    small: Small, worst: float, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featpatch.engine.path._disagreement", lambda *_: worst)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", fp.SlowPathWarning)
        rank(small)
    assert [each.category for each in warned] == [fp.SlowPathWarning] * (not fast)


def test_a_null_patch_is_exactly_the_base_run(small: Small) -> None:
    """A feature whose decoder direction is 0 changes nothing: effect 0, not 1e-17."""
    sae = standard(SITES[0], 3)
    with torch.no_grad():
        sae.W_dec[5] = 0
    effects = fp.rank_features(small.model, sae, pairs_of(small), progress=False)
    null = effects.where(index=5)
    assert len(null) == 1
    assert not null.pooled("recovery").any()
    assert not null.pooled("degradation").any()
    same_runs = fp.Pairs.from_tokens(small.clean, None, small.correct, small.wrong)
    with pytest.raises(fp.FeatpatchError, match="expected corrupted prompts that differ"):
        fp.rank_features(small.model, sae, same_runs, progress=False)


def test_deltas_are_cut_and_selected() -> None:
    deltas = Deltas(
        patches=4, patch=torch.tensor([0, 0, 2, 3]), position=torch.tensor([4, 2, 5, 1]), direction=torch.tensor([0, 0, 1, 1]),
        coefficient=torch.tensor([1.0, 2.0, -3.0, 4.0]), directions=torch.tensor([[1.0, 0.0], [0.0, 1.0]]),
    )  # fmt: skip
    assert deltas.first.tolist() == [2, torch.iinfo(torch.int64).max, 5, 1]
    some = deltas.select(torch.tensor([0, 3]))
    assert (some.patch.tolist(), some.position.tolist(), some.patches) == ([0, 0, 1], [4, 2, 1], 2)
    assert some.values().tolist() == [[1, 0], [2, 0], [0, 4]]
    assert deltas.upto(4).values().tolist() == [[1, 0], [2, 0], [0, 4]]
    again = Deltas.nonzero(deltas.dense(6))
    assert (len(again.patch), again.patches, again.dense(6).tolist()) == (4, 4, deltas.dense(6).tolist())


def test_deltas_are_joined() -> None:
    """The first two share their directions."""
    table, other = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[5.0, 6.0]])

    def deltas(patches: int, patch: list[int], position: list[int], direction: list[int], directions: torch.Tensor) -> Deltas:
        rows = [torch.tensor(each) for each in (patch, position, direction)]
        return Deltas(patches, *rows, torch.arange(1.0, len(patch) + 1), directions)

    joined = Deltas.joined(
        [deltas(3, [0, 2], [4, 1], [1, 0], table), deltas(1, [0], [2], [1], table), deltas(2, [1], [3], [0], other)]
    )
    assert (joined.patches, joined.patch.tolist(), joined.position.tolist()) == (6, [0, 2, 3, 5], [4, 1, 2, 3])
    assert joined.values().tolist() == [[0, 1], [2, 0], [0, 1], [5, 6]]
    assert len(joined.directions) == 3


def test_the_directions_of_features_are_in_memory_once(bridge: Small) -> None:
    """Pairs that run together share them, for two SAEs at one hook point and for a CLT, whose features write to several."""
    saes = [bridge.at("blocks.1.hook_mlp_out"), standard("blocks.1.hook_mlp_out", 7), simple_clt()]
    study, _ = feature_study(bridge.model, saes, pairs_of(bridge), positions="each")
    blocks = chain(*study.parts[0].blocks(study.runner.run((0, 1, 2))))
    of_features = [block for block in blocks if any(node.kind == "feature" for node in block.nodes)]
    tables = [deltas.directions for block in of_features for deltas in block.deltas.values()]
    assert len(tables) > len(saes)
    assert len({table.untyped_storage().data_ptr() for table in tables}) == len(saes)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[enforce fail] can't allocate memory")]
)
def test_when_memory_runs_out_the_batch_is_halved(small: Small, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    expected = rank(small)
    logits, sizes = SuffixPath.logits, list[int]()

    def greedy(path: SuffixPath, units: Any, columns: Any) -> Any:
        rows = sum(path.rows(unit) * len(unit.patches) for unit in units)
        sizes.append(rows)
        if rows > 30:
            raise error
        return logits(path, units, columns)

    monkeypatch.setattr(SuffixPath, "logits", greedy)
    found = rank(small)
    assert found.nodes == expected.nodes
    np.testing.assert_allclose(found.denoised, expected.denoised, rtol=0, atol=1e-10)
    assert sum(rows > 30 for rows in sizes) < 12, "what memory allows for is remembered"
    study, _ = feature_study(small.model, small.at(SITES[0]), pairs_of(small), directions=("denoising",))

    def never(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(SuffixPath, "logits", never)
    with pytest.raises(fp.FeatpatchError, match=r"memory ran out for a single patch of \d rows"):
        study.run(None, progress=False)


def test_other_errors_pass_through(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("shapes differ")

    study, _ = feature_study(small.model, small.at(SITES[0]), pairs_of(small), directions=("denoising",))
    monkeypatch.setattr(SuffixPath, "logits", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        study.run(None, progress=False)


class Here(Executor):
    """Runs every batch of every shard in this process."""

    def __init__(self) -> None:
        self.keys: list[str] = []

    def run(self, make: Any, shards: int, book: Any, done: Any) -> None:
        made = make()
        for shard in range(shards):
            for batch in made.batches(shard):
                self.keys.append(batch.key)
                book.put(batch.key, made.run(shard, batch.key))
                done(batch.patches)


def test_every_batch_of_every_part_goes_to_the_executor(small: Small, tmp_path: Path) -> None:
    """What an executor leaves out would be run by the caller without a word."""
    options: dict[str, Any] = {"sites": ["z", "mlp_out"], "batch_rows": 40, "progress": False}
    executor = Here()
    there = fp.rank_components(small.model, pairs_of(small), executor=executor, **options)
    here = fp.rank_components(small.model, pairs_of(small), journal=tmp_path / "journal", **options)
    assert len(executor.keys) == len(set(executor.keys)) == (tmp_path / "journal").read_bytes().count(b"\n") - 1
    assert there.nodes == here.nodes
    np.testing.assert_allclose(there.denoised, here.denoised, atol=1e-12)


def interrupt_after(monkeypatch: pytest.MonkeyPatch, batches: int) -> None:
    logits, calls = SuffixPath.logits, [0]

    def interrupted(path: SuffixPath, units: Any, columns: Any) -> Any:
        calls[0] += 1
        if calls[0] > batches + len(SITES):  # the self-check makes a call per site, all prompts being equally long
            raise KeyboardInterrupt
        return logits(path, units, columns)

    monkeypatch.setattr(SuffixPath, "logits", interrupted)


def test_ctrl_c_returns_rows_that_are_finished(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rank(small, batch_rows=500)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.warns(FeatpatchWarning, match="rows over 3 of 3 pairs; pass journal='work.journal' to keep"):
            part = rank(small, batch_rows=500)
    assert ", interrupted before the others were finished, " in repr(part)
    assert "interrupted" not in repr(whole)
    assert whole.finished
    assert not part.finished
    assert 0 < len(part) < len(whole)
    assert not np.isnan([part.denoised, part.noised]).any()
    expected = dict(zip(whole.nodes, whole.pooled("recovery"), strict=True))
    assert all(expected[node] == value for node, value in zip(part.nodes, part.pooled("recovery"), strict=True))
    interrupt_after(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt, match="no row is finished yet; pass journal='work.journal' to keep"):
        rank(small, batch_rows=500)


def test_ctrl_c_keeps_pairs_that_are_done(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rank(small, batch_rows=10_000)
    monkeypatch.setattr("featpatch.patching.runs.TOKENS_AT_ONCE", 7)
    interrupt_after(monkeypatch, 3)
    with pytest.warns(FeatpatchWarning, match="rows over 1 of 3 pairs"):
        part = rank(small, batch_rows=10_000)
    assert not part.finished
    assert len(part.clean) == 1
    first = whole.of_pairs([0])
    assert part.nodes == first.nodes
    np.testing.assert_allclose(part.denoised, first.denoised, rtol=0, atol=1e-10)
    assert part.clean[0] == pytest.approx(whole.clean[0])


def test_ctrl_c_within_the_first_pairs_leaves_the_others_out(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that were not looked at are not pairs without an effect."""
    whole = rank(small, batch_rows=20)
    monkeypatch.setattr("featpatch.patching.runs.TOKENS_AT_ONCE", 7)
    interrupt_after(monkeypatch, 18)
    with pytest.warns(FeatpatchWarning, match="rows over 1 of 3 pairs"):
        part = rank(small, batch_rows=20)
    assert not part.finished
    assert len(part.clean) == 1
    expected = dict(zip(whole.of_pairs([0]).nodes, whole.of_pairs([0]).denoised, strict=True))
    assert 0 < len(part) < len(expected)
    np.testing.assert_allclose(part.denoised, [expected[node] for node in part.nodes], rtol=0, atol=1e-10)


@pytest.mark.both
def test_a_run_goes_on_from_its_journal(
    small: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Law 8, and finished batches are not run again; it is said how much is finished."""
    whole = rank(small, batch_rows=20)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.warns(FeatpatchWarning, match="journal' has what is measured: the same call with it resumes from there"):
            assert not rank(small, batch_rows=20, journal=tmp_path / "journal").finished
    _, *batches = [line.rpartition(" ")[0] for line in (tmp_path / "journal").read_text().splitlines()]
    kept = [b64decode(json.loads(batch)["values"]) for batch in batches]
    logits, calls = SuffixPath.logits, [0]

    def counted(path: SuffixPath, units: Any, columns: Any) -> Any:
        calls[0] += 1
        return logits(path, units, columns)

    monkeypatch.setattr(SuffixPath, "logits", counted)
    resumed = rank(small, journal=tmp_path / "journal", progress=True)
    done = int(capsys.readouterr().err.partition("journal' has ")[2].partition(" of ")[0].replace(",", ""))
    assert done == sum(len(values) // 8 for values in kept)
    first = calls[0]
    assert same(resumed, whole)
    assert same(rank(small, journal=tmp_path / "journal"), whole)
    assert calls[0] - first == len(SITES)
    assert first > calls[0] - first


@pytest.mark.extended
def test_killed_at_random_points_it_resumes_to_the_same_bits(bridge: Small, tmp_path: Path) -> None:
    """A child process is killed with SIGKILL in the middle of its sweep; the parent goes on from what it left."""
    torch.set_num_threads(1)
    start = time.monotonic()
    whole = rank(bridge, batch_rows=20, journal=tmp_path / "whole")
    duration, r, partial = time.monotonic() - start, random.Random(0), 0
    complete = (tmp_path / "whole").read_bytes().count(b"\n")
    for trial in range(KILLS):
        journal = tmp_path / f"trial {trial}"
        child = os.fork()
        if child == 0:
            rank(bridge, batch_rows=20, journal=journal)
            os._exit(0)
        time.sleep(r.uniform(0.2, 1.0) * duration)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        left = journal.read_bytes().count(b"\n") if journal.exists() else 0
        partial += 0 < left < complete
        assert same(rank(bridge, batch_rows=20, journal=journal), whole)
    assert partial > KILLS / 5, "too few kills came in the middle of the sweep"


@pytest.mark.parametrize("cuts", [5, pytest.param(25, marks=pytest.mark.extended)])
def test_a_journal_cut_at_any_byte_is_resumed_and_what_is_torn_is_dropped(bridge: Small, tmp_path: Path, cuts: int) -> None:
    whole = rank(bridge, batch_rows=40, journal=tmp_path / "whole")
    content, r = (tmp_path / "whole").read_bytes(), random.Random(1)
    for _ in range(cuts):
        cut = r.randrange(len(content))
        journal = tmp_path / "cut"
        journal.write_bytes(content[:cut])
        assert same(rank(bridge, batch_rows=40, journal=journal), whole)
        assert journal.read_bytes() == content, "the torn line is cut off before others follow"


def test_a_damaged_line_is_run_again(bridge: Small, tmp_path: Path) -> None:
    whole = rank(bridge, batch_rows=40, journal=tmp_path / "journal")
    lines = (tmp_path / "journal").read_bytes().splitlines(keepends=True)
    damaged = bytearray(lines[2])
    damaged[60] ^= 1
    (tmp_path / "journal").write_bytes(b"".join([*lines[:2], bytes(damaged), *lines[3:]]))
    assert same(rank(bridge, batch_rows=40, journal=tmp_path / "journal"), whole)


def test_a_journal_of_another_sweep_is_refused(bridge: Small, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    rank(bridge, journal=journal)
    with pytest.raises(fp.FeatpatchError, match=r"belongs to another sweep: directions differ"):
        rank(bridge, journal=journal, directions=["noising"])
    other = fp.Pairs.from_tokens(bridge.clean[:2], bridge.corrupted[:2], bridge.correct[:2], bridge.wrong[:2])
    with pytest.raises(fp.FeatpatchError, match=r"pairs, positions, saes differ; expected the same model"):
        fp.rank_features(bridge.model, bridge.at(SITES[0]), other, journal=journal, progress=False)
    with torch.no_grad():
        bridge.model.blocks[0].mlp.original_component.c_proj.original_component.bias += 1
    try:
        with pytest.raises(fp.FeatpatchError, match=r"belongs to another sweep: model differ"):
            rank(bridge, journal=journal)
    finally:
        with torch.no_grad():
            bridge.model.blocks[0].mlp.original_component.c_proj.original_component.bias -= 1
    for text in ("Dear reader,\nthis is no journal.\n", "one line", "0123456789abcdef  SHA256SUMS\n"):
        (tmp_path / "letter").write_text(text)
        with pytest.raises(fp.FeatpatchError, match=r"is not a journal of this sweep"):
            rank(bridge, journal=tmp_path / "letter")
        assert (tmp_path / "letter").read_text() == text
    content = bytearray(journal.read_bytes())
    content[40] ^= 1
    journal.write_bytes(content)
    with pytest.raises(fp.FeatpatchError, match=r"its first line is damaged"):
        rank(bridge, journal=journal)
    with pytest.raises(fp.FeatpatchError, match=r"is a folder"):
        rank(bridge, journal=tmp_path)


def test_a_journal_knows_what_digests_do_not(bridge: Small, tmp_path: Path) -> None:
    """Another metric of the same name, a hook, a changed setting of a dictionary."""
    sae, pairs = bridge.at("blocks.2.hook_resid_pre"), pairs_of(bridge)
    options = {"journal": tmp_path / "journal", "progress": False}
    fp.rank_features(bridge.model, sae, pairs, metric=lambda logits, correct, wrong: logits[:, 3], **options)
    with pytest.raises(fp.FeatpatchError, match="the metric of the unpatched runs differ"):
        fp.rank_features(bridge.model, sae, pairs, metric=lambda logits, correct, wrong: logits[:, 4], **options)
    options["journal"] = tmp_path / "other"
    fp.rank_features(bridge.model, sae, pairs, **options)
    sae.cfg.k = 5
    try:
        with pytest.raises(fp.FeatpatchError, match="saes differ"):
            fp.rank_features(bridge.model, sae, pairs, **options)
    finally:
        sae.cfg.k = 6
    bridge.model.hook_dict["blocks.0.hook_mlp_out"].add_hook(lambda activation, hook: 0 * activation)
    try:
        with (
            pytest.raises(fp.FeatpatchError, match="the metric of the unpatched runs differ"),
            pytest.warns(fp.SlowPathWarning),
        ):
            fp.rank_features(bridge.model, sae, pairs, **options)
    finally:
        bridge.model.reset_hooks()


def test_a_journal_is_readable(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "folder" / "journal", {"model": "m"}, [1.0], 7)
    journal.put("key", torch.tensor([1.5, -2.0], dtype=torch.float64))
    header, line = (json.loads(text.rsplit(" ", 1)[0]) for text in journal.path.read_text().splitlines())
    assert header == {"format": "featpatch journal 1", "model": "m", "baselines": [1.0], "rows": 7}
    assert line["batch"] == "key"
    again = Journal.open(journal.path, {"model": "m"}, [1.0 + 1e-7], 99)
    assert again.rows == 7
    values = again.get("key")
    assert values is not None
    assert values.tolist() == [1.5, -2.0]
    assert again.get("other") is None


def test_a_plan_counts_what_the_sweep_does(small: Small) -> None:
    """Patches and operations, against the passes themselves and torch's own counter."""
    saes = [small.at(site) for site in SITES]
    study, _ = feature_study(small.model, saes, pairs_of(small), positions="each")
    (of_pairs,) = study.work()
    blocks = [*chain(*of_pairs)]
    sweep = Sweep(study.path, study.measures, study.rows)
    sweep.baselines([block.run for block in blocks])
    patches, rows, flops = sweep.cost(blocks)
    with FlopCounterMode(display=False) as counter:
        for batch in batches(study.path, sweep.units(blocks), 40):
            sweep.run(batch)
    assert counter.get_total_flops() == flops
    plan = fp.plan(small.model, [small.at(site) for site in SITES], pairs_of(small), positions="each")
    assert (plan.patches, plan.rows, plan.flops, plan.fast) == (patches, rows, flops, True)
    table = rank(small)
    assert plan.patches == len(table.row) * 2
    assert plan.rows == 2 * sum(7 - int(table.nodes[row].position) for row in table.row), "from each patch to the answer"
    assert plan.seconds > 0
    assert plan.memory > 0


def test_a_trial_is_timed_once_warm(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    study, _ = feature_study(bridge.model, bridge.at(SITES[0]), pairs_of(bridge), directions=("denoising",), batch_rows=40)
    (of_pairs,) = study.work()
    blocks = [*chain(*of_pairs)]
    sweep = Sweep(study.path, study.measures, study.rows)
    ran, run = [], sweep.run
    monkeypatch.setattr(sweep, "run", lambda batch: ran.append(len(batch)) or run(batch))
    monkeypatch.setattr("featpatch.engine.sweep.time", SimpleNamespace(perf_counter=iter([7.0, 9.5]).__next__))
    flops, seconds = sweep.trial(blocks)
    assert (seconds, len(ran)) == (2.5, 2)
    assert 0 < flops < sweep.cost(blocks)[2]
    assert sweep.trial([]) == (0, 0)


def test_every_pair_is_run_and_encoded_once(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted at the first block and in the encoder; without room for what is kept, values are the same bit by bit."""
    sae, counted = bridge.at(SITES[0]), {"tokens": 0, "encoded": 0, "traced": 0}
    encode = type(sae).encode

    def count(name: str, tokens: int) -> None:
        counted[name] += tokens

    def encoded(self: Any, x: torch.Tensor) -> torch.Tensor:
        count("encoded", x.shape[0] * x.shape[1])
        return encode(self, x)

    def sweep(room: int) -> tuple[fp.Effects, dict[str, int]]:
        monkeypatch.setattr("featpatch.patching.study.KEPT", room)
        monkeypatch.setattr(SuffixPath, "prepare", prepare_counted)
        study, _ = feature_study(bridge.model, sae, pairs_of(bridge), positions="each")
        counted.update(tokens=0, encoded=0, traced=0)
        hook = bridge.model.blocks[0].register_forward_hook(lambda module, args, out: count("tokens", args[0].shape[1]))
        try:
            effects = study.run(None, progress=False)
        finally:
            hook.remove()
        return effects, dict(counted)

    prepare = SuffixPath.prepare

    def prepare_counted(self: SuffixPath, runs: Any) -> None:
        count("traced", sum(run not in self.traces for run in runs))
        prepare(self, runs)

    monkeypatch.setattr("featpatch.patching.runs.TOKENS_AT_ONCE", 7)
    monkeypatch.setattr(type(sae), "encode", encoded)
    kept, once = sweep(2**30)
    again, twice = sweep(0)
    probed = 3  # tokens that the dictionary's behaviour is found with
    assert once == {"tokens": 4 * 7, "encoded": 6 * 4 + probed, "traced": 6}, "one pair was run to choose the path"
    assert twice == {"tokens": 10 * 7, "encoded": 12 * 4 + probed, "traced": 12}
    for name in ("denoised", "noised"):
        assert np.array_equal(getattr(kept, name), getattr(again, name), equal_nan=True)


@pytest.mark.parametrize("kind", ["features", "components", "paths"])
def test_a_long_sweep_is_announced_after_its_first_batch(
    bridge: Small, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """Once, in seconds of a clock that stands still but for the batches; not of a short one, and not without bars."""
    clock, run, pairs = [0.0], Sweep.run, pairs_of(bridge)
    batches: list[int] = []

    def timed(self: Sweep, batch: Any) -> torch.Tensor:
        clock[0] += seconds
        batches.append(sum(len(unit.patches) for unit in batch))
        return run(self, batch)

    def sweep(*, progress: bool) -> str:
        options: dict[str, Any] = {"batch_rows": 40, "progress": progress}
        batches.clear()
        if kind == "features":
            fp.rank_features(bridge.model, bridge.at(SITES[0]), pairs, **options)
        elif kind == "components":
            fp.rank_components(bridge.model, pairs, **options)
        else:
            senders = [fp.Node("blocks.0.attn.hook_z", "head", head) for head in range(4)]
            fp.rank_paths(bridge.model, pairs, senders=senders, receivers=["logits", *BRIDGED], **options)
        out, err = capsys.readouterr()
        assert out == ""
        return err

    monkeypatch.setattr(Sweep, "run", timed)
    monkeypatch.setattr("featpatch.engine.sweep.time", SimpleNamespace(monotonic=lambda: clock[0]))
    seconds = 100.0
    said = sweep(progress=True)
    assert said.count("left (estimated from the first batch)") == 1
    left = (sum(batches) - batches[0]) / batches[0] * 100
    assert f"{sum(batches)} patches in total, about {timedelta(seconds=round(left))} left" in said
    assert "in total" not in sweep(progress=False)
    seconds = 1.0
    assert "in total" not in sweep(progress=True)


def test_runs_are_kept_as_long_as_there_is_room(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of 100 bytes, then of 300; the latest one is kept beside. There is an eighth of the free memory, or a gibibyte."""
    for free, room in ((800, 100), (2**40, 2**30)):
        monkeypatch.setattr("featpatch.patching.study.free_memory", lambda device, free=free: free)
        study, _ = feature_study(bridge.model, bridge.at(SITES[0]), pairs_of(bridge))
        assert study.runner.room == room
    ran: list[int] = []

    def run(self: Runner, some: tuple[int, ...]) -> Any:
        ran.extend(some)
        made = PairRuns(pairs_of(bridge)[0], 0, {}, {}, {})
        made.once("a part", lambda: torch.zeros(25 if some[0] < 2 else 75))
        return [made]

    monkeypatch.setattr(Runner, "_run", run)
    runner = Runner(wrap(bridge.model), pairs_of(bridge), [], [], [], {}, None, None, 250)
    for _ in range(2):
        for group in range(5):
            runner.run([group])
    assert ran == [0, 1, 2, 3, 4, 2, 3, 4]
    assert runner.room == 50
    three = torch.zeros(3)
    assert held([three, {"a": (torch.zeros(2, dtype=torch.float64), "text")}, three[1:]]) == 3 * 4 + 2 * 8, "memory counts once"


def test_readings_of_an_answer_share_what_patches_change(bridge: Small) -> None:
    """Three readings in two directions, of nodes among others in a layer, and of prompts of different lengths."""
    answers: Any = {"correct": (), "wrong": (), "correct_sequences": ((3, 4, 5),), "labels": {"there": 2}}
    equal = fp.Pairs((fp.Pair((11, 12, 13, 14), (11, 12, 15, 14), **answers),))
    longer = fp.Pair((11, 12, 13, 14), (11, 16, 12, 15, 14), **answers, corrupted_labels={"there": 3})
    sae, options = bridge.at("blocks.1.hook_resid_pre"), Options(metric="sequence_log_prob")
    neurons = [fp.Node("blocks.2.mlp.hook_post", "neuron", index) for index in (3, 7)]
    for study in (
        node_study(bridge.model, None, equal, neurons, together=False, **options)[0],
        feature_study(bridge.model, sae, fp.Pairs((longer,)), positions=["there"], **options)[0],
    ):
        (blocks,) = study.parts[0].blocks(study.runner.run([0]))
        for _, alike in groupby(blocks, key=lambda block: block.nodes):
            some = list(alike)
            assert len(some) == 6
            assert len({id(deltas) for block in some for deltas in block.deltas.values()}) == 2


def test_rows_of_a_pass_by_hand(bridge: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Width 16, 4 heads of 4, 32 hidden units, 8 bytes a number; prompts of 7 tokens, 40 logits."""
    lens = wrap(bridge.model)
    assert budget.row_bytes(lens, 7, 40) == 8 * (4 * 16 + 8 * 16 + 3 * 32 + 3 * 4 * 7 + 4 * 40)
    memory = 4 * 532 * 8 * np.array([1000, 2**20, 1])
    monkeypatch.setattr(budget, "free_memory", lambda device: memory[0])
    assert budget.row_budget(lens, 7, 40) == 1000, "a quarter of the memory"
    memory[0] -= 1
    assert budget.row_budget(lens, 7, 40) == 999
    memory[0] = memory[1]
    assert budget.row_budget(lens, 7, 40) == budget.MOST
    memory[0] = memory[2] - 1
    assert budget.row_budget(lens, 7, 40) == 1
    memory[0] = memory[1]
    for rows, expected in ((300, 300), (100, budget.LEAST)):
        monkeypatch.setattr(budget, "BUSY", 16 * 32 * rows)
        assert budget.row_budget(lens, 7, 40) == expected, "enough to keep the processor busy"


def test_memory_of_a_gpu_is_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what PyTorch has freed and kept for itself."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert budget.free_memory(torch.device("cuda")) == 25
    assert budget.free_memory(torch.device("cpu")) > 80


@pytest.mark.parametrize("room", [1, 5, 40])
def test_batches_are_full_and_fit(small: Small, room: int) -> None:
    """All that can share a pass does; each patch is in one batch, and there with others only where all have room."""
    study, _ = feature_study(small.model, small.at(SITES[0]), pairs_of(small), positions="each", batch_rows=40)
    (of_pairs,) = study.work()
    blocks = [*chain(*of_pairs)]
    units = Sweep(study.path, study.measures, study.rows).units(blocks)
    made = list(batches(study.path, units, room))
    found = sorted((id(unit.deltas), int(patch)) for batch in made for unit in batch for patch in unit.patches)
    assert found == sorted((id(unit.deltas), int(patch)) for unit in units for patch in unit.patches)
    sizes = [[(study.path.rows(unit), len(unit.patches)) for unit in batch] for batch in made]
    for size, following in zip(sizes, [*sizes[1:], None], strict=True):
        used = sum(rows * patches for rows, patches in size)
        assert used <= room or [patches for _, patches in size] == [1]
        assert following is None or used + following[0][0] > room


def test_patches_without_an_effect_are_not_run(small: Small) -> None:
    """Those that change nothing, and in a causal model those that change only positions after the answer."""
    study, _ = feature_study(small.model, small.at(SITES[0]), pairs_of(small), directions=("denoising",), batch_rows=40)
    (((block, *_), *_),) = study.work()
    patch, position = torch.tensor([0, 0, 2, 3, 4]), torch.tensor([5, 3, 5, 4, 3])
    deltas = Deltas(5, patch, position, torch.zeros(5, dtype=torch.int64), torch.ones(5), torch.ones(1, 16))
    before = replace(
        block, run=replace(block.run, answer=4), deltas=dict.fromkeys(block.deltas, deltas), patches=torch.arange(5)
    )

    def run(causal: bool) -> list[tuple[int, list[int]]]:
        return [(unit.first, unit.patches.tolist()) for unit in units_of([before], causal=causal)]

    assert run(causal=True) == [(3, [0, 4]), (4, [3])]
    assert run(causal=False) == [(3, [0, 4]), (4, [3]), (5, [2])]


def test_what_parts_find_stays_with_the_runs(small: Small) -> None:
    """Parts travel to workers as they were made."""
    study, found = feature_study(small.model, small.at(SITES[0]), pairs_of(small), directions=("denoising",), batch_rows=40)
    for part in (*study.parts, RandomPart(found[0], 0, "all", 3, 0)):
        before, runs = {**vars(part)}, study.runner.run((0, 1, 2))
        part.blocks(runs)
        assert vars(part) == before
        assert all(part in run.found for run in runs)
        kind, given = part.__reduce__()
        assert kind(*given).hooks == part.hooks


def test_a_digest_follows_the_weights() -> None:
    """Also those changed behind torch's counter, and of tensors with more numbers than float32 can count."""
    module = torch.nn.Linear(3, 2)
    module.register_buffer("large", torch.zeros(2**24 + 3, dtype=torch.int8))
    first = digest(module)
    assert digest(module) == first
    with torch.no_grad():
        module.weight[0, 0] += 1
    changed = digest(module)
    assert changed != first
    module.weight.data[1, 1] += 1
    assert digest(module) not in (first, changed)
    assert digest(torch.nn.Linear(3, 2)) != first
