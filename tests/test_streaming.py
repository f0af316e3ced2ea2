"""Blocks of pairs to partitioned Parquet and back: the same table as all pairs at once."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from small import Small
from test_sets import pairs_of

import featpatch as fp

OPTIONS: dict[str, Any] = {"metric": ["logit_diff", "prob"], "progress": False}


def many(small: Small, count: int) -> list[fp.Pair]:
    """Pairs with tags, of two lengths."""
    pairs = []
    for n in range(count):
        pair, length = pairs_of(small)[n % 3], 7 if n % 2 else 6
        clean, corrupted = list(pair.clean[:length]), list(pair.corrupted[:length])
        clean[1] = corrupted[1] = 10 + n
        pairs.append(fp.Pair(tuple(clean), tuple(corrupted), (3 + n % 5,), (9,), tags={"kind": str(n % 2)}))
    return pairs


def blocks(pairs: list[fp.Pair], size: int) -> list[fp.Pairs]:
    return [fp.Pairs(tuple(pairs[start : start + size])) for start in range(0, len(pairs), size)]


def same(one: fp.Effects, other: fp.Effects) -> None:
    """Up to the order of rows."""
    assert set(one.nodes) == set(other.nodes)
    order = [other.nodes.index(node) for node in one.nodes]
    other = other.take(order)
    np.testing.assert_allclose(one.clean, other.clean, atol=1e-9)
    for effect in one.directions_run():
        np.testing.assert_allclose(one.changes(effect).toarray(), other.changes(effect).toarray(), atol=1e-9)
        np.testing.assert_allclose(one.interval(effect), other.interval(effect), atol=1e-9)


def test_blocks_are_the_whole(small: Small, tmp_path: Path) -> None:
    """Effects, intervals, q-values, tags, other metrics; everything read back, or the first rows alone."""
    pairs = many(small, 7)
    whole = fp.rank_features(small.model, small.saes[:2], fp.Pairs(tuple(pairs)), **OPTIONS)
    stored = fp.stream_features(small.model, small.saes[:2], blocks(pairs, 3), tmp_path, **OPTIONS)
    assert stored.blocks == 3
    assert not list(tmp_path.glob("*.journal"))
    for metric in ("logit_diff", "prob"):
        found = fp.Stored(tmp_path, metric)
        same(whole.for_metric(metric), found.load())
        table = found.pooled().set_index("kind").loc["feature"]
        assert len(table) == whole.where(kind="feature").nodes.__len__()
        expected = dict(zip(whole.nodes, whole.for_metric(metric).pooled("degradation"), strict=True))
        own = dict(zip(whole.nodes, whole.for_metric(metric).pooled("degradation", over="changed"), strict=True))
        for row in found.pooled().to_dict("records"):
            index = None if pd.isna(row["index"]) else int(row["index"])
            node = fp.Node(row["site"], row["kind"], index, json.loads(row["position"]), row["sae"])
            assert row["degradation"] == pytest.approx(expected[node], abs=1e-9)
            assert row["degradation_where_changed"] == pytest.approx(own[node], abs=1e-9, nan_ok=True)
    few, top = stored.top(5), whole.top(5)
    assert few.nodes == top.nodes
    saved = fp.Effects.load(top.save(tmp_path / "top.safetensors"))
    np.testing.assert_allclose(few.to_pandas()["recovery_q"], saved.to_pandas()["recovery_q"], atol=1e-9)
    np.testing.assert_allclose(few.to_pandas()["recovery_low"], top.to_pandas()["recovery_low"], atol=1e-9)
    assert few.metadata["tags"] == [dict(pair.tags) for pair in pairs]
    assert few.by_tag("kind", "recovery").shape[0] == 5
    for by in ("recovery_where_changed", "degradation_where_changed"):
        few, top = stored.top(5, by=by), whole.top(5, by=by)
        assert few.nodes == top.nodes
        assert few.quadrants() == top.quadrants()
        np.testing.assert_allclose(few.carried("recovery"), top.carried("recovery"), atol=1e-9)
    assert "7 pairs in 3 blocks" in repr(stored)


def test_goes_on_where_it_was_cut_short(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C within a block: the finished ones are not run again, and its own finished batches neither."""
    pairs, options = many(small, 6), {**OPTIONS, "batch_rows": 20}
    stored = fp.stream_features(small.model, small.saes[1], blocks(pairs, 3), tmp_path / "whole", **options)
    calls: list[int] = []
    from featpatch.engine.sweep import Sweep

    original = Sweep.run

    def counted(self: Any, batch: Any) -> Any:
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(self, batch)

    monkeypatch.setattr("featpatch.engine.sweep.Sweep.run", counted)
    stop = 0
    fp.stream_features(small.model, small.saes[1], blocks(pairs, 3), tmp_path / "again", **options)
    every = len(calls)
    calls.clear()
    stop = every - 4
    with pytest.raises(KeyboardInterrupt):
        fp.stream_features(small.model, small.saes[1], blocks(pairs, 3), tmp_path / "cut", **options)
    assert fp.Stored(tmp_path / "cut").blocks == 1
    calls.clear()
    stop = 0
    resumed = fp.stream_features(small.model, small.saes[1], blocks(pairs, 3), tmp_path / "cut", **options)
    assert len(calls) == 5
    same(stored.load(), resumed.load())


def test_what_is_refused(small: Small, tmp_path: Path) -> None:
    pairs = many(small, 4)
    fp.stream_features(small.model, small.saes[1], blocks(pairs, 2), tmp_path / "a", **OPTIONS)
    for run, message in (
        (lambda: fp.stream_features(small.model, small.saes[1], blocks(pairs[::-1], 2), tmp_path / "a", **OPTIONS), "holds other pairs"),
        (lambda: fp.stream_features(small.model, small.saes[0], blocks(many(small, 6), 2), tmp_path / "a", **OPTIONS), "saes, sites differ"),
        (lambda: fp.stream_features(small.model, small.saes[0], blocks(pairs, 2), tmp_path / "a", **OPTIONS), "saes, sites differ"),
        (lambda: fp.stream_features(small.model, small.saes[1], blocks(pairs, 2), tmp_path / "a", progress=False), "metrics differ"),
        (lambda: fp.stream_features(small.model, small.saes[1], blocks(pairs[:2], 2), tmp_path / "a", **OPTIONS), "2 blocks, and 1 were given"),
        (lambda: fp.stream_features(small.model, small.saes[1], [], tmp_path / "b", **OPTIONS), "there are no blocks"),
        (lambda: fp.stream_features(small.model, small.saes[1], blocks(pairs, 2), tmp_path / "b", executor="spark", **OPTIONS), "executor='spark'"),
        (lambda: fp.Stored(tmp_path / "none"), "expected a folder written by fp.stream_features"),
        (lambda: fp.Stored(tmp_path / "a", "accuracy"), "was not measured"),
        (lambda: fp.Stored(tmp_path / "a").top(0), "n=0"),
        (lambda: fp.Stored(tmp_path / "a").top(3, by="median"), "by='median'"),
    ):  # fmt: skip
        with pytest.raises(fp.FeatpatchError, match=message):
            run()
    about = tmp_path / "a" / "about.json"
    text = about.read_text()
    for damaged in (
        "",
        "{}",
        "[]",
        text.replace('"directions"', '"x"'),
        text.replace('"logit_diff"', "5"),
        text[:50],
        "[" * 10_000,
    ):
        about.write_text(damaged)
        with pytest.raises(fp.FeatpatchError, match="can't be read"):
            fp.Stored(tmp_path / "a")
    about.write_text(text)
    path = tmp_path / "a" / "effects" / "000001.parquet"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(fp.FeatpatchError, match="delete its .sha256 file and run fp.stream_features again"):
        fp.Stored(tmp_path / "a").pooled()


def test_one_direction(small: Small, tmp_path: Path) -> None:
    pairs, options = many(small, 3), {"directions": ["noising"], "progress": False}
    stored = fp.stream_features(small.model, small.saes[1], blocks(pairs, 2), tmp_path, **options)
    whole = fp.rank_features(small.model, small.saes[1], fp.Pairs(tuple(pairs)), **options)
    assert "recovery" not in stored.pooled()
    assert stored.top(3).nodes == whole.top(3).nodes


def test_blocks_of_a_file(tmp_path: Path) -> None:
    """The pairs of the file, some at a time; the lines behind are not read yet."""
    demo = fp.load_demo()
    lines = [{"clean": f"Mary and {name} went", "corrupted": f"John and {name} went", "correct": " to", "wrong": " in"} for name in ("Tom", "Ann", "Bob")]  # fmt: skip
    text = "\n\n".join(json.dumps(line) for line in lines)
    (tmp_path / "pairs.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "broken.jsonl").write_text(f"{text}\n{{\n", encoding="utf-8")
    tokenizer = demo.model.tokenizer
    try:
        every = fp.Pairs.from_jsonl(tokenizer, tmp_path / "pairs.jsonl")
    except fp.FeatpatchError as error:
        pytest.skip(str(error))
    found = list(fp.Pairs.blocks_from_jsonl(tokenizer, tmp_path / "pairs.jsonl", size=2))
    assert [len(block) for block in found] == [2, 1]
    assert [pair for block in found for pair in block] == list(every)
    reading = fp.Pairs.blocks_from_jsonl(tokenizer, tmp_path / "broken.jsonl", size=3)
    assert next(reading).pairs == every.pairs
    with pytest.raises(fp.FeatpatchError, match="line 6"):
        next(reading)
    (tmp_path / "empty.jsonl").write_text("\n")
    for path, size, message in (("empty.jsonl", 2, "is empty"), ("none.jsonl", 2, "no file"), ("pairs.jsonl", 0, "size=0")):
        with pytest.raises(fp.FeatpatchError, match=message):
            next(fp.Pairs.blocks_from_jsonl(tokenizer, tmp_path / path, size=size))


def test_cut_short_between_two_files(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Effects without their pairs are no finished block; a journal that was left goes."""
    pairs = many(small, 4)
    from featpatch import files

    with monkeypatch.context() as patch:
        replace = files.os.replace

        def once(old: Any, new: Any) -> None:
            if Path(new).name == "000001.sha256":
                raise KeyboardInterrupt
            replace(old, new)

        patch.setattr(files.os, "replace", once)
        with pytest.raises(KeyboardInterrupt):
            fp.stream_features(small.model, small.saes[1], blocks(pairs, 2), tmp_path, **OPTIONS)
    assert (tmp_path / "effects" / "000001.parquet").is_file()
    assert fp.Stored(tmp_path).blocks == 1
    (tmp_path / "000000.journal").touch()
    stored = fp.stream_features(small.model, small.saes[1], blocks(pairs, 2), tmp_path, **OPTIONS)
    assert not list(tmp_path.glob("*.journal"))
    same(fp.rank_features(small.model, small.saes[1], fp.Pairs(tuple(pairs)), **OPTIONS), stored.load())
