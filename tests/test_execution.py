"""Sweeps elsewhere: the same rows as here by every executor; on workers of a local Ray whatever is killed on the way."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small import small_bridge, small_hooked
from test_sets import pairs_of

import featpatch as fp
from featpatch.engine.executor import Executor
from featpatch.engine.ray import EXECUTORS
from featpatch.engine.sweep import Sweep
from featpatch.errors import FeatpatchWarning

ray = pytest.importorskip("ray")
HERE = os.getpid()
ROWS: dict[str, Any] = {"batch_rows": 20, "progress": False}


@pytest.fixture(scope="module")
def ended() -> Iterator[None]:
    """Whatever Ray runs is ended after the last test of this module."""
    yield
    ray.shutdown()


@pytest.fixture
def cluster(ended: None) -> None:
    """A Ray of two workers, which find the tests' modules: that of the test before, if it still runs."""
    if not ray.is_initialized():
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent))
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, namespace="featpatch")


def same(one: fp.Effects, other: fp.Effects) -> None:
    assert one.nodes == other.nodes
    for column in ("row", "pair", "clean", "corrupted"):
        np.testing.assert_array_equal(getattr(one, column), getattr(other, column))
    for column in ("denoised", "noised"):
        np.testing.assert_allclose(getattr(one, column), getattr(other, column), atol=1e-12)


class Noting(Executor):
    """Another executor, with the batches that it writes down: what it leaves out would be run here without a word."""

    def __init__(self, inner: Executor) -> None:
        self.inner, self.keys = inner, []  # type: Executor, list[str]

    def run(self, make: Any, shards: int, book: Any, done: Any) -> None:
        self.book = book
        self.inner.run(make, shards, self, done)

    def get(self, key: str) -> Any:
        return self.book.get(key)

    def put(self, key: str, values: torch.Tensor) -> None:
        self.keys.append(key)
        self.book.put(key, values)


class Counted:
    """The logit difference; notes in a folder each batch that a worker measures, and may do something there once."""

    __name__ = "counted"

    def __init__(self, folder: Path, then: Callable[[], object] | None = None, after: int = 3) -> None:
        self.folder, self.then, self.after, self.here = folder, then, after, os.getpid()

    def __call__(self, logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        if os.getpid() != self.here:
            with (self.folder / "batches").open("a") as file:
                file.write(f"{os.getpid()}\n")
            if self.then is not None and self.count > self.after and not (self.folder / "done").exists():
                (self.folder / "done").touch()
                self.then()
        return logits[:, list(correct)].mean(1) - logits[:, list(wrong)].mean(1)

    @property
    def count(self) -> int:
        path = self.folder / "batches"
        return len(path.read_text().splitlines()) if path.exists() else 0


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.usefixtures("cluster")
@pytest.mark.filterwarnings("ignore::featpatch.SlowPathWarning")
@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("options", [
    {"saes": slice(3), "metric": ["logit_diff", "prob"]},
    pytest.param({"saes": slice(1, 2), "screen": fp.Screen(k=5, audit=3, top=3)}, marks=pytest.mark.extended),
])  # fmt: skip
def test_features_are_the_same(executor: str, options: dict[str, Any]) -> None:
    """All and screened, of several dictionaries and metrics; hooks of the user go along."""
    small, pairs = small_bridge(), pairs_of(small_bridge())
    small.model.add_hook("blocks.0.hook_mlp_out", lambda x, hook: 0.9 * x)
    options = {**options, "saes": small.saes[options["saes"]]}
    noting = Noting(EXECUTORS[executor]())
    here, there = (fp.rank_features(small.model, pairs=pairs, **options, **ROWS, executor=e) for e in ("serial", noting))
    same(here, there)
    assert 1 < len(noting.keys) == len(set(noting.keys))


def stored_clt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A random cross-layer transcoder, whose decoders are read from files when they are needed."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"W_enc": [3, 6, 16], "b_enc": [3, 6], "b_dec": [3, 16]}
    weights = {name: torch.randn(size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    decoders = [torch.randn(6, 3 - layer, 16, generator=generator, dtype=torch.float64) for layer in range(3)]
    hooks = {
        "hook": [f"blocks.{n}.ln2.hook_normalized" for n in range(3)],
        "hook_out": [f"blocks.{n}.hook_mlp_out" for n in range(3)],
    }
    fp.dictionaries.CrossLayerTranscoder(**weights, W_dec=decoders, **hooks).save(folder / "clt")
    monkeypatch.setattr("featpatch.sae.cross_formats.KEPT", {"encoders": 0, "decoders": 0})
    return fp.load_sae(folder / "clt", **hooks)


class Interrupted(Executor):
    """In this process, with what would travel to others, and with Ctrl-C after some batches."""

    def __init__(self, after: int = 10**9) -> None:
        self.after = after

    def run(self, make: Any, shards: int, book: Any, done: Any) -> None:
        work, left = make(), self.after
        assert len(work) == shards
        for shard in range(shards):
            for batch in work.batches(shard):
                if not left:
                    raise KeyboardInterrupt
                book.put(batch.key, work.run(shard, batch.key))
                done(batch.patches)
                left -= 1


@pytest.mark.usefixtures("ended")
@pytest.mark.parametrize("on_ray", [False, pytest.param(True, marks=pytest.mark.extended)])
def test_other_sweeps_are_the_same(
    request: pytest.FixtureRequest, on_ray: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Components, paths, ablations, joint patches and CLTs whose decoders stay in files, packed as for another process."""
    if on_ray:
        request.getfixturevalue("cluster")
    small, pairs = small_hooked(), pairs_of(small_hooked())
    ends = [fp.Node(f"blocks.{layer}.hook_mlp_out", "activation") for layer in range(3)]
    patches = [fp.Patch(tuple(ends)), fp.Patch((ends[0], fp.head(2, 1)))]
    clt = stored_clt(tmp_path, monkeypatch)
    for run in (
        lambda **o: fp.rank_features(small.model, clt, pairs, **ROWS, **o),
        lambda **o: fp.rank_nodes(small.model, pairs, patches, combine="add", **ROWS, **o),
        lambda **o: fp.rank_nodes(small.model, pairs, patches, **ROWS, **o),
        lambda **o: fp.rank_components(small.model, pairs, sites=["z", "k", "mlp_out"], **ROWS, **o),
        lambda **o: fp.ablate(small.model, pairs, saes=small.saes[1], to="mean", **ROWS, **o),
        lambda **o: fp.rank_paths(small.model, pairs, senders=ends[:2], receivers=[*ends[1:], "logits"], **ROWS, **o),
    ):
        noting = Noting(fp.Ray(workers=1) if on_ray else Interrupted())
        same(run(), run(executor=noting))
        assert noting.keys


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_a_worker_is_killed(tmp_path: Path) -> None:
    """SIGKILL within a batch: another worker runs that one again, and nothing else twice."""
    small, pairs = small_hooked(), pairs_of(small_hooked())
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole, killed = Counted(tmp_path / "whole"), Counted(tmp_path / "killed", die)
    here = fp.rank_features(small.model, small.saes[1], pairs, metric=whole, **ROWS)
    same(fp.rank_features(small.model, small.saes[1], pairs, metric=whole, executor="ray", **ROWS), here)
    same(fp.rank_features(small.model, small.saes[1], pairs, metric=killed, executor="ray", **ROWS), here)
    assert (tmp_path / "killed" / "done").exists()
    workers = {*(tmp_path / "killed" / "batches").read_text().split()}
    assert len(workers) >= 2


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_workers_that_always_die(tmp_path: Path) -> None:
    small, pairs = small_hooked(), pairs_of(small_hooked())

    def metric(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        if os.getpid() != HERE and len(logits) > 1:
            die()
        return logits[:, correct[0]] - logits[:, wrong[0]]

    with pytest.raises(fp.FeatpatchError, match="workers died one after another"):
        fp.rank_features(small.model, small.saes[1], pairs, metric=metric, executor=fp.Ray(workers=1), **ROWS)


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_errors_of_a_worker_are_raised_here() -> None:
    small, pairs = small_hooked(), pairs_of(small_hooked())

    def metric(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        values = logits[:, correct[0]] - logits[:, wrong[0]]
        return values if len(logits) == 1 or os.getpid() == HERE else values * float("nan")

    with pytest.raises(fp.FeatpatchError, match="NaN|finite"):
        fp.rank_features(small.model, small.saes[1], pairs, metric=metric, executor=fp.Ray(workers=1), **ROWS)


DRIVER = """
import os, signal, sys
from pathlib import Path
import featpatch as fp
from small import small_hooked
from test_execution import ROWS, Counted
from test_sets import pairs_of

small = small_hooked()
driver, number = os.getpid(), int(sys.argv[2])
metric = Counted(Path(sys.argv[1]), lambda: os.kill(driver, number), after=30)
fp.rank_features(small.model, small.saes[1], pairs_of(small), metric=metric, journal=Path(sys.argv[1]) / "journal",
                 executor=fp.Ray(workers=2), **ROWS)
"""


@pytest.mark.extended
def test_the_driver_is_killed(tmp_path: Path) -> None:
    """What reached the journal stays; the same call, here or there, runs the rest only."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, str(tmp_path), str(int(signal.SIGKILL))], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr[-2000:]
    lines = (tmp_path / "journal").read_text().splitlines()
    assert len(lines) > 1
    small, pairs = small_hooked(), pairs_of(small_hooked())
    here = fp.rank_features(small.model, small.saes[1], pairs, metric=Counted(tmp_path), **ROWS)
    calls: list[int] = []
    original = Sweep.run

    def counted(self: Any, batch: Any) -> Any:
        calls.append(1)
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featpatch.engine.sweep.Sweep.run", counted)
        fp.rank_features(small.model, small.saes[1], pairs, metric=Counted(tmp_path), **ROWS)
        every = len(calls)
        calls.clear()
        resumed = fp.rank_features(
            small.model, small.saes[1], pairs, metric=Counted(tmp_path), journal=tmp_path / "journal", **ROWS
        )
    same(resumed, here)
    assert len(calls) == every - (len(lines) - 1)


@pytest.mark.extended
def test_ctrl_c_is_heard_while_workers_run(tmp_path: Path) -> None:
    """The call ends at once, and what came back is in the journal."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", DRIVER, str(tmp_path), str(int(signal.SIGINT))]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert ended.returncode in (0, 1, -signal.SIGINT), ended.stderr[-2000:]
    assert ended.returncode == 0 or "KeyboardInterrupt" in ended.stderr
    assert len((tmp_path / "journal").read_text().splitlines()) > 1
    small, pairs = small_hooked(), pairs_of(small_hooked())
    options: dict[str, Any] = {"metric": Counted(tmp_path), **ROWS}
    resumed = fp.rank_features(small.model, small.saes[1], pairs, journal=tmp_path / "journal", **options)
    same(resumed, fp.rank_features(small.model, small.saes[1], pairs, **options))


@pytest.mark.extended
@pytest.mark.usefixtures("cluster")
def test_workers_that_find_no_room_are_not_waited_for() -> None:
    """One of two processors is held by somebody else."""
    small, pairs = small_hooked(), pairs_of(small_hooked())
    holder = ray.remote(num_cpus=1)(_Holder).remote()
    ray.get(holder.ready.remote())
    try:
        noting = Noting(fp.Ray())
        there = fp.rank_features(small.model, small.saes[1], pairs, executor=noting, **ROWS)
    finally:
        ray.kill(holder)
    assert noting.keys
    same(there, fp.rank_features(small.model, small.saes[1], pairs, **ROWS))


class _Holder:
    def ready(self) -> None: ...


def test_batches_of_other_workers_are_left_out() -> None:
    """A worker whose rounding packs patches in another way gives no values under wrong names; they are run here."""
    small, pairs = small_hooked(), pairs_of(small_hooked())
    calls: list[str] = []

    class Other(Executor):
        def run(self, make: Any, shards: int, book: Any, done: Any) -> None:
            work = make()
            for number, batch in enumerate(work.batches(0)):
                if number % 2:
                    assert work.run(0, batch.key + "x") is None
                    calls.append(batch.key)
                else:
                    book.put(batch.key, work.run(0, batch.key))

    same(fp.rank_features(small.model, small.saes[1], pairs, executor=Other(), **ROWS),
         fp.rank_features(small.model, small.saes[1], pairs, **ROWS))  # fmt: skip
    assert calls


def test_what_cannot_travel() -> None:
    small, pairs = small_hooked(), pairs_of(small_hooked())
    lock = threading.Lock()

    def metric(logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        with lock:
            return logits[:, correct[0]] - logits[:, wrong[0]]

    with pytest.raises(fp.FeatpatchError, match="can't be sent to another process"):
        fp.rank_features(small.model, small.saes[1], pairs, metric=metric, executor=Interrupted(1), **ROWS)


def test_ctrl_c_returns_what_is_finished(tmp_path: Path) -> None:
    """The pairs that are done; with a journal the next call goes on."""
    small = small_hooked()
    tokens = [(small.clean[n, : 7 - n].tolist(), small.corrupted[n, : 7 - n].tolist()) for n in range(2)]
    pairs = fp.Pairs(tuple(fp.Pair(tuple(c), tuple(x), (3,), (4,)) for c, x in tokens))
    options: dict[str, Any] = {"journal": tmp_path / "journal", **ROWS}
    whole = fp.rank_features(small.model, small.saes[1], pairs, **ROWS)
    one = fp.rank_features(small.model, small.saes[1], fp.Pairs(pairs.pairs[:1]), **ROWS)
    with pytest.warns(FeatpatchWarning, match="over 1 of 2 pairs"):
        part = fp.rank_features(small.model, small.saes[1], pairs, executor=Interrupted(8), **options)
    assert not part.finished
    assert len(part.clean) == 1
    np.testing.assert_allclose(part.denoised, one.denoised)
    same(fp.rank_features(small.model, small.saes[1], pairs, executor=Interrupted(10**9), **options), whole)


def test_a_bar_counts_the_patches_that_workers_finish(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """From none to all of them, in both directions; a run that is complete in the journal has all from the start."""
    small, pairs = small_hooked(), pairs_of(small_hooked())
    plan = fp.plan(small.model, small.saes[1], pairs)
    options: dict[str, Any] = {"executor": Interrupted(), "batch_rows": 20, "journal": tmp_path / "journal"}
    for progress, shown in ((False, False), (True, True)):
        fp.rank_features(small.model, small.saes[1], pairs, **options, progress=progress)
        err = capsys.readouterr().err
        assert (f"{plan.patches}/{plan.patches} [" in err) == shown, err
        assert ("patching on workers: 100%" in err) == shown


@pytest.mark.usefixtures("cluster")
def test_another_cluster_than_the_one_that_is_there() -> None:
    small, pairs = small_hooked(), pairs_of(small_hooked())
    with pytest.raises(fp.FeatpatchError, match="already connected to Ray"):
        fp.rank_features(small.model, small.saes[1], pairs, executor=fp.Ray(address="auto"), **ROWS)


@pytest.mark.parametrize("error", [TypeError("x"), KeyError("x"), AssertionError("x"), ray.exceptions.RaySystemError("x")])
def test_a_ray_that_fails_to_start(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Whatever it raises."""

    def init(**options: Any) -> None:
        raise error

    small = small_hooked()
    ray.shutdown()
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(fp.FeatpatchError, match=f"Ray can't be started here .{type(error).__name__}: "):
        fp.rank_features(small.model, small.saes[1], pairs_of(small), executor="ray", **ROWS)


def test_bad_executors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a Ray that this process is connected to."""
    small, pairs = small_hooked(), pairs_of(small_hooked())
    ray.shutdown()
    for make, message in (
        (lambda: "spark", "executor='spark'"),
        (lambda: fp.Ray(workers=0), "workers=0"),
        (lambda: fp.Ray(gpus=-1.0), "gpus=-1.0"),
        (lambda: fp.Ray(cpus=float("inf")), "cpus=inf"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.rank_features(small.model, small.saes[1], pairs, executor=make(), **ROWS)
    for name in ("cloudpickle", "ray"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            with pytest.raises(fp.FeatpatchError, match=r"featpatch\[ray\]"):
                fp.rank_features(small.model, small.saes[1], pairs, executor="ray", **ROWS)


@pytest.mark.extended
def test_clusters_that_are_none_or_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    small, pairs = small_hooked(), pairs_of(small_hooked())
    ray.shutdown()
    for make, message in (
        (lambda: fp.Ray(workers=1, gpus=99.0), "room for"),
        (lambda: fp.Ray(address="127.0.0.1:1"), "no Ray cluster was found there"),
        (lambda: fp.Ray(address="ray://127.0.0.1:1"), "no Ray cluster was found there"),
    ):
        with pytest.raises(fp.FeatpatchError, match=message):
            fp.rank_features(small.model, small.saes[1], pairs, executor=make(), **ROWS)
    with monkeypatch.context() as patch:
        patch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # what "auto" means then; else it looks for anybody's cluster
        with pytest.raises(fp.FeatpatchError, match="no Ray cluster was found there"):
            fp.rank_features(small.model, small.saes[1], pairs, executor=fp.Ray(address="auto"), **ROWS)
    whole = fp.rank_features(small.model, small.saes[1], pairs, **ROWS)
    same(fp.rank_features(small.model, small.saes[1], pairs, executor=fp.Ray(workers=1, cpus=2.0), **ROWS), whole)
