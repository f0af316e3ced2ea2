"""Circuit searches that are interrupted or killed resume from their journal without repeating finished batches."""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from small import Small, small_hooked
from test_sets import pairs_of
from transformer_lens import HookedTransformer, HookedTransformerConfig

import featpatch as fp
from featpatch.circuits.edge_graph import EdgeGraph
from featpatch.circuits.node_graph import NodeGraph

KILLS = 20
HEADS = [fp.Node(f"blocks.{layer}.attn.hook_z", "head", n) for layer in range(3) for n in range(4)]
SEARCHES: dict[str, dict[str, Any]] = {
    "exact": {"nodes": HEADS, "size": 4},
    "greedy": {"nodes": HEADS, "method": "greedy", "size": 5},
    "acdc": {"nodes": HEADS, "method": "acdc", "threshold": 0.05},
    "edges": {"over": "edges", "scores": "exact", "size": 10},
    "edges to means": {"over": "edges", "to": "mean_by_position", "size": 10},
    "greedy edges": {"over": "edges", "scores": "estimate", "method": "greedy", "target": 0.9},
    "acdc edges": {"over": "edges", "method": "acdc", "threshold": 0.05},
}


@cache
def tiny() -> Small:
    """A model of one layer with two heads, whose exact edge scores take five batches."""
    config = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=16, d_head=4, n_heads=2, d_mlp=8, d_vocab=40, act_fn="gelu", dtype=torch.float64, seed=1,
        init_weights=True, initializer_range=0.3,
    )  # fmt: skip
    return Small(HookedTransformer(config).eval(), [])


def find(small: Small, name: str, **options: Any) -> fp.Circuit:
    return fp.find_circuit(small.model, pairs_of(small), progress=False, **SEARCHES[name], **options)


def same(one: fp.Circuit, other: fp.Circuit) -> bool:
    return (
        one.items == other.items and one.scores.tobytes() == other.scores.tobytes() and one.faithfulness == other.faithfulness
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """A list of functions that are called before each batch; batches are small."""
    before: list[Callable[[], None]] = []
    monkeypatch.setattr("featpatch.circuits.graph.TOKENS_AT_ONCE", 100)

    def watched(graph: Any, name: str) -> None:
        true = getattr(graph, name)

        def measured(self: Any, *arguments: Any) -> Any:
            for call in before:
                call()
            return true(self, *arguments)

        monkeypatch.setattr(graph, name, measured)

    watched(NodeGraph, "measured")
    watched(EdgeGraph, "measured")
    watched(EdgeGraph, "_alone_by_paths")
    return before


def counted(before: list[Callable[[], None]], search: Callable[[], Any], stop: int | None = None) -> tuple[Any, int]:
    """Run a search, with Ctrl-C before batch number `stop`; return its result, or None, and the number of batches."""
    calls = [0]

    def count() -> None:
        if calls[0] == stop:
            raise KeyboardInterrupt
        calls[0] += 1

    before[:] = [count]
    try:
        return search(), calls[0]
    except KeyboardInterrupt:
        return None, calls[0]
    finally:
        before.clear()


FASTEST = ("exact", "greedy", "acdc", "edges")


@pytest.mark.parametrize(
    "name", [name if name in FASTEST else pytest.param(name, marks=pytest.mark.extended) for name in SEARCHES]
)
def test_an_interrupted_search_resumes(name: str, passes: list[Any], tmp_path: Path) -> None:
    """The circuit is bit-identical, and both runs together have as many batches as the uninterrupted search."""
    small = tiny() if "edges" in name else small_hooked()
    whole, count = counted(passes, lambda: find(small, name, journal=tmp_path / "whole"))
    assert same(whole, find(small, name))
    setup = counted(passes, lambda: find(small, name, journal=tmp_path / "whole"))[1]  # before the journal is open
    assert count > setup + 2
    stop = (setup + count) // 2
    part, first = counted(passes, lambda: find(small, name, journal=tmp_path / "part"), stop)
    resumed, second = counted(passes, lambda: find(small, name, journal=tmp_path / "part"))
    assert same(resumed, whole)
    assert first - setup + second - setup == count - setup
    if SEARCHES[name].get("method") is None:
        assert part is None  # a part of the scores gives no ranking
    else:
        assert not part.finished
        assert resumed.finished
        assert "interrupted" in repr(part)
        if "acdc" in name:
            assert set(whole.items) < set(part.items)
        else:
            assert whole.items[: len(part)] == part.items
            assert 0 < len(part) < len(whole)


def test_what_ctrl_c_says(passes: list[Any], tmp_path: Path) -> None:
    """If nothing can be returned, the message says what is not finished and how to resume."""
    small = small_hooked()
    for name, said in (
        ("exact", "the exact scores are not finished"),
        ("acdc", "the first step of the search is not finished"),
    ):
        for journal, more in ((None, "pass journal='work.journal'"), (tmp_path / name, "resumes from there")):
            calls = [0]

            def stop(calls: list[int] = calls) -> None:
                calls[0] += 1
                if calls[0] > 1:  # the first is the gap
                    raise KeyboardInterrupt

            passes[:] = [stop]
            with pytest.raises(KeyboardInterrupt, match=f"{said}; .*{more}"):
                find(small, name, journal=journal)


def test_searches_of_one_graph_share_a_journal(passes: list[Any], tmp_path: Path) -> None:
    """A longer greedy search continues a shorter one; a torn last line costs only its own batch."""
    small, path = small_hooked(), tmp_path / "journal"
    options: dict[str, Any] = {"nodes": HEADS, "method": "greedy", "progress": False, "journal": path}
    run = lambda size: fp.find_circuit(small.model, pairs_of(small), size=size, **options)  # noqa: E731
    _, short = counted(passes, lambda: run(3))
    _, setup = counted(passes, lambda: run(3))
    longer, more = counted(passes, lambda: run(5))
    path.write_bytes(path.read_bytes()[:-7])
    again, one = counted(passes, lambda: run(5))
    assert again.items == longer.items
    assert one == setup + 1
    path.unlink()
    _, count = counted(passes, lambda: run(5))
    assert more - setup == count - short


def test_journals_of_other_graphs_are_refused(tmp_path: Path) -> None:
    small, path = small_hooked(), tmp_path / "journal"
    find(small, "exact", journal=path)
    content = path.read_bytes()
    sae, site = small.at("blocks.1.hook_resid_pre"), "blocks.1.hook_resid_pre"
    error = {"saes": sae, "nodes": [fp.Node(site, "error", sae=site)], "errors": "nodes", "size": 1}
    for changed, said in (
        ({"to": "mean"}, "reference, to"), ({"metric": "log_prob"}, "metric"), ({"nodes": HEADS[:5]}, "nodes"),
        ({"over": "edges", "nodes": None, "scores": "estimate"}, "errors, nodes, over, positions"), (error, "errors, nodes, saes"),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=f"belongs to another sweep: {said} differ"):
            fp.find_circuit(
                small.model, pairs_of(small), journal=path, progress=False, **{"nodes": HEADS, "size": 4, **changed}
            )
    edges: dict[str, Any] = {"scores": "estimate", "method": "greedy", "size": 2, "progress": False}
    placed = fp.Pairs(tuple(replace(pair, labels={"name": 3}) for pair in pairs_of(small)))
    for kept, changed, said in (
        ({}, {"positions": ["name"]}, "positions"), ({"to": "resample", "seed": 1}, {"seed": 2}, "seed"),
        ({"to": "mean"}, {"reference": pairs_of(small, slice(2))}, "reference"),
    ):  # fmt: skip
        other = tmp_path / said
        fp.find_circuit(small.model, placed, journal=other, **edges, **kept)
        with pytest.raises(fp.FeatpatchError, match=f"belongs to another sweep: {said} differ"):
            fp.find_circuit(small.model, placed, journal=other, **edges, **{**kept, **changed})
    with pytest.raises(fp.FeatpatchError, match="pairs differ"):
        fp.find_circuit(small.model, pairs_of(small, slice(2)), journal=path, progress=False, **SEARCHES["exact"])
    with pytest.raises(fp.FeatpatchError, match="is a folder"):
        find(small, "exact", journal=tmp_path)
    assert path.read_bytes() == content


def killed(name: str, path: Path, small: Small, delay: float | None, batches: int, before: list[Callable[[], None]]) -> None:
    """Run a search in a child process that is killed after `delay` seconds or, without a delay, before one of its batches."""
    child = os.fork()
    if child == 0:
        calls = [0]

        def count() -> None:
            calls[0] += 1
            if delay is None and calls[0] > batches:
                os.kill(os.getpid(), signal.SIGKILL)

        before[:] = [count]
        find(small, name, journal=path)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.parametrize("name", ["greedy", "edges"])
def test_a_killed_search_resumes(name: str, passes: list[Any], tmp_path: Path) -> None:
    torch.set_num_threads(1)
    small = tiny() if "edges" in name else small_hooked()
    whole, count = counted(passes, lambda: find(small, name, journal=tmp_path / "whole"))
    setup = counted(passes, lambda: find(small, name, journal=tmp_path / "whole"))[1]
    killed(name, tmp_path / "killed", small, None, count - 3, passes)
    found, rest = counted(passes, lambda: find(small, name, journal=tmp_path / "killed"))
    assert same(found, whole)
    assert rest <= setup + 3


@pytest.mark.extended
@pytest.mark.parametrize(("name", "kills"), [("edges", KILLS), ("edges to means", 8)])
def test_killed_at_random_points_it_loses_nothing(name: str, kills: int, passes: list[Any], tmp_path: Path) -> None:
    """An exact search over edges that is killed repeatedly never loses a batch and ends with bit-identical scores.

    Edges that are ablated to corrupted values run as paths from their receivers on, others in passes through all layers.
    """
    torch.set_num_threads(1)
    small, path, r = small_hooked(), tmp_path / "killed", random.Random(0)
    start = time.monotonic()
    whole, count = counted(passes, lambda: find(small, name, journal=tmp_path / "whole"))
    duration, lines = time.monotonic() - start, [0]
    complete = (tmp_path / "whole").read_bytes().count(b"\n")
    for _ in range(kills):
        killed(name, path, small, r.uniform(0.05, 0.5) * duration, 0, passes)
        lines.append(path.read_bytes().count(b"\n") if path.exists() else 0)
    assert lines == sorted(lines)
    assert len({n for n in lines if 0 < n < complete}) > 1, "the kills came before or after the search"
    found, rest = counted(passes, lambda: find(small, name, journal=path))
    assert same(found, whole)
    assert rest <= count - max(0, lines[-1] - 1)
