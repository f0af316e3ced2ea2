#!/usr/bin/env python3
"""Mutation testing: what share of small changes of the core's code do the tests notice?

First a run of the tests with coverage says which tests run which lines, and how long each takes. Then comes a random sample of
the changes in changes.py, a share of each file's, so that the result is unbiased whenever it is stopped. A process with the
foreign libraries imported forks for every mutant; the child imports featpatch with the change (nothing is written to the tree)
and runs tests that run the changed line until one fails: the quickest of every test file first, of SECONDS together. What runs
only at import (constants, heads of classes) has all tests of its file. Survivors are for reading: is a test missing, or does
the change make no difference?

Results are appended to build/mutants/results.jsonl; a later call goes on from there. Remove build/mutants to start anew.
"""

import argparse
import gc
import json
import os
import random
import re
import resource
import select
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module
from importlib.machinery import SourceFileLoader
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from changes import Mutant, mutants
from coverage import CoverageData
from scipy.stats import binomtest

OUT, SECONDS, SEED = Path("build/mutants"), 45, 20261202
LIBRARIES = ["torch", "sae_lens", "transformer_lens", "transformers", "hypothesis", "beartype", "scipy.stats", "pandas"]
OPTIONS = ["-oaddopts=", "-q", "-pno:cacheprovider", "-pno:xdist", "-Wignore::pytest.PytestAssertRewriteWarning"]
SLOW = ["soak", "execution", "lost_nodes", "demo", "readme", "examples", "devices", "docs", "diagram"]
LONG = (
    "tests/test_engine.py::test_killed_at_random_points_it_resumes_to_the_same_bits",
    "tests/test_command_line.py::test_streams_and_workers",
)
STRUCTURE = "tests/test_layers.py::test_dataclasses_are_frozen"
FIRST = re.compile("test_(laws|by_hand|engine|attribution|statistics|effects|paths|edges|sets|ablation)")
"""Tests with oracles of their own, which are tried first."""


class Notes:
    """Tells the parent through a pipe how every test went, and how much time of the processor it took."""

    def __init__(self, pipe: int) -> None:
        self.pipe, self.before = pipe, processors()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A line for each part of a test."""
        before, self.before = self.before, processors()
        os.write(self.pipe, f"{report.outcome}\t{self.before - before}\t{report.nodeid}\n".encode())


def processors() -> float:
    """Seconds that this process and the commands that it started have had of the processors."""
    return sum(os.times()[:4])


def start(options: list[str], mutant: Mutant | None = None) -> tuple[int, int]:
    """Runs pytest in a fork, with the mutant in place of its file; the child's id and the pipe."""
    reads, writes = os.pipe()
    if child := os.fork():
        os.close(writes)
        return child, reads
    os.setpgid(0, 0)
    os.dup2(os.open(OUT / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(1, 2)
    if mutant:
        resource.setrlimit(resource.RLIMIT_CPU, (30 + 2 * SECONDS, 30 + 2 * SECONDS))
        replace(str(Path(mutant.file).resolve()), mutant.source())
    scratch = OUT.resolve() / f"tmp{os.getpid()}"
    status = pytest.main([*OPTIONS, f"--basetemp={scratch}", *options], plugins=[Notes(writes)])
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(status)


def replace(path: str, source: bytes) -> None:
    """Imports read this source for that file, past its compiled copy."""
    get_data, path_stats = SourceFileLoader.get_data, SourceFileLoader.path_stats

    def stats(self: Any, wanted: str) -> Any:
        if wanted == path:
            raise OSError
        return path_stats(self, wanted)

    SourceFileLoader.get_data = lambda self, wanted: source if wanted == path else get_data(self, wanted)
    SourceFileLoader.path_stats = stats


def measure() -> None:
    """The run with coverage, and the seconds of every test that passes."""
    os.environ["COVERAGE_FILE"] = str(OUT / "coverage")
    left_out = [*(f"--ignore=tests/test_{name}.py" for name in SLOW), *(f"--deselect={test}" for test in LONG)]
    child, pipe = start(["--cov=featpatch", "--cov-context=test", "--cov-report=", *left_out])
    seconds: dict[str, float] = defaultdict(float)
    with open(pipe) as notes:
        for outcome, duration, test in (line.rstrip("\n").split("\t", 2) for line in notes):
            seconds[test] += float(duration) if outcome == "passed" else float("inf")
    os.waitpid(child, 0)
    (OUT / "seconds.json").write_text(json.dumps(seconds, indent=1))


def tests(mutant: Mutant, lines: dict[int, list[str]], seconds: dict[str, float]) -> Iterator[str]:
    """Those to run, in turn from every test file; all tests of a file in whose fixtures the line is run."""
    found = {name for line in range(mutant.first, mutant.last + 1) for name in lines.get(line, [])}
    if found == {""}:
        found = {STRUCTURE, *(name for names in lines.values() for name in names)}
    names = {name.rsplit("|", 1)[0] for name in found} | {name.split("::")[0] for name in found if name.endswith("|setup")}
    by_file: dict[str, list[str]] = defaultdict(list)
    for test in sorted(seconds, key=seconds.__getitem__):
        if test in names or test.split("::")[0] in names:
            by_file[test.split("::")[0]].append(test)
    left = float(SECONDS)
    for turn in zip_longest(*(by_file[file] for file in sorted(by_file, key=lambda name: (not FIRST.search(name), name)))):
        for test in filter(None, turn):
            if seconds[test] <= left:
                yield test
                left -= seconds[test]


def sample() -> list[Mutant]:
    """All mutants in random order, such that any first part holds about the same share of every file's."""
    by_file, placed = defaultdict(list), []
    for mutant in mutants(Path("featpatch")):
        by_file[mutant.file].append(mutant)
    for file, of_file in by_file.items():
        rng = random.Random(f"{SEED} {file}")
        rng.shuffle(of_file)
        shift = rng.random()
        placed += [((place + shift) / len(of_file), mutant) for place, mutant in enumerate(of_file)]
    return [mutant for _, mutant in sorted(placed, key=lambda pair: pair[0])]


def judge(queue: list[Mutant], workers: int) -> Iterator[tuple[Mutant, str, str]]:
    """Runs the mutants, so many at a time: what became of each, and the test that failed."""
    data, seconds = CoverageData(str(OUT / "coverage")), json.loads((OUT / "seconds.json").read_text())
    data.read()
    queue, running = queue[::-1], {}
    while queue or running:
        while queue and len(running) < workers:
            mutant = queue.pop()
            chosen = [*tests(mutant, data.contexts_by_lineno(str(Path(mutant.file).resolve())), seconds)]
            if not chosen or mutant.source() is None:
                yield mutant, "no change" if chosen else "not covered", ""
                continue
            child, pipe = start(["-x", *chosen], mutant)
            running[pipe] = mutant, child, []
        for pipe in select.select([*running], [], [])[0] if running else ():
            mutant, child, notes = running[pipe]
            if new := os.read(pipe, 65536):
                notes.append(new)
                continue
            status = os.waitpid(child, 0)[1]
            failed = [line.split("\t")[2] for line in b"".join(notes).decode().splitlines() if line.startswith("failed")]
            yield mutant, "killed" if status else "survived", failed[0] if failed else f"status {status}"
            os.close(pipe)
            del running[pipe]


def table(every: list[Mutant], found: list[dict[str, Any]]) -> Iterator[str]:
    """By file and for all: mutants, tried, killed, survived, and the share killed with a 95 % interval (Clopper & Pearson)."""
    yield f"{'':40}{'mutants':>8}{'tried':>8}{'killed':>8}{'survived':>10}  killed"
    for file in [*sorted({mutant.file for mutant in every}), ""]:
        count = Counter(result["outcome"] for result in found if file in ("", result["file"]))
        killed, alive = count["killed"], count["survived"] + count["not covered"]
        total, share = sum(file in ("", mutant.file) for mutant in every), ""
        if killed + alive:
            low, high = binomtest(killed, killed + alive).proportion_ci()
            share = f"{killed / (killed + alive):7.1%} ({low:.1%} to {high:.1%})"
        yield f"{file or 'all':40}{total:8}{killed + alive:8}{killed:8}{alive:10}{share}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=600, help="how many mutants, those of earlier calls included")
    parser.add_argument("--workers", type=int, default=2)
    asked = parser.parse_args()
    OUT.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1", "FEATPATCH_EXAMPLES": "30"}
    sys.path.insert(0, ".")
    sys.dont_write_bytecode, sys.pycache_prefix = False, str(OUT.resolve() / "pycache")
    for library in LIBRARIES:
        import_module(library)
    gc.freeze()
    if not (OUT / "seconds.json").exists():
        measure()
    every = sample()
    with (OUT / "results.jsonl").open("a+") as results:
        results.seek(0)
        found = [json.loads(line) for line in results]
        done = {(result["file"], result["operator"], result["number"]) for result in found}
        left = [mutant for mutant in every[: asked.limit] if (mutant.file, mutant.operator, mutant.number) not in done]
        for mutant, outcome, by in judge(left, asked.workers):
            found.append({**asdict(mutant), "outcome": outcome, "by": by})
            results.write(json.dumps(found[-1]) + "\n")
            results.flush()
    print(*table(every, found), sep="\n")
    for result in found:
        if result["outcome"] in ("survived", "not covered"):
            print(f"{result['file']}:{result['line']} {result['operator']} {result['number']} {result['outcome']}")
