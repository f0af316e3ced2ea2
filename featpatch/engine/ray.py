"""Run the forward passes of a sweep in this process or on the workers of a distributed engine, without knowing the model.

On one machine, `executor="ray"` is enough: it starts a Ray with as many workers as there are processors, which ends with the
sweep. It pays off if a sweep takes minutes, because a worker takes about five seconds to start. Processors that torch's threads
already use are not gained twice; each worker has one thread per processor that it is given (`fp.Ray(cpus=...)`).

A Ray that featpatch starts sends no usage statistics to Ray's makers, whatever its own settings are. For a cluster, or a Ray
that this process is already connected to, whoever started it decides: `ray disable-usage-stats` turns them off.

On several machines, with the same Python, featpatch, torch and sae-lens on each:

    ray start --head --port=6379                           on the first, or in the first job of a cluster
    ray start --address=first:6379                         on each of the others
    featpatch rank ... --executor ray --address auto       on any of them; from outside --address ray://first:10001
    ray stop                                               on each, at the end

In Python `fp.rank_features(..., executor=fp.Ray(address="auto", workers=16, gpus=1), journal="sweep.journal")`;
`rank_components`, `rank_paths`, `ablate` and `stream_features` take the same argument. A model on a GPU goes to the GPU that
Ray gives the worker.

What to expect:

- The pairs are run, and the SAEs encode, on every worker that takes part in a shard (pairs that run together, part by part);
  the batches of patches, which are nearly all of the time, are each run once, by whoever is free.
- Model, SAEs and metric travel to each worker once, packed by cloudpickle between processes of the same run; nothing of this is
  written to a file. A metric of your own must be importable there, or be defined in the script or notebook itself.
- Results come back batch by batch, into the journal of the process that called. The table is made there, from the same batches
  as in a serial run, so it has the same rows; values are those of a serial run up to the rounding of another number of threads
  (<!-- claim: python benchmarks/workers.py -->below 1e-5 of a logit in float32 on the shipped model<!-- /claim -->, 1e-12
  in the tests' float64).
- A worker that dies (killed, out of memory, its node lost) is replaced and its batch run again, up to three times for the same
  batch. The process that called may die too: with a journal the same call goes on from there, on workers or without.
- Ctrl-C ends the workers and returns what is finished, as in a serial run.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from math import ceil, inf
from typing import Any

import torch

from featpatch.engine.executor import Batch, Executor, Finished, Shards
from featpatch.errors import FeatpatchError, check_numbers, is_number

DEATHS = 3
"""Number of workers that may die at the same task before the sweep gives up."""

PATIENCE = 300
"""Maximum number of seconds to wait for the first worker."""


@dataclass(frozen=True)
class Ray(Executor):
    """An executor that runs sweeps on a local Ray instance that is started for them, or on a running cluster.

    A worker that dies is replaced and its task is run again; a cluster that loses a node continues with the remaining ones.
    Finished batches are kept on this machine, so they survive the loss of any worker or node.

    Args:
        workers: the number of processes; by default as many as the processors and GPUs allow.
        address: the address of a running cluster, such as `"auto"` or `"ray://head:10001"`; by default the Ray instance that
            this process is connected to, or else a local one that is started here and ends with the sweep.
        cpus, gpus: the number of processors and GPUs that each worker takes.

    Examples:
        >>> executor = fp.Ray(workers=4)  # for executor= of rank_features, rank_components, rank_paths and others
        >>> executor.workers
        4
    """

    workers: int | None = None
    address: str | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        check_numbers(1, workers=1 if self.workers is None else self.workers)
        if self.address is not None and not isinstance(self.address, str):
            raise FeatpatchError(f"address={self.address!r}: expected the address of a cluster, such as 'auto', or None")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if not is_number(value) or not 0 <= value < inf:
                raise FeatpatchError(f"{name}={value!r}: expected a number for each worker, 0 or more")

    def run(self, make: Callable[[], Shards], shards: int, book: Finished, done: Callable[[int], object]) -> None:
        """Run every batch that the book lacks, see `Executor.run`."""
        with self._connected() as ray:
            resources = ray.cluster_resources()
            fits = [int(resources.get(kind, 0) // each) for kind, each in (("CPU", self.cpus), ("GPU", self.gpus)) if each]
            most = min(fits, default=1)
            if most < 1 or (self.workers or 0) > most:
                raise FeatpatchError(
                    f"workers={self.workers} of {self.cpus} processors and {self.gpus} GPUs: the cluster has room for {most}: "
                    "expected no more than that; ask for fewer or smaller workers"
                )
            actor = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0)(_Worker)
            made = ray.put(make)
            _Driver(ray, lambda: actor.remote(made), book, done, deque(range(shards))).run(self.workers or most)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """Connect to Ray and yield its module; an instance that was started here is shut down on exit.

        Raises:
            FeatpatchError: Ray is not installed, can't be started or reached, or is connected already although an address is
                given.
        """
        try:
            import ray
        except ImportError as error:
            raise FeatpatchError(
                "executor='ray', but Ray is not installed: expected the package ray; pip install 'featpatch[ray]'"
            ) from error
        if ray.is_initialized():
            if self.address is not None:
                raise FeatpatchError(
                    f"address={self.address!r} but this process is already connected to Ray: expected address=None, which "
                    "uses that connection; or call ray.shutdown() first"
                )
            yield ray
            return
        room = None if self.workers is None else ceil(self.workers * self.cpus)
        own = {"address": "local", "include_dashboard": False, "num_cpus": room}
        options = {"address": self.address} if self.address else own
        try:
            _check_reachable(self.address)
            with nullcontext() if self.address else _silent(ray._private.services):
                ray.init(**options, logging_level=logging.ERROR, log_to_driver=False, namespace="featpatch")
        except Exception as error:
            where = (
                "Ray can't be started here"
                if self.address is None
                else f"address={self.address!r}: no Ray cluster was found there"
            )
            raise FeatpatchError(
                f"{where} ({type(error).__name__}: {error}): expected a running Ray; check that `ray start --head` works, or "
                "leave out executor='ray'"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _silent(services: Any) -> Iterator[None]:
    """Keep a Ray instance that is started in this context from sending usage statistics and from asking which cloud it is in.

    Ray asks from the process of its dashboard, which it starts even without a dashboard and with statistics switched off.
    `(None, None)` tells Ray that this process could not be started, and it continues without it.
    """
    start, before = getattr(services, "start_api_server", None), os.environ.get("RAY_USAGE_STATS_ENABLED")
    services.start_api_server = lambda *_, **__: (None, None)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        yield
    finally:
        services.start_api_server = start
        if before is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        else:
            os.environ["RAY_USAGE_STATS_ENABLED"] = before


def _check_reachable(address: str | None) -> None:
    """Check that something listens at an address, because Ray takes minutes to find out that nothing does.

    `"auto"` stands for the environment variable RAY_ADDRESS, if it is set.

    Raises:
        OSError: nothing listens there.
    """
    meant = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address or ""
    host, _, port = meant.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


class _Worker:
    """The shards of a sweep in a separate process."""

    def __init__(self, make: Callable[[], Shards]) -> None:
        self.shards = make()

    def batches(self, shard: int) -> list[tuple[str, int]]:
        return [(batch.key, batch.patches) for batch in self.shards.batches(shard)]

    def ready(self) -> None:
        """Return once the process has started."""

    def run(self, shard: int, key: str) -> Any:
        values = self.shards.run(shard, key)
        return None if values is None else values.numpy()


@dataclass(frozen=True)
class _Task:
    """A batch of a shard to run, or, without a batch, a shard whose batches are to be listed."""

    shard: int
    batch: Batch | None = None


@dataclass
class _Driver:
    """The distribution of tasks to workers.

    A worker finishes its shard, then opens another one, then helps with the shard that has the most tasks left.

    Attributes:
        ray: the ray module.
        hire: a function that starts a worker.
        book: the store of finished batches.
        done: a function that is called with the number of patches of each finished batch.
        unopened: the shards whose batches are not known yet.
        left: the tasks of each open shard that no worker has yet.
        at: the shard that each worker is working on.
        running: the worker and its task, by Ray's reference to the result.
        hired: all workers.
        coming: the workers that have not started yet, by Ray's reference.
        again: the tasks of workers that died, to be run again.
        deaths: the number of workers that died at each task.
    """

    ray: Any
    hire: Callable[[], Any]
    book: Finished
    done: Callable[[int], object]
    unopened: deque[int]
    left: dict[int, deque[_Task]] = field(default_factory=dict)
    at: dict[Any, int] = field(default_factory=dict)
    running: dict[Any, tuple[Any, _Task]] = field(default_factory=dict)
    hired: list[Any] = field(default_factory=list)
    coming: dict[Any, Any] = field(default_factory=dict)
    again: deque[_Task] = field(default_factory=deque)
    deaths: dict[_Task, int] = field(default_factory=dict)

    def run(self, workers: int) -> None:
        """Run until no task is left, without waiting for workers that find no free resources, and then end all workers."""
        idle: list[Any] = []
        try:
            for _ in range(workers):
                self._hire()
            while True:
                idle = [worker for worker in idle if not self._start(worker)]
                if idle and not self.running:
                    return
                for reference in self._some():
                    worker = self._finish(reference) if reference in self.running else self._arrived(reference)
                    idle += [] if worker is None else [worker]
        finally:
            for worker in self.hired:
                with suppress(Exception):
                    self.ray.kill(worker)

    def _hire(self) -> None:
        worker = self.hire()
        self.hired.append(worker)
        self.coming[worker.ready.remote()] = worker

    def _some(self) -> list[Any]:
        """Wait for references that are ready, checking once a second so that Ctrl-C is noticed."""
        start = time.monotonic()
        while True:
            ready, _ = self.ray.wait([*self.running, *self.coming], timeout=1)
            if ready:
                return list(ready)
            if not self.running and time.monotonic() - start > PATIENCE:
                raise FeatpatchError(
                    f"no worker has started after {PATIENCE} seconds: expected free processors; wait until some are free, or "
                    "ask for fewer with fp.Ray(workers=..., cpus=...)"
                )

    def _arrived(self, reference: Any) -> Any:
        """Return a worker that has started; None if it died, in which case another one is started."""
        worker = self.coming.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self._lost(_Task(-1), error)
            return None
        return worker

    def _lost(self, task: _Task, error: Exception) -> None:
        """Replace a worker that died.

        Raises:
            FeatpatchError: workers can't be set up, or too many died at this task.
        """
        if getattr(error, "actor_init_failed", False):
            raise FeatpatchError(
                f"a worker can't be set up ({error}): expected the same packages on the worker as here, including those that "
                "define metrics; install them there"
            ) from error
        self.deaths[task] = self.deaths.get(task, 0) + 1
        if self.deaths[task] == DEATHS:
            raise FeatpatchError(
                f"{DEATHS} workers died one after another at the same batch ({error}): expected enough memory for it; "
                "finished batches are in the journal, if there is one; use fewer workers or a smaller batch_rows"
            ) from error
        self._hire()

    def _start(self, worker: Any) -> bool:
        """Give a worker its next task; return False if there is none."""
        task = self._next(worker)
        if task is None:
            return False
        self.at[worker] = task.shard
        reference = worker.batches.remote(task.shard) if task.batch is None else worker.run.remote(task.shard, task.batch.key)
        self.running[reference] = worker, task
        return True

    def _next(self, worker: Any) -> _Task | None:
        if self.again:
            return self.again.popleft()
        shard = self.at.get(worker, -1)
        if not self.left.get(shard):
            if self.unopened:
                return _Task(self.unopened.popleft())
            shard = max(self.left, key=lambda each: len(self.left[each]), default=-1)
        return self.left[shard].popleft() if self.left.get(shard) else None

    def _finish(self, reference: Any) -> Any:
        """Record the result of a task and return its worker, or None if it died."""
        worker, task = self.running.pop(reference)
        try:
            found = self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except self.ray.exceptions.RayError as error:
            self._lost(task, error)
            self.at.pop(worker, None)
            self.again.append(task)
            return None
        if task.batch is not None:
            if found is not None:
                self.book.put(task.batch.key, torch.from_numpy(found.copy()))
                self.done(task.batch.patches)
        else:
            self._open(task.shard, [Batch(*each) for each in found])
        return worker

    def _open(self, shard: int, batches: Sequence[Batch]) -> None:
        """Queue the batches of a shard that the book lacks, and count the others as done."""
        tasks = deque[_Task]()
        for batch in batches:
            if self.book.get(batch.key) is None:
                tasks.append(_Task(shard, batch))
            else:
                self.done(batch.patches)
        self.left[shard] = tasks


EXECUTORS: dict[str, Callable[..., Executor]] = {"ray": Ray}
"""Executors that the `executor` argument may name."""


def executor_of(executor: Any) -> Executor | None:
    """Return the executor that is given or named in `EXECUTORS`; None, to run in this process, for None or `"serial"`.

    Raises:
        FeatpatchError: `executor` is anything else.
    """
    if executor is None or (isinstance(executor, str) and executor == "serial"):
        return None
    made = EXECUTORS[executor]() if isinstance(executor, str) and executor in EXECUTORS else executor
    if not isinstance(made, Executor):
        known = ", ".join(map(repr, ("serial", *EXECUTORS)))
        raise FeatpatchError(f"executor={executor!r}: expected {known}, or an object such as fp.Ray(...)")
    return made
