"""Ray: workers on this machine, or on those of a cluster."""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from math import ceil
from typing import Any

import torch

from featpatch.errors import FeatpatchError, check_numbers
from featpatch.execution.executor import Batch, Book, Executor, Shards

DEATHS = 3
"""So many workers may die with the same task."""

PATIENCE = 300
"""Seconds within which workers must be there."""


@dataclass(frozen=True)
class Ray(Executor):
    """A Ray that is started here, or a cluster that is joined.

    A worker that dies is replaced, and what it was doing is run again; a cluster that loses a node goes on with what is left.
    Only what is finished reaches the book, so the rest of it outlives everything but the disk of this machine.

    Args:
        workers: how many processes; by default as many as there are processors (or GPUs, where `gpus` are asked for).
        address: of a running cluster, such as `"auto"` or `"ray://head:10001"`; by default the one that this process is
            connected to, or else one that is started here and ends with the sweep.
        cpus, gpus: of each worker.
    """

    workers: int | None = None
    address: str | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        check_numbers(1, workers=1 if self.workers is None else self.workers)
        if self.address is not None and not isinstance(self.address, str):
            raise FeatpatchError(f"address={self.address!r}: expected that of a cluster, such as 'auto', or None")
        for name in ("cpus", "gpus"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
                raise FeatpatchError(f"{name}={value!r}: expected a number of them for each worker, 0 or more")

    def run(self, make: Callable[[], Shards], shards: int, book: Book, done: Callable[[int], object]) -> None:
        """As for every executor."""
        with self._connected() as ray:
            resources = ray.cluster_resources()
            fits = [int(resources.get(kind, 0) // each) for kind, each in (("CPU", self.cpus), ("GPU", self.gpus)) if each]
            most = min(fits, default=1)
            if most < 1 or (self.workers or 0) > most:
                raise FeatpatchError(
                    f"workers={self.workers} of {self.cpus} processors and {self.gpus} GPUs: the cluster has room for {most}; "
                    "expected fewer or smaller ones"
                )
            actor = ray.remote(num_cpus=self.cpus, num_gpus=self.gpus, max_restarts=0)(_Worker)
            made = ray.put(make)
            _Driver(ray, lambda: actor.remote(made), book, done, deque(range(shards))).run(self.workers or most)

    @contextmanager
    def _connected(self) -> Iterator[Any]:
        """The library, connected; what was started for this is ended."""
        try:
            import ray
        except ImportError as error:
            raise FeatpatchError("executor='ray' without Ray: expected it installed; pip install 'featpatch[ray]'") from error
        if ray.is_initialized():
            if self.address is not None:
                raise FeatpatchError(
                    f"address={self.address!r} where this process is connected to a Ray already: expected None, which takes "
                    "that one, or ray.shutdown() before"
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
            where = "Ray can't be started here" if self.address is None else f"address={self.address!r}: no Ray there"
            raise FeatpatchError(
                f"{where} ({type(error).__name__}: {error}): expected one that runs; see whether `ray start --head` does, or "
                "leave out executor='ray'"
            ) from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextmanager
def _silent(services: Any) -> Iterator[None]:
    """What is started within sends nothing to Ray's makers and does not ask which cloud it is in.

    Ray asks in the process of its dashboard, which starts even without a dashboard and with statistics off, for the module of
    these statistics alone. Ray goes on where that process can't be started, which `(None, None)` says.
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
    """Raises OSError where nobody listens, which Ray finds out after minutes; "auto" is what RAY_ADDRESS says, if anything."""
    meant = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address or ""
    host, _, port = meant.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


class _Worker:
    """Shards in a process of their own."""

    def __init__(self, make: Callable[[], Shards]) -> None:
        self.shards = make()

    def batches(self, shard: int) -> list[tuple[str, int]]:
        return [(batch.key, batch.patches) for batch in self.shards.batches(shard)]

    def ready(self) -> None:
        """Answers when the process is there."""

    def run(self, shard: int, key: str) -> Any:
        values = self.shards.run(shard, key)
        return None if values is None else values.numpy()


@dataclass(frozen=True)
class _Task:
    """A shard to be opened, or one of its batches."""

    shard: int
    batch: Batch | None = None


@dataclass
class _Driver:
    """Hands out tasks: a worker goes on with its shard, then opens another one, then helps where most is left.

    Attributes:
        hire: starts a worker.
        unopened: shards whose batches aren't known yet.
        left: by open shard, the tasks that nobody has yet.
        at: the shard that each worker is at.
        running: by reference, the worker and its task.
        hired, coming: all workers; by reference, those that aren't there yet.
        again: tasks of workers that died.
        deaths: how often a task was lost.
    """

    ray: Any
    hire: Callable[[], Any]
    book: Book
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
        """Until nothing is left; workers are ended in any case. Those that find no room are not waited for."""
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
        """References that are there; looks once a second, so that Ctrl-C is heard."""
        start = time.monotonic()
        while True:
            ready, _ = self.ray.wait([*self.running, *self.coming], timeout=1)
            if ready:
                return list(ready)
            if not self.running and time.monotonic() - start > PATIENCE:
                raise FeatpatchError(
                    f"no worker was there after {PATIENCE} seconds: expected processors that nobody else holds; wait for "
                    "them, or ask for less by fp.Ray(workers=..., cpus=...)"
                )

    def _arrived(self, reference: Any) -> Any:
        """A worker that can be given something; None where it died, and another one is hired."""
        worker = self.coming.pop(reference)
        try:
            self.ray.get(reference)
        except self.ray.exceptions.RayError as error:
            self._lost(_Task(-1), error)
            return None
        return worker

    def _lost(self, task: _Task, error: Exception) -> None:
        """Another worker in the place of one that died."""
        if getattr(error, "actor_init_failed", False):
            raise FeatpatchError(
                f"a worker can't be set up ({error}): expected the same packages there as here, also those that metrics are "
                "defined in"
            ) from error
        self.deaths[task] = self.deaths.get(task, 0) + 1
        if self.deaths[task] == DEATHS:
            raise FeatpatchError(
                f"{DEATHS} workers died one after another at the same batch ({error}): expected room for it; what is finished "
                "is in the journal, if there is one; use fewer workers or a smaller batch_rows"
            ) from error
        self._hire()

    def _start(self, worker: Any) -> bool:
        """Whether there was something to do for a worker."""
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
        """Notes what came of a task; the worker, or None where it died."""
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
        """Notes the batches of a shard; those that the book has are done."""
        tasks = deque[_Task]()
        for batch in batches:
            if self.book.get(batch.key) is None:
                tasks.append(_Task(shard, batch))
            else:
                self.done(batch.patches)
        self.left[shard] = tasks
