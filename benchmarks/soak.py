"""A soak test: small random sweeps with injected faults; no result may be lost or differ, and memory must not grow.

    python benchmarks/soak.py [--minutes 30] [--seed 0] [--folder DIR]

Each study first runs without faults. Then it runs with a journal in child processes, forks of this one, with one to three
faults injected, until a last process finishes it. Its table must equal that of the run without faults: the same nodes, and
values that are bit-identical, or within `TOLERANCE` if memory ran out, which leads to smaller batches, or if it ran on Ray. A
batch that a process has written must stay in the journal, which this script reads with code of its own, and no other process
may run it again. Meanwhile this process also runs sweeps with faults, and its memory is measured. The test continues until
every fault has occurred.
"""

import argparse
import ctypes
import datetime
import hashlib
import json
import multiprocessing
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import numpy as np
import psutil
import torch
from sae_lens import StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens import HookedTransformer, HookedTransformerConfig

import featpatch as fp
from featpatch.engine.journal import Journal
from featpatch.engine.suffix import SuffixPath
from featpatch.engine.sweep import Sweep

SITES = ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_mid", "blocks.1.hook_mlp_out", "blocks.2.hook_resid_post"]
TOLERANCE = 32
"""The accepted difference of values that were computed in different batches, as a share of the largest value of a table (of 1
if that is larger), in units of the dtype's precision `torch.finfo(dtype).eps`.

Matrix products of other sizes round differently: 1,759 studies without faults, run again with smaller batches, differed by up
to 15 units.
"""
FAULTS = {
    "memory refused": "", "memory limited": "single patch", "killed": "", "Ctrl-C": "KeyboardInterrupt", "NaN": "NaN",
    "disk full": "can't be written", "file too large": "can't be written", "truncated": "", "written twice": "",
    "a byte flipped": "first line is damaged", "clock jumps": "", "two at once": "in use by another process",
}  # fmt: skip
"""The faults, each with a pattern for the error message with which a process may end because of it."""
WRONG = ("batches lost", "batches run again", "rows lost", "rows that differ")
"""The counts that must be zero at the end."""
WARM = 20
"""The number of sweeps in this process after which its memory is measured."""
LONGER = 8
"""The number of minutes by which the test is extended if some faults have not occurred."""
now = time.perf_counter


@dataclass(frozen=True)
class Model:
    """A random transformer with a dictionary at each of `SITES`, and batch sizes to choose from."""

    model: Any
    saes: list[Any]
    rows: list[int]

    @classmethod
    def of(cls, width: int, kind: str, rows: list[int]) -> "Model":
        """Make a model of this width and dtype; `rows` are values of `batch_rows` to choose from."""
        generator = torch.Generator().manual_seed(width)
        config = HookedTransformerConfig(
            n_layers=3, d_model=width, n_ctx=16, d_head=width // 4, n_heads=4, d_mlp=4 * width, d_vocab=40, act_fn="gelu",
            dtype=getattr(torch, kind), seed=1, initializer_range=1.2 / width**0.5,
        )  # fmt: skip
        saes = [StandardSAE(StandardSAEConfig(width, 24, kind, metadata=SAEMetadata(hook_name=site))) for site in SITES]
        for parameter in (each for sae in saes for each in sae.parameters()):
            parameter.data.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        return cls(HookedTransformer(config).eval(), saes, rows)


@dataclass(frozen=True)
class Study:
    """A random ranking of features or components."""

    model: Model
    options: dict[str, Any]

    @classmethod
    def draw(cls, models: list[Model], random: Random, rows: int | None = None) -> "Study":
        """Draw a study of one of the models whose sweep succeeds."""
        while True:
            study = cls._draw(models, random, rows)
            with suppress(fp.FeatpatchError):  # the gap between the runs may be near zero
                study.run(progress=False)
                return study

    @classmethod
    def _draw(cls, models: list[Model], random: Random, rows: int | None) -> "Study":
        model, pairs, length = random.choice(models), random.randint(1, 3), random.randint(5, 9)
        clean = torch.tensor([[random.randrange(10, 40) for _ in range(length)] for _ in range(pairs)])
        corrupted = clean.clone()
        for place in random.sample(range(length), 2):
            corrupted[:, place] = (clean[:, place] + 1) % 40
        answers = torch.arange(pairs)
        options = {
            "pairs": fp.Pairs.from_tokens(clean, corrupted, answers + 3, answers + 6),
            "batch_rows": rows or random.choice(model.rows),
            "metric": random.choice(["logit_diff", ["logit_diff", "log_prob"], ["prob", "neg_kl"]]),
            "positions": random.choice(["each", "all"]), "directions": random.choice([["denoising"], ["denoising", "noising"]]),
        }  # fmt: skip
        what = random.choice([{"saes": random.sample(model.saes, 2)}, {"sites": ["z", "mlp_out"]}])
        return cls(model, {**options, **what})

    def run(self, **options: Any) -> fp.Effects:
        """Run the sweep and return its effects."""
        ranked = fp.rank_features if "saes" in self.options else fp.rank_components
        return ranked(self.model.model, **self.options, **options)

    @property
    def tolerance(self) -> float:
        """The accepted difference of values that were computed in different batches."""
        return TOLERANCE * torch.finfo(self.model.model.cfg.dtype).eps


def entries(effects: fp.Effects) -> dict[Any, tuple[float, float]]:
    """Return the denoised and noised value of each metric, node and pair."""
    pairs = effects.metadata.get("of_pairs", range(len(effects.clean)))
    found: dict[Any, tuple[float, float]] = {}
    for name in effects.metrics:
        table = effects.for_metric(name)
        keys = [(name, table.nodes[row], pairs[pair]) for row, pair in zip(table.row, table.pair, strict=True)]
        found |= dict(zip(keys, zip(table.denoised.tolist(), table.noised.tolist(), strict=True), strict=True))
    return found


def compare(found: fp.Effects, expected: fp.Effects, tolerance: float) -> tuple[int, int, float]:
    """Compare two tables of effects; in an unfinished table, only the known values must be right.

    Returns:
        The number of lost entries, the number of entries that differ or should not exist, and the largest difference as a share
        of the largest value.
    """
    ours, theirs = entries(found), entries(expected)
    lost = len(theirs.keys() - ours.keys()) if found.finished else 0
    both = [key for key in ours if key in theirs]
    values, right = (np.array([of[key] for key in both]).reshape(-1, 2) for of in (ours, theirs))
    difference = abs(values - right) / max(1, np.nanmax(abs(right), initial=0))
    same = (difference <= tolerance) | (np.isnan(values) & (np.isnan(right) | (not found.finished)))
    return lost, len(ours) - len(both) + int((~same.all(1)).sum()), float(np.nanmax(difference, initial=0))


def keys_of(journal: Path) -> set[str]:
    """Return the batches of a journal whose lines are intact."""
    lines = [line.rpartition(b" ") for line in (journal.read_bytes() if journal.exists() else b"").split(b"\n")[:-1]]
    intact = [text for text, _, checksum in lines if hashlib.sha256(text).hexdigest()[:16].encode() == checksum]
    return {content["batch"] for content in map(json.loads, intact) if "batch" in content}


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Count the batches that have begun; the forward passes of the initial self-check are not counted."""
    original, calls = Sweep.run, Counter[str]()

    def run(sweep: Any, batch: Any) -> Any:
        calls["batches"] += 1
        return original(sweep, batch)

    with patch.object(Sweep, "run", run):
        yield calls


@contextmanager
def no_memory(number: int, met: Callable[[], object], limited: bool) -> Iterator[None]:
    """Make batches from a number on run out of memory.

    Two of them raise an error for this, or, if `limited`, all are run with a limit on the address space.
    """
    original = SuffixPath.logits

    def logits(path: Any, units: Any, columns: Any) -> Any:
        single = sum(len(unit.patches) for unit in units) == 1
        if calls["batches"] < number or (not limited and (calls["refused"] == 2 or single)):
            return original(path, units, columns)
        if not limited:
            calls["refused"] += 1
            met()
            raise [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()][calls["refused"] % 2]
        limits, full = resource.getrlimit(resource.RLIMIT_AS), list[torch.Tensor]()
        resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms, limits[1]))
        with suppress(RuntimeError, MemoryError):
            while True:
                full.append(torch.empty(2**16))
        del full[-8:]
        try:
            return original(path, units, columns)
        except (RuntimeError, MemoryError):
            met()
            raise
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    with counted() as calls, patch.object(SuffixPath, "logits", logits):
        yield


@contextmanager
def poisoned(number: int, met: Callable[[], object]) -> Iterator[None]:
    """Set the first changed row of one batch to NaN where it enters the forward pass."""
    original = SuffixPath._enter

    def enter(path: Any, place: Any, matrix: Any) -> Any:
        start, rows, x = original(path, place, matrix)
        if calls["batches"] != number:
            return start, rows, x
        met()
        return start, rows, x.index_fill(0, torch.tensor(0), torch.nan)

    with counted() as calls, patch.object(SuffixPath, "_enter", enter):
        yield


@contextmanager
def jumping(random: Random, met: Callable[[], object]) -> Iterator[None]:
    """Make all clocks jump by hours in both directions, including those of the progress bar and of the table's date."""

    def jumps(clock: Callable[[], float]) -> Callable[[], float]:
        return lambda: (met(), clock() + random.choice([0, 1, -1]) * random.uniform(0, 1e5))[1]

    class Date(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.datetime.fromtimestamp(time.time(), tz)

    with patch("time.time", jumps(time.time)), patch("time.monotonic", jumps(time.monotonic)), \
         patch("time.perf_counter", jumps(time.perf_counter)), patch("tqdm.std.time", jumps(time.time)), \
         patch("featpatch.effects.collector.datetime", Date):  # fmt: skip
        yield


def fault(name: str, random: Random, number: int, met: Callable[[], object]) -> Any:
    """Return a context manager that injects a fault into this process; faults from outside need none."""
    faults = {
        "memory refused": lambda: no_memory(number, met, limited=False),
        "memory limited": lambda: no_memory(number, met, limited=True),
        "NaN": lambda: poisoned(number, met),
        "clock jumps": lambda: jumping(random, met),
    }
    return faults.get(name, nullcontext)()


def die(number: int) -> None:
    """Make this process kill itself when it is about to write the line of a batch to disk."""
    sync, calls = os.fsync, Counter[str]()

    def synced(file: int) -> None:
        calls["all"] += 1
        if calls["all"] > number:
            os.kill(os.getpid(), signal.SIGKILL)
        sync(file)

    os.fsync = synced


def kill_a_worker(folder: Path) -> None:
    """Kill one of Ray's workers once a batch has returned."""
    while not (folder / "met").exists():
        with suppress(psutil.NoSuchProcess):
            workers = [
                process for process in psutil.Process().children(recursive=True) if process.name().startswith("ray::_Work")
            ]
            if workers and (folder / "noted").exists():
                workers[0].kill()
                (folder / "met").touch()
        time.sleep(0.005)


def child(study: Study, journal: Path, folder: Path, name: str, random: Random, number: int, delay: float) -> None:
    """Run a study with a fault in this child process and write the outcome to files in a folder.

    `noted` lists the batches that were written to the journal, `table` or `error` holds the result, and `met` exists if the
    fault occurred.
    """
    put = Journal.put

    def noting(book: Any, key: str, values: Any) -> None:
        put(book, key, values)
        with (folder / "noted").open("a") as file:
            file.write(key + "\n")

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    sys.stderr, executor = open(2, "w", closefd=False), None  # noqa: SIM115
    if name in ("truncated", "a byte flipped", "written twice"):
        die(number)
    if name == "file too large":
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, resource.RLIM_INFINITY))
    if name == "worker killed":
        executor = fp.Ray(workers=2)
        threading.Thread(target=kill_a_worker, args=(folder,), daemon=True).start()
    try:
        if name in ("killed", "Ctrl-C"):
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
            sent = signal.SIGKILL if name == "killed" else signal.SIGINT
            threading.Timer(delay, os.kill, (os.getpid(), sent)).start()
        with patch.object(Journal, "put", noting), fault(name, random, number, (folder / "met").touch):
            found = study.run(journal=journal, progress=True, executor=executor)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        (folder / "torn").write_bytes(pickle.dumps(found))
        (folder / "torn").rename(folder / "table")
    except BaseException as error:
        (folder / "error").write_text(f"{type(error).__name__}: {error}")
    os._exit(0)


@dataclass
class Trial:
    """A study that is run with faults.

    Attributes:
        study: the study.
        folder: the folder for its files.
        expected: the effects of the run without faults.
        lines: the number of batches in its complete journal.
        size: the size of its complete journal in bytes.
        seconds: the duration of the run without faults.
        exact: whether the result must be bit-identical.
        written: the batches that the journal must hold.
        noted: those of them that the processes checked so far have noted, which no other process may run.
        runs: the number of processes that were started.
    """

    study: Study
    folder: Path
    expected: fp.Effects
    lines: int
    size: int
    seconds: float
    exact: bool = True
    written: set[str] = field(default_factory=set)
    noted: set[str] = field(default_factory=set)
    runs: int = 0

    @classmethod
    def of(cls, study: Study, folder: Path) -> "Trial":
        """Run a study without faults."""
        (folder / "disk").mkdir(parents=True)
        start, whole = now(), folder / "whole"
        expected = study.run(journal=whole, progress=False)
        return cls(study, folder, expected, len(keys_of(whole)), whole.stat().st_size, now() - start)

    @property
    def journal(self) -> Path:
        """The journal that is kept from process to process."""
        return self.folder / "disk" / "journal"

    def start(self, name: str, random: Random) -> tuple[Any, Path]:
        """Start a child process with a fault; return the process and its folder."""
        number = random.randint(1, max(1, self.lines - len(self.written)))
        if name == "file too large":
            number = (self.size + (self.journal.stat().st_size if self.journal.exists() else 0)) // 2
        self.runs += 1
        folder = self.folder / str(self.runs)
        folder.mkdir()
        arguments = (self.study, self.journal, folder, name, random, number, random.uniform(0, 0.8 * self.seconds))
        process = multiprocessing.get_context("fork").Process(target=child, args=arguments)
        process.start()
        return process, folder

    def mount(self, *options: str) -> bool:
        """Mount a small disk for the journal; return whether that is permitted."""
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "soak", str(self.folder / "disk")]
        return subprocess.run(command, capture_output=True).returncode == 0

    def half_full(self) -> int:
        """Return the size in bytes of a disk on which half of the missing part of the journal fits."""
        used = self.journal.stat().st_size if self.journal.exists() else 0
        return 4096 * max(-(-used // 4096), (used + self.size) // 8192, 1)

    def damage(self, name: str, random: Random) -> None:
        """Damage the journal: truncate it, flip a bit in it or duplicate its content."""
        content = bytearray(self.journal.read_bytes())
        if name == "truncated":
            del content[random.randrange(len(content)) :]
        elif name == "a byte flipped":
            content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        else:
            content = 2 * content
        self.journal.write_bytes(content)
        self.written = keys_of(self.journal)
        self.noted &= self.written


class Soak:
    """The state of the soak test.

    Attributes:
        met: how often each fault has occurred.
        counts: other counts, by name.
        problems: descriptions of unexpected events.
        memory: the memory of this process in bytes, after some numbers of sweeps in it.
    """

    def __init__(self, folder: Path, seed: int, ray: bool = True) -> None:
        self.folder, self.random, self.deck = folder, Random(seed), list[str]()
        self.met, self.counts, self.problems, self.memory = (
            Counter[str](),
            Counter[str](),
            list[str](),
            [(0, psutil.Process().memory_info().rss)],
        )
        self.models = [Model.of(16, "float64", [20, 64, 200]), Model.of(16, "float32", [20, 64, 200])]
        self.large = [Model.of(256, "float32", [2000]), Model.of(256, "float64", [2000])]
        self.names = [*FAULTS, *(["worker killed"] if ray and find_spec("ray") else [])]
        self.inside = [Trial.of(Study.draw(self.models, self.random), folder / f"inside {n}") for n in range(4)]
        self.ray: tuple[Trial, Any] | None = None

    def check(self, trial: Trial, found: fp.Effects, exact: bool) -> None:
        """Compare a table with that of the run without faults, and count the differences."""
        tolerance = 0 if exact else trial.study.tolerance
        lost, differ, most = compare(found, trial.expected, tolerance)
        self.counts.update({"rows lost": lost, "rows that differ": differ})
        if lost or differ:
            self.problems.append(
                f"{trial.folder.name}: {lost} rows lost, {differ} differ by up to {most:.2g} (allowed {tolerance})"
            )
        if found.finished:
            self.counts["patches"] += len(found.row) * len(found.directions_run())

    def sweep(self) -> None:
        """Run one sweep in this process, with a fault or without."""
        self.counts["sweeps here"] += 1
        trial = self.inside[self.counts["sweeps here"] % len(self.inside)]
        name = self.random.choice(["memory refused", "NaN", "clock jumps", "truncated", "none"])
        trial.journal.unlink(missing_ok=True)
        met = Counter[str]()
        try:
            with fault(name, self.random, self.random.randint(1, trial.lines), lambda: met.update([name])):
                found = trial.study.run(journal=trial.journal, progress=False)
        except fp.FeatpatchError as error:
            if name != "NaN" or "NaN" not in str(error):
                self.problems.append(f"{name} here: {error}")
        if name in ("NaN", "truncated"):
            if name == "truncated":
                trial.damage(name, self.random)
                met[name] += 1
            found = trial.study.run(journal=trial.journal, progress=False)
        self.met.update([f"{each} (here)" for each in met])
        self.check(trial, found, exact=name != "memory refused")
        if self.counts["sweeps here"] % 10 == 0:
            ctypes.CDLL(None).malloc_trim(0)  # else memory that is free but not returned would count as growth
            self.memory.append((self.counts["sweeps here"], psutil.Process().memory_info().rss))

    def end(self, trial: Trial, process: Any, folder: Path, name: str) -> tuple[bool, bool]:
        """Check the files of a child process; return whether its fault occurred, and whether its table is finished."""
        process.join()
        noted, error, table = (folder / each for each in ("noted", "error", "table"))
        ran = noted.read_text().split() if noted.exists() else []
        self.counts["batches run again"] += len(ran) - len({*ran} - trial.noted)
        left = keys_of(trial.journal)
        self.counts["batches lost"] += len((trial.written | {*ran}) - left)
        trial.written, trial.noted = left, (trial.noted | {*ran}) & left
        said = error.read_text() if error.exists() else ""
        if said and not (FAULTS.get(name) and re.search(FAULTS[name], said)):
            self.problems.append(f"{name}: {said}")
        if "first line is damaged" in said:
            trial.journal.unlink()
            trial.written, trial.noted = set(), set()
        if table.exists():
            found = pickle.loads(table.read_bytes())
            self.check(trial, found, trial.exact)
            return (folder / "met").exists() or not found.finished, found.finished
        if process.exitcode != -signal.SIGKILL and not said:
            self.problems.append(f"{name}: ended with {process.exitcode}")
        return True, False

    def attempt(self, trial: Trial, name: str) -> bool:
        """Run a trial with a fault, and return whether it is finished."""
        trial.exact &= not name.startswith("memory")
        if name == "disk full":
            trial.mount("remount", f"size={trial.half_full()}")
        processes = [trial.start(name, self.random) for _ in range(2 if name == "two at once" else 1)]
        while any(process.is_alive() for process, _ in processes):
            self.sweep()
        ends = [self.end(trial, *process, name) for process in processes]
        if name == "disk full":
            trial.mount("remount", "size=4m")
        if name in ("truncated", "a byte flipped", "written twice") and not any(done for _, done in ends):
            trial.damage(name, self.random)
            if name == "a byte flipped":  # the next process must notice it
                ends = [self.end(trial, *trial.start("none", self.random), name)]
                ends[0] = True, ends[0][1]
        met = any(came for came, _ in ends)
        self.met[name] += met
        if not met and name != "none":
            self.deck.append(name)
        return any(done for _, done in ends)

    def study(self) -> None:
        """Run one study with one to three faults."""
        self.counts["studies"] += 1
        if not self.deck:
            self.deck = self.random.sample([*FAULTS], len(FAULTS))
        names = [self.deck.pop() for _ in range(min(len(self.deck), self.random.randint(1, 3)))]
        models = self.large if "memory limited" in names else self.models
        trial = Trial.of(Study.draw(models, self.random), self.folder / f"study {self.counts['studies']}")
        mounted = "disk full" in names and trial.mount("size=4m")
        if not mounted and "disk full" in names:
            names = [name.replace("disk full", "file too large") for name in names]
            self.met["disk full"] += 1
        try:
            done = [self.attempt(trial, name) for name in [*names, "none"]]
        finally:
            if mounted:
                subprocess.run(["umount", "-l", str(trial.folder / "disk")], check=True)
        if not done[-1]:
            self.counts["rows lost"] += len(trial.expected.row)
        self.counts["restarts"] += trial.runs - 1
        shutil.rmtree(trial.folder)

    def on_ray(self, last: bool) -> None:
        """Run studies on Ray in which a worker is killed, one after another, concurrently with the other studies."""
        if "worker killed" not in self.names:
            return
        if self.ray is None and not last:
            self.counts["on Ray"] += 1
            trial = Trial.of(Study.draw(self.models, self.random, rows=8), self.folder / f"ray {self.counts['on Ray']}")
            trial.exact = False
            self.ray = trial, trial.start("worker killed", self.random)
        elif self.ray is not None and (last or not self.ray[1][0].is_alive()):
            trial, (process, folder) = self.ray
            met, done = self.end(trial, process, folder, "worker killed")
            self.met["worker killed"] += met
            self.counts["rows lost"] += 0 if done else len(trial.expected.row)
            self.ray = None

    def growth(self) -> tuple[float, float, float]:
        """Return the memory in bytes after the warm-up and at the end, and its growth per 1,000 sweeps."""
        sweeps, size = np.array([each for each in self.memory if each[0] >= WARM] or self.memory[-1:], float).T
        slope = np.polyfit(sweeps, size, 1)[0] if len(size) > 2 else 0.0
        return float(size[:5].mean()), float(size[-5:].mean()), 1000 * slope

    def told(self) -> str:
        """Return the README's sentence, which is true only if no problem occurred."""
        before, after, _ = (each / 2**20 for each in self.growth())
        middle = self.memory[len(self.memory) // 2][1] / 2**20
        return (
            f"`python benchmarks/soak.py` ran {self.counts['studies']:,} studies ({self.counts['patches'] / 1e6:.1f} million "
            f"patches) and {self.counts['sweeps here']:,} sweeps in one process under {len(FAULTS)} kinds of faults "
            "(killed, full disk, damaged journals, memory refused, NaN, jumping clock ...): no finished batch was lost and no "
            f"row differed; the process grew from {before:.0f} MB to {after:.0f} MB, ever "
            f"{'more slowly' if after - middle < middle - before else 'faster'}."
        )

    def unmet(self) -> list[str]:
        """Return the faults that have not occurred yet, and "sweeps here" as long as too few sweeps measured the memory."""
        return [name for name in self.names if not self.met[name]] + ["sweeps here"] * (self.counts["sweeps here"] < 2 * WARM)

    def report(self) -> str:
        """Return a summary in one line."""
        before, after, slope = (each / 2**20 for each in self.growth())
        keys = ("studies", "on Ray", "restarts", "patches", "sweeps here", *WRONG)
        numbers = ", ".join(f"{key} {self.counts[key]:,}" for key in keys)
        return (
            f"{numbers}; memory {before:.1f} to {after:.1f} MB, {slope:+.2f} MB per 1,000 sweeps; problems {len(self.problems)}"
        )


def soak(minutes: float, seed: int, folder: Path, growth: float, ray: bool) -> bool:
    """Run the soak test, print its progress, and return whether it found no problem.

    Args:
        minutes: the duration.
        seed: the seed of the random studies and faults.
        folder: the folder for journals.
        growth: the accepted growth of this process in MB.
        ray: whether to run studies on Ray too.
    """
    started = said = now()
    run = Soak(folder, seed, ray)
    while now() - started < 60 * minutes or (run.unmet() and now() - started < 60 * (minutes + LONGER)):
        run.on_ray(last=False)
        run.study()
        if now() - said > 60:
            said = now()
            print(f"{(said - started) / 60:.1f} min: {run.report()}", flush=True)
    run.on_ray(last=True)
    before, after, _ = run.growth()
    print(f"{(now() - started) / 60:.1f} min: {run.report()}", *run.problems[:20], sep="\n")
    print("faults met: " + ", ".join(f"{name} {run.met[name]}" for name in sorted(run.met) if name != "none"))
    wrong = [key for key in WRONG if run.counts[key]] + run.problems + run.unmet()
    fine = not wrong and after - before <= growth * 2**20
    if fine:
        print(run.told())
    return fine


def main() -> None:
    """Run the soak test; the exit code is 1 if a result was lost or differs, an unexpected error occurred, or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for journals; a temporary one by default")
    parser.add_argument("--growth", type=float, default=30, help="MB that this process may grow by")
    parser.add_argument(
        "--ray", action=argparse.BooleanOptionalAction, default=True, help="also studies on Ray, if there is one"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error", fp.SlowPathWarning)  # a fault that breaks the fast path would look like rounding errors
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        fine = soak(options.minutes, options.seed, Path(folder), options.growth, options.ray)
    print("all was well" if fine else "NOT WELL")
    sys.exit(not fine)


if __name__ == "__main__":
    main()
