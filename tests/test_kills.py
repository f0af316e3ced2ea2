"""Processes that are killed at random points, and two processes at once: nothing is lost, run again or written by halves.

Each of these computations resumes from a journal. A child process is killed with SIGKILL at random moments; then this
process finishes what is left, with the same bits as a run that was never killed.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Small, small_hooked
from test_graphs import transcoders
from test_nodes import pairs_of
from test_streaming import blocks, many

import featpatch as fp
from featpatch.engine.journal import Journal

KILLS = 10
SITES = ("blocks.1.hook_resid_pre", "blocks.2.hook_resid_post")
ROWS: dict[str, Any] = {"batch_rows": 20, "progress": False}


@cache
def small() -> Small:
    return small_hooked()


@cache
def saes() -> list[Any]:
    return [small().at(site) for site in SITES]


@cache
def top() -> fp.Effects:
    return fp.rank_features(small().model, saes(), pairs_of(small()), positions="each", progress=False).top(30)


@cache
def graph() -> Any:
    prompt = small().clean[0].tolist()
    return fp.attribution_graph(small().model, given(), prompt, targets=[3, 7], progress=False).prune(0.97, 0.999)


@cache
def given() -> list[Any]:
    return transcoders(small().model)


def ranking(folder: Path) -> list[Any]:
    found = fp.rank_features(small().model, saes(), pairs_of(small()), positions="each", journal=folder / "journal", **ROWS)
    return table(found)


def streaming(folder: Path) -> list[Any]:
    stored = fp.stream_features(small().model, saes(), blocks(many(small(), 6), 2), folder / "stream", **ROWS)
    assert not list((folder / "stream").glob("*.journal"))
    return table(stored.load())


def circuits(folder: Path) -> list[Any]:
    heads = [fp.Node(f"blocks.{layer}.attn.hook_z", "head", n) for layer in range(3) for n in range(4)]
    mlps = [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation") for layer in range(3)]
    found = fp.find_circuit(
        small().model, pairs_of(small()), nodes=[*heads, *mlps], method="greedy", size=8,
        journal=folder / "journal", progress=False,
    )  # fmt: skip
    return [found.items, found.scores.tobytes(), found.faithfulness]


def graphs(folder: Path) -> list[Any]:
    """The exact effects of a graph's nodes, by ablation and with corrupted values, in two journals."""
    pair = fp.Pair(graph().prompt, tuple(small().corrupted[0].tolist()), (3,), (7,))
    found = fp.graph_effects(
        small().model, given(), graph(), pair=pair, edges=2, journal=folder / "journal", progress=False
    )  # fmt: skip
    return [found.nodes, found.exact.tobytes(), found.swapped.tobytes(), found.edges]


def groups(folder: Path) -> list[Any]:
    found = fp.group_features(
        small().model,
        saes(),
        pairs_of(small()),
        top(),
        similarity="decoder",
        size=9,
        journal=folder / "journal",
        **{**ROWS, "batch_rows": 6},
    )
    return [found.names, found.patches, *table(found.effects)]


def table(effects: fp.Effects) -> list[Any]:
    columns = ("clean", "corrupted", "row", "pair", "denoised", "noised")
    return [effects.nodes, *(getattr(effects, name).tobytes() for name in columns)]


RUNS: list[Callable[[Path], list[Any]]] = [ranking, streaming, circuits, graphs, groups]


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The batches that this process measures."""
    keys: list[str] = []
    put = Journal.put

    def noted(self: Journal, key: str, values: torch.Tensor) -> None:
        keys.append(key)
        put(self, key, values)

    monkeypatch.setattr(Journal, "put", noted)
    monkeypatch.setattr("featpatch.circuits.graph.TOKENS_AT_ONCE", 100)
    monkeypatch.setattr("featpatch.patching.study.row_budget", lambda *args: 6)
    return keys


@dataclass
class Child:
    """A fork of this process that runs something and notes every batch that it has on disk."""

    pid: int
    log: Path

    @classmethod
    def of(
        cls, run: Callable[[Path], list[Any]], folder: Path, log: Path, whole: list[Any], gate: int | None = None
    ) -> "Child":
        """Start it; with a gate, the end of a pipe, it waits until there is something to read."""
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                if gate is not None:
                    os.read(gate, 1)
                status = cls._inside(run, folder, log, whole)
            finally:
                os._exit(status)
        return cls(pid, log)

    @staticmethod
    def _inside(run: Callable[[Path], list[Any]], folder: Path, log: Path, whole: list[Any]) -> int:
        """Return 0 for the right result, 2 for a FeatpatchError and 3 for anything else."""
        put = Journal.put

        def noted(self: Journal, key: str, values: torch.Tensor) -> None:
            put(self, key, values)
            with log.open("a") as file:
                file.write(f"{self.path.name} {key}\n")

        Journal.put = noted  # type: ignore[method-assign]
        try:
            return 0 if run(folder) == whole else 3
        except BaseException as error:
            log.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
            return 2 if type(error) is fp.FeatpatchError else 3

    @property
    def batches(self) -> int:
        """The number of batches that it has noted."""
        return len(self.log.read_text().splitlines()) if self.log.exists() else 0

    def wait_for(self, batches: int) -> None:
        """Wait until it has noted so many batches, or a minute."""
        start = time.monotonic()
        while self.batches < batches and time.monotonic() - start < 60:
            time.sleep(0.001)

    def end(self) -> int:
        """Wait for its end; return its status, negative if it was killed."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.extended
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_killed_at_random_points_nothing_is_lost_or_run_again(
    run: Callable[[Path], list[Any]], written: list[str], tmp_path: Path
) -> None:
    torch.set_num_threads(1)
    r, middle = random.Random(run.__name__), 0
    whole = run(tmp_path / "warm")  # also what is computed once and kept
    written.clear()
    start = time.monotonic()
    assert run(tmp_path / "whole") == whole
    duration, every = time.monotonic() - start, len(written)
    for number in range(KILLS):
        folder = tmp_path / f"killed {number}"
        child = Child.of(run, folder, tmp_path / f"{number}.log", whole)
        child.wait_for(r.randrange(every))
        time.sleep(r.uniform(0, 2) * duration / every)
        os.kill(child.pid, signal.SIGKILL)
        child.end()
        before = child.batches
        middle += 0 < before < every
        written.clear()
        assert run(folder) == whole
        assert len(written) in (every - before, every - before - 1), "the kill may come between a batch and its note"
    print(run.__name__, f"{middle} of {KILLS} kills in the middle of {every} batches")
    assert middle > KILLS / 2, "too few kills came in the middle"


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.extended)])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_two_processes_at_once(run: Callable[[Path], list[Any]], times: int, written: list[str], tmp_path: Path) -> None:
    """Of two that begin at the same time on the same files, each gives the right result or says that the files are in use."""
    torch.set_num_threads(1)
    r, ends = random.Random(run.__name__), Counter[str]()
    start = time.monotonic()
    whole = run(tmp_path / "whole")
    duration = time.monotonic() - start
    for number in range(times):
        folder, (gate, opened) = tmp_path / f"folder {number}", os.pipe()
        logs = [tmp_path / f"{number} {which}.log" for which in ("first", "second")]
        children = [Child.of(run, folder, log, whole, gate) for log in logs]
        os.write(opened, b"1")
        time.sleep(0 if number % 2 == 0 else r.uniform(0, duration))
        os.write(opened, b"2")
        statuses = [child.end() for child in children]
        os.close(gate)
        os.close(opened)
        for status, log in zip(statuses, logs, strict=True):
            said = log.with_suffix(".error").read_text() if log.with_suffix(".error").exists() else ""
            ends["right" if status == 0 else "refused"] += 1
            assert status == 0 or (status == 2 and "is in use by another" in said), (status, said)
        assert 0 in statuses
        written.clear()
        assert run(folder) == whole
        assert written == [], "what one of the two has finished is there"
    print(run.__name__, dict(ends))


def test_a_stream_is_written_by_one_process_at_a_time(tmp_path: Path) -> None:
    """Also between two blocks, when no journal is in use."""
    ends = []

    def given_slowly() -> Iterator[fp.Pairs]:
        for block in blocks(many(small(), 4), 2):
            ends.append(Child.of(streaming, tmp_path, tmp_path / "log", []).end())
            yield block

    stored = fp.stream_features(small().model, saes(), given_slowly(), tmp_path / "stream", **ROWS)
    assert ends == [2, 2]
    assert "is in use by another process or thread" in (tmp_path / "log.error").read_text()
    assert stored.blocks == 2


def test_two_processes_that_write_the_same_files(tmp_path: Path) -> None:
    """Each time one reads a file, it is what one of the two wrote, and whole."""
    tables, path = [top(), top().top(3)], tmp_path / "effects"
    nodes = [table.nodes for table in tables]
    tables[0].save(path)
    children = []
    for own in tables:
        pid = os.fork()
        if pid == 0:
            while True:
                own.save(path)
        children.append(pid)
    try:
        seen = {nodes.index(fp.Effects.load(path).nodes) for _ in range(60)}
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert seen == {0, 1}
