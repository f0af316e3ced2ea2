"""What was finished is never lost, and never read as something else: full disks, kills, flipped bits, deleted journals."""

import os
import random
import resource
import signal
import stat
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small import Small
from test_sets import pairs_of
from test_streaming import OPTIONS, blocks, many

import featpatch as fp
from featpatch.effects import storage
from featpatch.engine.suffix import SuffixPath
from featpatch.errors import FeatpatchWarning
from featpatch.files import check_writable, writing

SITE = "blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def effects(bridge: Small) -> fp.Effects:
    """A table of both directions and two metrics."""
    return fp.rank_features(bridge.model, bridge.saes[:1], pairs_of(bridge), metric=["logit_diff", "prob"], progress=False)


@pytest.fixture(scope="module")
def circuit(bridge: Small) -> fp.Circuit:
    sae = bridge.at(SITE)
    effects = fp.rank_features(bridge.model, sae, pairs_of(bridge), progress=False)
    return fp.find_circuit(bridge.model, pairs_of(bridge), saes=sae, nodes=effects, size=3, progress=False)


Writer = Callable[[Path, int], object]
"""Writes to a path; the number says which of two contents."""


@pytest.fixture(params=["effects", "report", "circuit", "csv"])
def writer(request: pytest.FixtureRequest, effects: fp.Effects) -> Writer:
    """Every function of the library that writes one file."""
    tables = [effects, effects.take(range(3))]

    def csv(path: Path, which: int) -> None:
        with writing(path) as file:
            tables[which].to_pandas().to_csv(file)

    ways: dict[str, Writer] = {
        "effects": lambda path, which: tables[which].save(path),
        "report": lambda path, which: fp.report(tables[which], path),
        "csv": csv,
    }
    if request.param == "circuit":
        circuit = request.getfixturevalue("circuit")
        return lambda path, which: circuit.report(path, title="other" * which)
    return ways[request.param]


@contextmanager
def room(size: int) -> Iterator[None]:
    """Within this context no file can grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(writer: Writer, tmp_path: Path) -> None:
    """Whatever the size at which the disk is full; and nothing else stays in the folder."""
    path = tmp_path / "file"
    writer(path, 0)
    size = len(path.read_bytes())
    writer(path, 1)
    old = path.read_bytes()
    for limit in (0, 1, 100, size // 2, size - 1):
        with room(limit), pytest.raises(fp.FeatpatchError, match="can't be written"):
            writer(path, 0)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("times", [2, pytest.param(8, marks=pytest.mark.extended)])
def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new_one(writer: Writer, tmp_path: Path, times: int) -> None:
    path, r, seen = tmp_path / "file", random.Random(0), set()
    contents = []
    for which in (0, 1):
        writer(path, which)
        contents.append(len(path.read_bytes()))
    for _ in range(times):
        child = os.fork()
        if child == 0:
            while True:
                writer(path, 0)
                writer(path, 1)
        time.sleep(r.uniform(0.05, 0.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        seen.add(len(path.read_bytes()))
    assert seen <= {*contents}


def test_permissions_links_and_devices(effects: fp.Effects, tmp_path: Path) -> None:
    """The umask decides, or the file that is there; a link stays one; a device is written to and stays one."""
    before = os.umask(0o027)
    try:
        path = effects.save(tmp_path / "new.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    path.chmod(0o604)
    assert stat.S_IMODE(effects.save(path).stat().st_mode) == 0o604
    (tmp_path / "link").symlink_to("new.safetensors")
    effects.take([0]).save(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert len(fp.Effects.load(path)) == 1
    with writing("/dev/null") as file:
        file.write_bytes(b"1")
    check_writable("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


@pytest.mark.parametrize("write", ["save", "report", "circuit", "fp.report", "journal", "stream"])
def test_a_path_that_cannot_be_written_is_refused(
    write: str, bridge: Small, effects: fp.Effects, circuit: fp.Circuit, tmp_path: Path
) -> None:
    """A folder, something within a file, a link to nowhere, a name that is too long."""
    ways: dict[str, Callable[[Path], object]] = {
        "save": effects.save,
        "report": lambda path: fp.report(effects, path),
        "circuit": circuit.report,
        "fp.report": lambda path: fp.report(effects, path, model=fp.load_demo().model, pairs=pairs_of(bridge)),
        "journal": lambda path: fp.rank_features(bridge.model, bridge.saes[:1], pairs_of(bridge), journal=path, progress=False),
        "stream": lambda path: fp.stream_features(bridge.model, bridge.saes[:1], blocks(many(bridge, 2), 1), path, **OPTIONS),
    }
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file" / "within")
    (tmp_path / "folder").mkdir()
    for name in ("file/within", "link", "n" * 300, "x" * 5000, "a\0b", *(["folder"] if write != "stream" else ["file"])):
        with pytest.raises(fp.FeatpatchError, match="folder|file"):
            ways[write](tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "link"]


@pytest.mark.parametrize(
    ("write", "name", "message"),
    [
        ("save", "ioi.txt", r"ioi.txt' ends in '.txt': expected .safetensors, .*; write '.*ioi.safetensors'"),
        ("report", "r.txt", r"r.txt' ends in '.txt': expected .html or .htm, .*; write '.*r.html'"),
        ("circuit report", "r.pdf", r"expected .html"),
        ("circuit", "c.yaml", r"expected .json, .*; write '.*c.json'"),
        ("jsonl", "pairs.json", r"expected .jsonl or .ndjson, .*; write '.*pairs.jsonl'"),
        ("csv", "pairs.xlsx", r"expected .csv, .*; write '.*pairs.csv'"),
    ],
)
def test_an_ending_of_another_format_is_refused(
    write: str, name: str, message: str, bridge: Small, effects: fp.Effects, circuit: fp.Circuit, tmp_path: Path
) -> None:
    """And nothing is written; a name in capitals or without an ending is accepted."""
    ways: dict[str, Callable[[Path], object]] = {
        "save": effects.save,
        "report": lambda path: fp.report(effects, path),
        "circuit report": circuit.report,
        "circuit": circuit.save,
        "jsonl": pairs_of(bridge).to_jsonl,
        "csv": pairs_of(bridge).to_csv,
    }
    with pytest.raises(fp.FeatpatchError, match=message):
        ways[write](tmp_path / name)
    assert not list(tmp_path.iterdir())
    if write == "csv":
        for accepted in ("PAIRS.CSV", "pairs", "pairs.2024-01-15", "of pythia-1.4b"):
            assert ways[write](tmp_path / accepted) == tmp_path / accepted


def test_flipped_bits_of_effects(effects: fp.Effects, tmp_path: Path) -> None:
    """A damaged file is refused, or holds the same: of all bytes of the header, and of some of the data."""
    path, r = effects.save(tmp_path / "effects"), random.Random(0)
    content = path.read_bytes()
    for _ in range(300):
        flipped = bytearray(content)
        flipped[r.randrange(len(content))] ^= 1 << r.randrange(8)
        path.write_bytes(flipped)
        try:
            found = fp.Effects.load(path)
        except fp.FeatpatchError:
            continue
        pd.testing.assert_frame_equal(found.to_pandas(), effects.to_pandas())
        assert found.metadata == {**effects.metadata, "metrics": effects.metrics}


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_missing_in_a_finished_table(
    value: float, effects: fp.Effects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are refused, also where the SHA-256 is right; in an unfinished table they may be missing."""
    damaged = replace(effects, denoised=np.where(np.arange(len(effects.denoised)) == 5, value, effects.denoised))
    with pytest.raises(fp.FeatpatchError, match="can't be saved.*: 1 of .* values of denoising are not finite"):
        damaged.save(tmp_path / "effects")
    with monkeypatch.context() as patch:
        patch.setattr(storage, "check_columns", lambda *_: None)
        path = damaged.save(tmp_path / "effects")
    with pytest.raises(fp.FeatpatchError, match="1 of .* values of denoising are not finite"):
        fp.Effects.load(path)
    if np.isnan(value):
        unfinished = replace(damaged, metadata={**damaged.metadata, "finished": False})
        assert np.isnan(fp.Effects.load(unfinished.save(tmp_path / "effects")).denoised).sum() == 1


def test_a_selection_without_a_gap_is_not_saved(effects: fp.Effects, tmp_path: Path) -> None:
    """It could not be loaded again; the file that is there stays."""
    path = effects.save(tmp_path / "effects")
    with pytest.raises(fp.FeatpatchError, match="can't be saved, because the file could not be loaded again: .* in 0 pairs"):
        effects.of_pairs([]).save(path)
    assert len(fp.Effects.load(path)) == len(effects)


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (0, 0)])
def test_a_block_in_which_nothing_differs(order: tuple[int, int], bridge: Small, tmp_path: Path) -> None:
    """It is read back as it is, first, last, or alone; the label stands before what differs."""
    both = blocks(many(bridge, 4), 2)
    labelled = [fp.Pairs(tuple(replace(pair, labels={"a": pair.first_difference - 1 + k}) for pair in both[k])) for k in (0, 1)]
    some = [labelled[k] for k in dict.fromkeys(order)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FeatpatchWarning)  # that nothing differs there
        stored = fp.stream_features(bridge.model, bridge.saes[:1], some, tmp_path, positions=["a"], progress=False)
        whole = fp.rank_features(
            bridge.model,
            bridge.saes[:1],
            fp.Pairs(tuple(pair for block in some for pair in block)),
            positions=["a"],
            progress=False,
        )
    assert set(stored.load().nodes) == set(whole.nodes)
    assert len(stored.top(3)) == min(3, int(whole.ranked.sum()))


@pytest.fixture(scope="module")
def streamed(bridge: Small, tmp_path_factory: pytest.TempPathFactory) -> fp.Stored:
    folder = tmp_path_factory.mktemp("stream")
    return fp.stream_features(bridge.model, bridge.saes[:1], blocks(many(bridge, 4), 2), folder, **OPTIONS)


def read_back(folder: Path) -> pd.DataFrame:
    return fp.Stored(folder).load().to_pandas()


def test_flipped_bits_of_a_stream(streamed: fp.Stored) -> None:
    """In every file of it."""
    whole, r = read_back(streamed.folder), random.Random(0)
    files = [path for path in streamed.folder.rglob("*") if path.is_file()]
    assert len(files) == 7
    for path in files:
        content = path.read_bytes()
        for _ in range(12):
            flipped = bytearray(content)
            flipped[r.randrange(len(content))] ^= 1 << r.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(fp.FeatpatchError, match="expected"):
                read_back(streamed.folder)
        path.write_bytes(content)
    pd.testing.assert_frame_equal(read_back(streamed.folder), whole)


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("effects", lambda frame: frame.assign(**{"denoised of prob": np.nan}), "not finite"),
        ("effects", lambda frame: pd.concat([frame, frame[:1]]), "duplicates"),
        ("effects", lambda frame: frame.assign(pair=frame["pair"] - 2), "of pairs in other blocks"),
        ("effects", lambda frame: frame.assign(pair=99), "of pairs in other blocks"),
        ("effects", lambda frame: frame.assign(**{"denoised of prob": "x"}), "expected numbers"),
        ("effects", lambda frame: frame.assign(site=1.5), "expected texts"),
        ("effects", lambda frame: frame.assign(position="{"), "can't be read"),
        ("effects", lambda frame: frame.assign(position="[1]"), "can't be read"),
        ("effects", lambda frame: frame.assign(index=frame["index"].where(frame["index"] > 0, -5)), "can't be read"),
        ("effects", lambda frame: frame.drop(columns="sae"), "can't be read"),
        ("pairs", lambda frame: frame.assign(pair=frame["pair"] + 1), "not numbered from 0 to 3"),
        ("pairs", lambda frame: frame.assign(pair="2"), "expected integers"),
        ("pairs", lambda frame: frame.assign(**{"clean of prob": np.inf}), "expected|gap"),
        ("pairs", lambda frame: frame.assign(tags="[3"), "can't be read"),
    ],
)
def test_blocks_that_hold_something_else(kind: str, change: Any, message: str, streamed: fp.Stored) -> None:
    """Refused also where the digests are right, as those of a forger."""
    path, digests = streamed.folder / kind / "000001.parquet", streamed.folder / "000001.sha256"
    content, known = path.read_bytes(), digests.read_text()
    try:
        change(pd.read_parquet(path)).to_parquet(path, index=False)
        made = subprocess.run(
            ["sha256sum", "about.json", "effects/000001.parquet", "pairs/000001.parquet"],
            cwd=streamed.folder, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        digests.write_text(made)
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.Stored(streamed.folder, "prob").load()
    finally:
        path.write_bytes(content)
        digests.write_text(known)


def test_the_digests_are_those_of_sha256sum_and_none_may_be_missing(streamed: fp.Stored) -> None:
    said = subprocess.run(["sha256sum", "-c", "--quiet", "000000.sha256", "000001.sha256"], cwd=streamed.folder, check=False)
    assert said.returncode == 0
    first = streamed.folder / "000000.sha256"
    content = first.read_bytes()
    first.unlink()
    try:
        with pytest.raises(fp.FeatpatchError, match=r"lacks 000000\.sha256"):
            read_back(streamed.folder)
    finally:
        first.write_bytes(content)


def rank(small: Small, **options: Any) -> fp.Effects:
    options = {"positions": "each", "batch_rows": 20, "progress": False, **options}
    return fp.rank_features(small.model, small.at(SITE), pairs_of(small), **options)


def counted(monkeypatch: pytest.MonkeyPatch, at: int, happens: Callable[[], object]) -> list[int]:
    """Counts forward passes; something happens before the one of this number."""
    logits, calls = SuffixPath.logits, [0]

    def wrapped(path: SuffixPath, units: Any, columns: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            happens()
        return logits(path, units, columns)

    monkeypatch.setattr(SuffixPath, "logits", wrapped)
    return calls


@pytest.mark.parametrize("how", ["deleted", "emptied", "copied", "replaced"])
def test_a_journal_that_is_touched_in_mid_run(how: str, bridge: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is written anew with all that is finished, so that the next run goes on; another file in its place is left alone."""
    path = tmp_path / "journal"

    def touch() -> None:
        content = path.read_bytes()
        assert content.count(b"\n") > 1
        if how == "emptied":
            os.truncate(path, 0)
            return
        path.unlink()
        if how != "deleted":
            path.write_bytes(content if how == "copied" else b"mine\n")

    with monkeypatch.context() as patch:
        calls = counted(patch, 6, touch)
        if how == "replaced":
            with pytest.raises(fp.FeatpatchError, match="was replaced by another file"):
                rank(bridge, journal=path)
            assert path.read_bytes() == b"mine\n"
            return
        whole = rank(bridge, journal=path)
        every = calls[0]
    calls = counted(monkeypatch, -1, lambda: None)
    again = rank(bridge, journal=path)
    assert calls[0] < 3 < every
    np.testing.assert_array_equal(again.denoised, whole.denoised)
    np.testing.assert_array_equal(again.noised, whole.noised)


@pytest.mark.parametrize("often", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_a_stream_on_a_full_disk_goes_on_where_there_is_room(bridge: Small, tmp_path: Path, often: bool) -> None:
    """Also one that is killed: finished blocks stay as they are."""
    pairs, whole = many(bridge, 4), tmp_path / "whole"
    expected = fp.stream_features(bridge.model, bridge.saes[:1], blocks(pairs, 2), whole, **OPTIONS).load().to_pandas()
    largest = max(path.stat().st_size for path in whole.rglob("*.parquet"))
    for size in (10, largest // 2, largest - 1)[:: 1 if often else 2]:
        folder = tmp_path / str(size)
        with room(size), pytest.raises(fp.FeatpatchError, match="can't be written"):
            fp.stream_features(bridge.model, bridge.saes[:1], blocks(pairs, 2), folder, **OPTIONS)
        found = fp.stream_features(bridge.model, bridge.saes[:1], blocks(pairs, 2), folder, **OPTIONS).load().to_pandas()
        pd.testing.assert_frame_equal(found, expected)
    torch.set_num_threads(1)
    r = random.Random(0)
    for number in range(5 if often else 1):
        child = os.fork()
        if child == 0:
            fp.stream_features(bridge.model, bridge.saes[:1], blocks(pairs, 2), tmp_path / f"killed {number}", **OPTIONS)
            os._exit(0)
        time.sleep(r.uniform(0.1, 1.5))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = fp.stream_features(bridge.model, bridge.saes[:1], blocks(pairs, 2), tmp_path / f"killed {number}", **OPTIONS)
        pd.testing.assert_frame_equal(found.load().to_pandas(), expected)
