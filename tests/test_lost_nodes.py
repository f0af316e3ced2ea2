"""A Ray cluster that loses a node, with all of its workers, in the middle of a sweep: the rest runs what is left."""

import os
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from small import small_hooked
from test_execution import ROWS, Noting, same
from test_sets import pairs_of

import featpatch as fp
from featpatch.engine.ray import _Driver

ray = pytest.importorskip("ray")


BEFORE = 6
"""The number of batches after which the node is lost."""


class Noted:
    """The logit difference; notes in a file the node of each batch that a worker measures.

    Workers elsewhere wait until those of the node that will be lost have measured some batches, and these then wait for the loss,
    all for at most a minute.
    """

    __name__ = "noted"

    def __init__(self, path: Path, lost: str) -> None:
        self.path, self.lost, self.here, self.start = path, lost, os.getpid(), time.monotonic()

    def __call__(self, logits: torch.Tensor, correct: Any, wrong: Any) -> torch.Tensor:
        if os.getpid() != self.here and len(logits) > 1:  # all workers wait for the one that measures the baselines
            node = ray.get_runtime_context().get_node_id()
            while (self.by_node[self.lost] >= BEFORE) == (node == self.lost) and time.monotonic() - self.start < 60:
                time.sleep(0.01)
            with self.path.open("a") as file:
                file.write(f"{node}\n")
        return logits[:, list(correct)].mean(1) - logits[:, list(wrong)].mean(1)

    @property
    def by_node(self) -> Counter[str]:
        return Counter(self.path.read_text().split() if self.path.exists() else [])


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of two nodes on this machine: one with one processor, to which this process is connected, and one with two."""
    from ray.cluster_utils import Cluster

    ray.shutdown()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.other = found.add_node(num_cpus=2)
    ray.init(address=found.address, log_to_driver=False, namespace="featpatch")
    try:
        yield found
    finally:
        ray.shutdown()
        found.shutdown()


@pytest.mark.extended
def test_a_node_is_lost(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its batches that are finished stay, those that it was at run elsewhere, and each is written down once."""
    small, pairs = small_hooked(), pairs_of(small_hooked())
    lost = cluster.other.node_id
    metric = Noted(tmp_path / "nodes", lost)

    replaced: list[Exception] = []
    replace = _Driver._lost

    def noted(driver: _Driver, task: Any, error: Exception) -> None:
        replaced.append(error)
        replace(driver, task, error)

    monkeypatch.setattr(_Driver, "_lost", noted)

    def remove() -> None:
        while metric.by_node[lost] < BEFORE:
            time.sleep(0.01)
        cluster.remove_node(cluster.other, allow_graceful=False)

    remover = threading.Thread(target=remove, daemon=True)
    remover.start()
    options: dict[str, Any] = {"metric": metric, "journal": tmp_path / "journal", **ROWS}
    noting = Noting(fp.Ray())
    there = fp.rank_features(small.model, small.saes[1], pairs, executor=noting, **options)
    remover.join(timeout=60)
    assert not remover.is_alive()
    assert len(replaced) >= 1, "the sweep was over before the node was lost"
    assert set(metric.by_node) > {lost}
    same(there, fp.rank_features(small.model, small.saes[1], pairs, metric=metric, **ROWS))
    assert len(noting.keys) == len(set(noting.keys)) > BEFORE
    assert (tmp_path / "journal").read_bytes().count(b"\n") == 1 + len(noting.keys)
