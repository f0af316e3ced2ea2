"""Files that are damaged or hostile: each gives a clean error or a right result; pages run no script; no pickle anywhere.

FEATPATCH_EXAMPLES=10000 makes as many in all; 600 by default, always the same ones.
"""

import ast
import base64
import csv
import hashlib
import io
import json
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pytest
import torch
from damage import MARKS, NUMBER, SCALARS, TEXTS, VALUES, Deep, as_json, clean, damaged, swapped
from drawn import share
from hypothesis import given
from hypothesis import strategies as st
from small import Small
from test_loading import PAIRS, save_model, save_sae
from typer.testing import CliRunner

import featpatch as fp
from featpatch import Node
from featpatch.checkpoints import Demo
from featpatch.cli.app import app
from featpatch.diagram.draw import dot
from featpatch.diagram.viewers import interactive, viewer_json
from featpatch.engine.journal import Journal
from featpatch.page.page import write
from featpatch.pairs.tokens import PairsWarning
from featpatch.reporting import sections
from featpatch.reporting.sections import FeatureCard, Material, PairText


def words(text: str) -> list[int]:
    """A tokenizer: a number for each word."""
    return [int.from_bytes(hashlib.sha256(word.encode()).digest()[:2], "big") for word in text.split()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile")


@pytest.fixture(scope="module")
def shipped() -> Demo:
    return fp.load_demo()


# Pairs.

PAIR = {"clean": "When John and Mary left , Mary gave a book to", "corrupted": "When John and Mary left , John gave a book to",
        "correct": "John", "wrong": ["Mary", "Tom"], "labels": {"S2": 7}, "spans": {"IO": [5, 9]}, "tags": {"template": "3"}}  # fmt: skip
FOREIGN = {"clean_prefix": PAIR["clean"], "patch_prefix": PAIR["corrupted"], "clean_answer": "John", "patch_answer": "Mary",
           "case": "x", "name_pos": 3, "position": [3, 4]}  # fmt: skip
CIRCUIT = {"prompts": [{"clean": PAIR["clean"], "corrupt": PAIR["corrupted"], "answers": ["John"], "wrong_answers": ["Mary"]},
                       {"clean": [5, 6], "corrupt": [5, 7], "answers": [8], "wrong_answers": [9]}], "word_idxs": {"A": 1}}  # fmt: skip
COLUMNS = ("clean", "corrupted", "correct", "wrong", "labels", "spans", "corrupted_spans", "template")
CELLS = [PAIR["clean"], PAIR["corrupted"], "John", '["Mary", "Tom"]', '{"S2": 7}', '{"IO": [5, 9]}', "", "3"]


def as_csv(rows: list[list[str]], end: str = "\n") -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator=end).writerows(rows)
    return buffer.getvalue().encode("utf-8", "surrogatepass")


def lines_of(rows: list[Any]) -> bytes:
    return "\n".join(map(as_json, rows)).encode()


def rows_of(row: Any) -> Any:
    return st.lists(swapped(row), min_size=1, max_size=3).map(lines_of)


CELL = st.sampled_from(CELLS) | SCALARS.map(str) | swapped(["a"]).map(as_json) | swapped({"S2": 7}).map(as_json)
TABLE = st.lists(st.lists(CELL, min_size=7, max_size=9), min_size=1, max_size=3)
NUMBERS = ["clean", "corrupted", "correct_idx", "incorrect_idx"]
PAIR_FILES = {
    "jsonl": (damaged(lines_of([PAIR, PAIR])) | rows_of(PAIR), fp.Pairs.from_jsonl),
    "csv": (
        damaged(as_csv([list(COLUMNS), CELLS, CELLS]))
        | st.builds(lambda rows, end: as_csv([list(COLUMNS), *rows], end), TABLE, st.sampled_from(["\n", "\r", "\r\n"])),
        fp.Pairs.from_csv,
    ),
    "feature_circuits": (damaged(lines_of([FOREIGN])) | rows_of(FOREIGN), fp.Pairs.from_feature_circuits),
    "eap_ig": (
        damaged(as_csv([NUMBERS, [*CELLS[:2], "5", "[6, 7]"]]))
        | st.lists(CELL | VALUES.map(as_json), min_size=4, max_size=4).map(lambda row: as_csv([NUMBERS, row])),
        fp.Pairs.from_eap_ig,
    ),
    "auto_circuit": (damaged(as_json(CIRCUIT).encode()) | swapped(CIRCUIT).map(lambda v: as_json(v).encode()), fp.Pairs.from_auto_circuit),
}  # fmt: skip


def plainly(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """What pairs of `words` hold: tokens, answers, tags, read without any of the library."""

    def several(answers: Any) -> tuple[int, ...]:
        return tuple(words(answer)[0] for answer in ([answers] if isinstance(answers, str) else answers))

    return [
        (tuple(words(row["clean"])), tuple(words(row["corrupted"])), several(row["correct"]), several(row["wrong"]), row.get("tags", {}))
        for row in rows
    ]  # fmt: skip


@pytest.mark.parametrize("kind", PAIR_FILES)
def test_pairs(kind: str, folder: Path, shipped: Demo) -> None:
    content, load = PAIR_FILES[kind]
    path = folder / f"pairs.{kind}"
    options = {"skip": st.booleans()} if kind not in ("jsonl", "csv") else {"long_answers": st.booleans()}

    @share(0.103)
    @given(content, st.sampled_from([words, shipped.model.tokenizer]), st.fixed_dictionaries({}, optional=options))
    def check(content: bytes, tokenizer: Any, options: dict[str, Any]) -> None:
        path.write_bytes(content)
        try:
            found = clean(lambda: load(tokenizer, path, **options))
        except PairsWarning:  # an error in these tests; it counts what was left out, as was asked for
            return
        if found is None:
            return
        assert len(found.digest()) == 64
        for pair in found:
            assert len(pair.clean) == len(pair.corrupted) > 0
            assert all(isinstance(token, int) and token >= 0 for token in (*pair.clean, *pair.corrupted))
            assert all(0 <= position < len(pair) for position in pair.labels.values())
            assert all(type(text) is str for tag in pair.tags.items() for text in tag)
        if kind == "jsonl" and tokenizer is words and not options.get("long_answers"):
            rows = [json.loads(line) for line in content.decode("utf-8-sig").split("\n") if line.strip()]
            assert [(p.clean, p.corrupted, p.correct, p.wrong, p.tags) for p in found] == plainly(rows)
        if kind == "csv" and tokenizer is words:
            header, *table = filter(None, csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
            assert [p.clean for p in found] == [tuple(words(row[header.index("clean")])) for row in table]

    check()


@pytest.mark.parametrize(
    "changed", [{"clean": "\ud800"}, {"tags": {"a": "\ud800"}}, {"clean": Deep(400)}, {"labels": {"S2": Deep(25)}}, {"note": Deep(25)}, {"labels": {"S2": 10**40}}, {"clean": Deep(10**6)}]
)  # fmt: skip
def test_pairs_that_are_refused(changed: dict[str, Any], tmp_path: Path, shipped: Demo) -> None:
    (tmp_path / "p").write_bytes(lines_of([{**PAIR, **changed}]))
    for tokenizer in (words, shipped.model.tokenizer):
        with pytest.raises(fp.FeatpatchError, match="line 1: "):
            fp.Pairs.from_jsonl(tokenizer, tmp_path / "p")


# Effects.


@pytest.fixture(scope="module")
def tables(shipped: Demo) -> list[fp.Effects]:
    """Of features, with two metrics; screened; of components; of edges."""
    pairs = shipped.pairs("ioi", n=3, seed=0)
    sae = next(sae for sae in shipped.saes if sae.cfg.metadata.hook_name == "blocks.2.hook_resid_pre")
    options: dict[str, Any] = {"positions": ["S2", "end"], "progress": False}
    ranked = fp.rank_features(shipped.model, sae, pairs, metric=["logit_diff", "prob"], **options)
    screened = fp.rank_features(
        shipped.model, sae, pairs, metric=["logit_diff", "prob"], screen=fp.Screen(k=3, audit=2), **options
    )
    parts = fp.rank_components(shipped.model, pairs, sites=["z", "mlp_out"], **options)
    head = next(node for node in parts.nodes if node.kind == "head" and node.site.startswith("blocks.0"))
    receiver = Node("blocks.1.hook_mlp_out", "activation", position=head.position)
    paths = fp.rank_paths(shipped.model, pairs, senders=[head], receivers=[receiver], progress=False)
    return [ranked.take(ranked.ranked).top(4), screened, parts.top(4, kind=None), getattr(paths, "effects", paths)]


def read_file(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Header and columns of a safetensors file of float64 and int64, by its specification."""
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    said = header.pop("__metadata__")
    kinds = {"F64": "<f8", "I64": "<i8"}
    return said, {n: np.frombuffer(data[slice(*t["data_offsets"])], kinds[t["dtype"]]).copy() for n, t in header.items()}


def write_file(
    said: Any, columns: dict[str, np.ndarray], edit: Callable[[dict[str, Any]], Any] = lambda header: header
) -> bytes:
    """A safetensors file, also of what the library would not write; its SHA-256 is right, as that of a forger."""
    if isinstance(said, dict) and "sha256" in said:
        texts = {name: text for name, text in said.items() if name != "sha256"}
        total = hashlib.sha256(as_json(dict(sorted(texts.items()))).encode(errors="replace"))
        for name in sorted(columns):
            total.update(f"{name} {columns[name].dtype} {columns[name].shape}".encode() + columns[name].tobytes())
        said = {**texts, "sha256": total.hexdigest()}
    header: dict[str, Any] = {"__metadata__": said}
    data = b""
    kinds = {
        "float64": "F64",
        "int64": "I64",
        "float32": "F32",
        "int8": "I8",
        "bool": "BOOL",
        "float16": "F16",
        "uint64": "U64",
    }
    for name, column in columns.items():
        header[name] = {"dtype": kinds[str(column.dtype)], "shape": list(column.shape), "data_offsets": [len(data), len(data) + column.nbytes]}  # fmt: skip
        data += column.tobytes()
    text = as_json(edit(header)).encode()
    return struct.pack("<Q", len(text)) + text + data


@st.composite
def changed_columns(draw: Any, columns: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Other values, types, shapes and sizes."""
    made = dict(columns)
    for name in draw(st.lists(st.sampled_from(list(columns)), min_size=1, max_size=3)):
        column = made[name].copy()
        way = draw(st.sampled_from(["value", "value", "value", "all", "type", "shape", "cut", "double", "drop", "again"]))
        if way in ("value", "all") and column.size and column.dtype in (np.int64, np.float64):
            whole = st.sampled_from([-1, 0, 1, 2**31, 2**63 - 1, -(2**63)])
            value = draw(whole if column.dtype == np.int64 else NUMBER)
            column.flat[slice(None) if way == "all" else draw(st.integers(0, column.size - 1))] = value
        elif way == "type":
            with np.errstate(all="ignore"):
                column = column.astype(
                    draw(st.sampled_from(["float32", "int8", "bool", "float16", "uint64", "int64", "float64"]))
                )
        elif way == "shape":
            column = column.reshape(draw(st.sampled_from([(-1, 1), (1, -1), (1, 1, -1)])))
        elif way == "cut":
            column = column[: draw(st.integers(0, column.size))]
        elif way == "double":
            column = np.concatenate([column, column])
        made[name] = column
        if way == "drop":
            del made[name]
            break
        if way == "again":
            made[draw(TEXTS.filter(lambda text: text != "__metadata__"))] = column
    return made


def shown(table: fp.Effects, path: Path, *, whole: bool) -> None:
    """What a loaded table can be asked without a model; all of it, or what is quick."""
    frame = table.to_pandas()
    assert len(frame) == len(table)
    for effect in table.directions_run():
        assert np.isfinite(table.pooled(effect)).all() or np.isnan(table.denoised).any() or np.isnan(table.noised).any()
    assert repr(table)
    assert "<table" in table._repr_html_()
    assert len(table.top(3)) <= 3
    table.sites()
    if not whole:
        return
    for call in (lambda: table.audit(top=1), lambda: fp.report(table, path / "r.html"), lambda: table.save(path / "again")):
        clean(call)
    done = CliRunner().invoke(app, ["info", str(path / "e"), "--json"])
    assert done.exit_code in (0, 2), done.exception


def test_effects(tables: list[fp.Effects], folder: Path) -> None:
    inside = folder / "effects"
    inside.mkdir()
    originals = [read_file(table.save(inside / f"{number}")) for number, table in enumerate(tables)]
    contents = [(inside / f"{number}").read_bytes() for number in range(len(tables))]

    def with_json(said: dict[str, str], entry: str) -> Any:
        return swapped(json.loads(said[entry])).map(lambda value: {**said, entry: as_json(value)})

    def any_of(original: tuple[dict[str, str], dict[str, np.ndarray]]) -> Any:
        said, columns = original
        headers = with_json(said, "metadata") | with_json(said, "nodes") | swapped(said)
        return (
            st.builds(write_file, headers, st.just(columns))
            | st.builds(write_file, st.just(said), changed_columns(columns))
            | swapped(json.loads(said["metadata"])).map(lambda v: write_file({**said, "metadata": as_json(v)}, columns))
            | st.builds(lambda draw: write_file(said, columns, draw), st.sampled_from([lambda h: {**h, "clean": {**h["clean"], "shape": [2**62]}}, lambda h: {**h, "x": h["row"]}, lambda h: [h]]))
        )  # fmt: skip

    @share(0.2)
    @given(st.sampled_from(contents).flatmap(damaged) | st.sampled_from(originals).flatmap(any_of), st.integers(0, 7))
    def check(content: bytes, number: int) -> None:
        (inside / "e").write_bytes(content)
        found = clean(lambda: fp.Effects.load(inside / "e"))
        if found is not None:
            shown(found, inside, whole=number == 0)

    check()
    for number, table in enumerate(tables):
        again = fp.Effects.load(inside / f"{number}")
        assert again.nodes == table.nodes
        assert list(again.to_pandas().columns) == list(table.to_pandas().columns)


def node_with(**changed: Any) -> Callable[[dict[str, str]], dict[str, str]]:
    """The first node with another field."""
    names = ["site", "kind", "index", "position", "sae"]

    def change(said: dict[str, str]) -> dict[str, str]:
        (first, *others) = json.loads(said["nodes"])
        return {**said, "nodes": as_json([[changed.get(n, v) for n, v in zip(names, first, strict=True)], *others])}

    return change


def entry_of(name: str, value: Any) -> Callable[[dict[str, str]], dict[str, str]]:
    """The metadata with another entry."""
    return lambda said: {**said, "metadata": as_json({**json.loads(said["metadata"]), name: value})}


@pytest.mark.parametrize(
    "change",
    [
        *(node_with(index=value) for value in (-1, 2**63, 10**40, True, 1.5, "1", None)),
        *(node_with(position=value) for value in (-(2**63), 2**53, 2**63, True, [1], None, {}, 0.5)),
        *(node_with(site=value) for value in (None, 3, [])), node_with(sae=None), node_with(kind="edge"), node_with(kind=[]),
        lambda said: {**said, "nodes": as_json(2 * json.loads(said["nodes"]))},
        lambda said: {**said, "nodes": as_json([[*first, first, first] for first in json.loads(said["nodes"])])},
        *(entry_of("threshold", value) for value in (0.0, 1.0, -0.5, 1)),
        *(entry_of(name, value) for name in ("metric", "metrics", "directions", "positions", "model", "versions", "rows_ranked", "finished", "screening", "tags", "of_pairs", "saes") for value in (None, -1, 10**40, [[]], {"a": 1}, [1.5])),
        entry_of("screening", {"k": 0, "sampled": 1, "candidates": 2, "looks": 1, "changed_features": []}),
        *(entry_of("screening", {"k": 1, "sampled": 1, "candidates": 2, "looks": 1, "changed_features": [row]}) for row in ([3, "a", "b", 1], ["a", 3, "S2", 1], ["a", "b", "S2", "1"], ["a", "b", "S2", 1, 1])),
        entry_of("directions", []), entry_of("directions", ["noising", "noising"]), entry_of("tags", []), entry_of("of_pairs", [0]),
        entry_of("metrics", ["prob", "logit_diff"]),
    ],
)  # fmt: skip
def test_effects_that_are_refused(change: Callable[[Any], Any], tables: list[fp.Effects], tmp_path: Path) -> None:
    said, columns = read_file(tables[0].save(tmp_path / "e"))
    (tmp_path / "e").write_bytes(write_file(said, columns))
    assert fp.Effects.load(tmp_path / "e").nodes == tables[0].nodes
    (tmp_path / "e").write_bytes(write_file(change(said), columns))
    with pytest.raises(fp.FeatpatchError, match="is damaged"):
        fp.Effects.load(tmp_path / "e")


@pytest.mark.parametrize(
    ("name", "value"),
    [(n, v) for n in ("row", "pair") for v in (-1, 99, 2**62)]
    + [(n, v) for n in ("clean", "corrupted") for v in (np.nan, np.inf, 1e300)]
    + [(n, v) for n in ("denoised", "noised") for v in (-np.inf, 1e300)],
)
def test_columns_that_are_refused(name: str, value: float, tables: list[fp.Effects], tmp_path: Path) -> None:
    said, columns = read_file(tables[0].save(tmp_path / "e"))
    for changed in ({name: np.where(np.arange(len(columns[name])) == 0, value, columns[name]).astype(columns[name].dtype)},
                    {name: columns[name][:-1]}, {name: columns[name].astype("float32")}, {name: columns[name].reshape(-1, 1)},
                    {"row": columns["row"] * 0, "pair": columns["pair"] * 0}, {"clean": columns["corrupted"]}):  # fmt: skip
        (tmp_path / "e").write_bytes(write_file(said, {**columns, **changed}))
        with pytest.raises(fp.FeatpatchError, match="is damaged"):
            fp.Effects.load(tmp_path / "e")


def test_gaps_that_cancel_have_no_interval(tables: list[fp.Effects]) -> None:
    """Where resampled pairs can have no gap at all, nothing is warned of and nothing is decided by it."""
    table = tables[0]
    gaps = np.array([1.0, -1.0, 2.0])
    odd = replace(table, clean=table.corrupted + gaps, taken_from=None, others={})
    assert odd.interval("recovery").shape == (len(table), 2)
    assert len(odd.to_pandas()) == len(table)


# Journals.


def signed(text: str) -> bytes:
    return f"{text} {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}\n".encode("utf-8", "surrogatepass")


def floats(values: list[float]) -> str:
    return base64.b64encode(np.array(values, "<f8").tobytes()).decode()


def test_journals(folder: Path) -> None:
    """Good lines give their numbers; all others, right checksum or not, give an error or nothing."""
    path, subject, measured = folder / "journal", {"model": {"name": "m"}, "saes": {"a": "1"}}, [1.5, 0.25]
    path.unlink(missing_ok=True)
    book = Journal.open(path, subject, measured, 7)
    known = {"a" * 32: [1.0, 2.0], "b" * 32: [3.0]}
    for key, values in known.items():
        book.put(key, torch.tensor(values, dtype=torch.float64))
    del book
    header, *batches = (line.rpartition(b" ")[0].decode() for line in path.read_bytes().splitlines())
    hostile = swapped({"batch": "c" * 32, "values": floats([4.0])}) | st.builds(
        lambda key, values: {"batch": key, "values": values}, VALUES, TEXTS | st.lists(NUMBER, max_size=3).map(floats) | VALUES
    )
    later = st.lists(
        st.sampled_from(batches) | hostile.map(as_json) | st.sampled_from(["", "null", "[" * 100_000, "{"]), max_size=4
    )
    first = st.just(header) | swapped(json.loads(header)).map(as_json)
    written = st.builds(lambda first, later: b"".join(map(signed, [first, *later])), first, later)

    @share(0.16)
    @given(written | damaged(path.read_bytes()))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        found = clean(lambda: Journal.open(path, subject, measured, 5))
        if found is None:
            return
        assert type(found.rows) is int
        assert found.rows > 0
        for key in found.finished:
            values = found.get(key)
            assert values is not None
            assert torch.isfinite(values).all()
            if key in known:
                assert values.tolist() == known[key]
            assert clean(partial(found.get, key, len(values) + 1)) is None
        del found
        again = Journal.open(path, subject, measured, 5)
        again.put("d" * 32, torch.ones(2, dtype=torch.float64))
        del again
        assert Journal.open(path, subject, measured, 5).get("d" * 32, 2) is not None

    check()


@pytest.mark.parametrize(
    "line",
    [{"batch": "c", "values": floats([value])} for value in (np.nan, np.inf)]
    + [{"batch": "c", "values": value} for value in ("%%", "AAAA", 3, None, ["AAAA"], "ü")]
    + [{"batch": 3, "values": floats([1.0])}, {"batch": ["c"], "values": floats([1.0])}, {"values": floats([1.0])}, {}, {"batch": "c"}, 3, None, "x", Deep(10**6), Deep(30)],
)  # fmt: skip
def test_lines_of_a_journal_that_are_none(line: Any, tmp_path: Path) -> None:
    """They are left out although their checksum is right."""
    Journal.open(tmp_path / "j", {"a": 1}, [1.0], 7).put("b", torch.ones(1, dtype=torch.float64))
    with (tmp_path / "j").open("ab") as file:
        file.write(signed(as_json(line)))
    assert list(Journal.open(tmp_path / "j", {"a": 1}, [1.0], 7).finished) == ["b"]


@pytest.mark.parametrize(
    "changed",
    [{"baselines": value} for value in (None, 1.0, [], [1.0], [1.0, 2.0, 2.0], ["1.0", "2.0"], [[1.0], [2.0]], [1.0, 10**400], [float("nan")] * 2, {})]
    + [{"rows": value} for value in (None, 0, -1, True, "7", 2.5, 10**40, [])] + [{"format": 1}, {"a": [1]}, {"more": 1}],
)  # fmt: skip
def test_first_lines_of_a_journal_that_are_refused(changed: dict[str, Any], tmp_path: Path) -> None:
    Journal.open(tmp_path / "j", {"a": 1}, [1.0, 2.0], 7)
    header = json.loads((tmp_path / "j").read_bytes().rpartition(b" ")[0])
    for content in ({**header, **changed}, {name: v for name, v in header.items() if name not in changed}):
        (tmp_path / "j").write_bytes(signed(as_json(content)))
        if content != header:
            with pytest.raises(fp.FeatpatchError, match="belongs to another sweep"):
                Journal.open(tmp_path / "j", {"a": 1}, [1.0, 2.0], 7)


def test_a_sweep_with_a_forged_journal(bridge: Small, tmp_path: Path) -> None:
    """Batches of the wrong size are refused, lines that are none are run again; nothing else comes out."""
    pairs = fp.Pairs.from_tokens(bridge.clean, bridge.corrupted, bridge.correct, bridge.wrong)
    journal = tmp_path / "journal"
    rank = partial(fp.rank_features, bridge.model, bridge.at("blocks.1.hook_resid_pre"), pairs, batch_rows=40, progress=False)
    whole = rank(journal=journal)
    first, *lines = journal.read_bytes().splitlines(keepends=True)
    key = json.loads(lines[0].rpartition(b" ")[0])["batch"]
    for values in ([], [1.0], [1.0] * 1000, [np.nan] * 4, None):
        line = {"batch": key, "values": "%%" if values is None else floats(values)}
        journal.write_bytes(first + signed(json.dumps(line)) + b"".join(lines[1:]))
        found = clean(lambda: rank(journal=journal))
        if found is not None:
            np.testing.assert_array_equal(found.denoised, whole.denoised)
            np.testing.assert_array_equal(found.noised, whole.noised)


# Studies.

STUDY = {"command": "info", "arguments": ["effects"], "top": 3, "json": True}


def as_toml(content: Any) -> bytes:
    lines = [
        f"{name if name.isalpha() else json.dumps(name)} = {json.dumps(v)}" for name, v in content.items() if v is not None
    ]
    return "\n".join(lines).encode("utf-8", "replace")


def test_studies(tables: list[fp.Effects], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = folder / "studies"
    inside.mkdir()
    monkeypatch.chdir(inside)
    tables[2].save("effects")
    names = st.sampled_from([*STUDY, "out", "", "--", "-x", "help", "a b", "=", "ü", "model"])
    plain = st.recursive(SCALARS.filter(lambda v: v != "\ud800"), lambda inner: st.lists(inner, max_size=3), max_leaves=4)
    contents = st.dictionaries(names, plain, max_size=3).map(lambda more: as_toml({**STUDY, **more}))
    special = st.sampled_from([
        b"command = ['info']", b"command = {a = 1}", b"command = 'info'\narguments = 5", b"command = 'info'\narguments = [[1]]",
        b"command = 'info'\narguments = 'effects'", b"a = " + b"[" * 20_000, b"command = 'info'\ntop = " + b"9" * 6000, b"command = 1979-05-27",
        b"command = 'info'\n[top]\na = 1", b"command = 'info'\ncommand = 'run'", b"command = 'info'\narguments = ['../../../../etc/passwd']",
    ])  # fmt: skip

    @share(0.07)
    @given(damaged(as_toml(STUDY)) | contents | special)
    def check(content: bytes) -> None:
        Path("study.toml").write_bytes(content)
        done = CliRunner().invoke(app, ["run", "study.toml"])
        assert done.exit_code in (0, 2), (content, done.exception)
        assert done.exception is None or isinstance(done.exception, SystemExit)
        assert sorted(path.name for path in inside.iterdir()) == ["effects", "study.toml"]

    check()


# Models and SAEs.


def test_saes(tmp_path: Path) -> None:
    """A folder gives a dictionary that can be used, or an error."""
    save_model(tmp_path / "model")
    save_sae(tmp_path / "sae")
    files = {name: (tmp_path / "sae" / name).read_bytes() for name in ("cfg.json", "sae_weights.safetensors")}
    (tmp_path / "pairs").write_text(json.dumps(PAIRS[0]))
    model = fp.load(tmp_path / "model", check=False).model
    pairs = fp.Pairs.from_jsonl(model.tokenizer, tmp_path / "pairs")
    rank = partial(fp.rank_features, model, pairs=pairs, progress=False, positions=["S2"], directions=["noising"])
    cfg = json.loads(files["cfg.json"])
    assert len(rank(fp.load_sae(tmp_path / "sae"))) > 0
    said = swapped(cfg) | swapped(cfg["metadata"]).map(lambda value: {**cfg, "metadata": value})
    for name, more in (("d_sae", 10**12), ("d_in", -1), ("architecture", "../x"), ("dtype", "object"), ("device", "nowhere"), ("apply_b_dec_to_input", [])):  # fmt: skip
        said |= st.just({**cfg, name: more})

    @share(0.03)
    @given(
        st.tuples(damaged(files["cfg.json"]) | said.map(lambda value: as_json(value).encode()), st.just(files["sae_weights.safetensors"]))
        | st.tuples(st.just(files["cfg.json"]), damaged(files["sae_weights.safetensors"]))
    )  # fmt: skip
    def check(contents: tuple[bytes, bytes]) -> None:
        for name, content in zip(files, contents, strict=True):
            (tmp_path / "sae" / name).write_bytes(content)
        sae = clean(lambda: fp.load_sae(tmp_path / "sae"))
        if sae is not None:
            clean(lambda: rank(sae))

    check()


def test_models(tmp_path: Path) -> None:
    save_model(tmp_path / "m")
    names = ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"]
    files = {name: (tmp_path / "m" / name).read_bytes() for name in names}
    config, how = json.loads(files["config.json"]), json.loads(files["tokenizer_config.json"])
    (tmp_path / "m" / "evil.py").write_text("open('hacked', 'w')\nclass Evil: pass\n")
    remote = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer"), "evil.Evil")}
    changes = st.one_of(
        st.sampled_from(names).flatmap(lambda name: st.tuples(st.just(name), damaged(files[name]))),
        swapped(config).map(lambda value: ("config.json", as_json(value).encode())),
        swapped(json.loads(files["tokenizer.json"])).map(lambda value: ("tokenizer.json", as_json(value).encode())),
        st.sampled_from([
            ("config.json", json.dumps({**config, **remote}).encode()), ("config.json", json.dumps({**remote, "model_type": "evil"}).encode()),
            ("tokenizer_config.json", json.dumps({**how, **remote, "tokenizer_class": "Evil"}).encode()),
        ]),
    )  # fmt: skip

    @share(0.015)
    @given(changes)
    def check(change: tuple[str, bytes]) -> None:
        for name, content in {**files, change[0]: change[1]}.items():
            (tmp_path / "m" / name).write_bytes(content)
        loaded = clean(lambda: fp.load(tmp_path / "m", check=False))
        assert loaded is None or loaded.model.tokenizer is not None
        assert not Path("hacked").exists()

    check()


def test_a_model_in_a_pickle_is_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(
        fp.FeatpatchError, match="there is no safetensors file in .*: expected the model's weights in this format"
    ):
        fp.load(tmp_path / "m", check=False)


# Pages.


class Skeleton(HTMLParser):
    """What a browser would act on: tags with the names of their attributes, links, scripts that are no data."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Any] = []
        self.inside = ""
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        told = {name: value or "" for name, value in attributes}
        assert not any(name.startswith("on") for name in told)
        assert not any(told.get(name, "").strip().lower().startswith("javascript:") for name in ("href", "src"))
        self.found.append((tag, *sorted(told)))
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.found.append(f"/{tag}")
        self.inside = ""

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")


def page_of(tables: list[fp.Effects], text: str, path: Path) -> str:
    """A report in which every text of a user is this one, and a circuit's page beside."""
    table = tables[0].take(range(len(tables[0])))
    nodes = tuple(replace(node, sae=text + str(n), position=text) for n, node in enumerate(table.nodes))
    measured = {name: value for name, value in table.metadata.items() if name != "places"}
    metadata = {**measured, "note": text, "command": text, "metric": text, "metrics": [text], "positions": [text],
                "model": {"name": text, "sha256": text}, "saes": {text: text}, text + "k": {text: [text]},
                "tags": [{text: f"{text}{n % 2}"} for n in range(len(table.clean))]}  # fmt: skip
    hostile = replace(table, nodes=nodes, metadata=metadata, taken_from=None, others={}, value=text)
    both = ([False, True], [False, True]), ([text, text], [text, text])
    prompt = PairText([text, text], [text, "b"], *both, [text], [text])
    card = FeatureCard(0, [0.5, 1.0], [0.0, 1.0], {text: text}, f"https://www.neuronpedia.org/{text}/1")
    material = Material(text, [prompt] * len(table.clean), {nodes[0]: card})
    loaded = fp.Effects.load(replace(hostile, taken_from=None).save(path / "hostile"))
    assert loaded.nodes == hostile.nodes
    report = write(path / "report.html", sections.page_of(hostile, material, None)).read_text(encoding="utf-8")
    (path / "graph.html").write_text(interactive(graph_of(text), text), encoding="utf-8")
    return report


def graph_of(text: str) -> nx.DiGraph:
    graph = nx.DiGraph()
    one, other = (Node(f"blocks.{n}.hook_mlp_out", "feature", n, text, text) for n in (0, 1))
    graph.add_edge(one, other, effect=0.5)
    return graph


def unique(content: str) -> str:
    """Without the ids that are drawn for every page."""
    import re

    return re.sub(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f-]{22,}|itables_[0-9a-f_]+|\d{4}-\d\d-\d\dT[\d:+]+", "", content)


def test_pages_by_their_tags(tables: list[fp.Effects], folder: Path) -> None:
    """Whatever the texts are, the tags, attributes and scripts are those of a harmless page."""
    inside = folder / "pages"
    inside.mkdir()

    def skeletons(text: str) -> list[list[Any]]:
        report = page_of(tables, text, inside)
        return [Skeleton(part.split("</head>", 1)[1]).found for part in (report, (inside / "graph.html").read_text())]

    expected = skeletons("harmless")

    @share(0.015)
    @given(
        st.text(st.characters(codec="utf-8"), max_size=8)
        | st.lists(st.sampled_from(MARKS), min_size=1, max_size=3).map("".join)
    )
    def check(text: str) -> None:
        assert skeletons(text) == expected
        assert dot(graph_of(text)).count("->") == 1
        clerps = viewer_json(
            nx.relabel_nodes(graph_of(text), lambda node: replace(node, position=0)), tokens=[text], slug="a", model="m"
        )["nodes"]
        assert not any("<" in node["clerp"] for node in clerps)
        assert {path.name for path in inside.iterdir()} == {"hostile", "report.html", "graph.html"}

    check()


@pytest.mark.parametrize(
    "text",
    [
        "".join(MARKS),
        *(pytest.param(mark, marks=pytest.mark.extended) for mark in MARKS[1:3]),
        "\"'`</textarea>&#60;script&#62;window.hacked=1&#60;/script&#62;",
    ],
)
def test_pages_in_a_browser(text: str, tables: list[fp.Effects], browser: Any, tmp_path: Path) -> None:
    page_of(tables, text, tmp_path)
    for name in ("report.html", "graph.html"):
        browser.get((tmp_path / name).as_uri())
        time.sleep(0.4)
        browser.execute_script(
            "document.querySelectorAll('#ranking tr.opens, #node-choice').forEach(e => { e.click(); if (e.options) { e.value = 0;"
            "e.dispatchEvent(new Event('change')); } })"
        )
        time.sleep(0.2)
        assert browser.execute_script("return window.hacked") is None
        assert (
            browser.execute_script(
                "return document.querySelectorAll('img[src=x], svg[onload], [onerror], [onmouseover]').length"
            )
            == 0
        )


@pytest.mark.filterwarnings("ignore:label .* has no rows")
def test_a_report_of_a_whole_study(shipped: Demo, browser: Any, tmp_path: Path) -> None:
    """Labels, tags, names of SAEs and models, and what the tokenizer gives; no file but the one that is asked for."""
    evil = MARKS[1] + MARKS[2] + "../../x"
    sae = next(sae for sae in shipped.saes if sae.cfg.metadata.hook_name == "blocks.2.hook_resid_pre")
    given = sae.cfg.metadata.neuronpedia_id
    pairs = fp.Pairs(
        tuple(
            replace(pair, labels={evil: 5}, tags={evil: f"{n}{evil}"})
            for n, pair in enumerate(shipped.pairs("ioi", n=4, seed=0))
        )
    )
    try:
        sae.cfg.metadata.neuronpedia_id = f'x" onclick="window.hacked=1/{evil}'
        effects = fp.rank_features(shipped.model, sae, pairs, positions=[evil], progress=False)
        (tmp_path / "out").mkdir()
        before = set(tmp_path.rglob("*"))
        path = fp.report(effects, tmp_path / "out" / "r.html", model=shipped.model, saes=sae, pairs=pairs, question=evil, top=3)
        effects.save(tmp_path / "out" / "e")
    finally:
        sae.cfg.metadata.neuronpedia_id = given
    assert set(tmp_path.rglob("*")) - before == {path, tmp_path / "out" / "e"}
    browser.get(path.as_uri())
    time.sleep(1)
    assert browser.execute_script("return window.hacked") is None
    Skeleton(path.read_text(encoding="utf-8").split("</head>", 1)[1])


def test_results_stay_in_their_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run whose pairs, labels and tags hold paths, every file is in --out."""
    work = tmp_path / "a" / "b"
    save_model(work / "m")
    save_sae(work / "sae")
    evil = "../../../evil"
    pair = {**PAIRS[0], "labels": {evil: 6, "/tmp/featpatch-evil": 6}, "tags": {evil: "/tmp/featpatch-evil"}}
    (work / "p.jsonl").write_text(json.dumps(pair))
    (work / "study.toml").write_text(
        f"command = 'rank'\nmodel = 'm'\nsae = 'sae'\npairs = 'p.jsonl'\npositions = '{evil}'\nout = 'out'\njson = true\n"
    )
    monkeypatch.chdir(work)
    before = set(tmp_path.rglob("*"))
    done = CliRunner().invoke(app, ["run", "study.toml"])
    assert done.exit_code == 0, done.output
    new = {path.relative_to(work).as_posix() for path in set(tmp_path.rglob("*")) - before}
    assert new == {"out", "out/effects.safetensors", "out/effects.csv", "out/report.html"}
    assert not Path("/tmp/featpatch-evil").exists()
    shutil.rmtree("out")


# Pickles.

FORBIDDEN = {"pickle", "_pickle", "cPickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}
CALLS = {("torch", "load"), ("torch", "save"), ("np", "load"), ("numpy", "load"), ("pd", "read_pickle")}


SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
"""Calls that read tensors and arrays alone, and the argument, written out in the call, that makes them do so."""


def safe(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and any(
        (keyword.arg, getattr(keyword.value, "value", None)) == SAFE.get(ast.unparse(node.func)) for keyword in node.keywords
    )


def pickles(code: str) -> list[str]:
    """The names by which a module could read or write one."""
    found = []
    tree = ast.parse(code)
    harmless = [part for node in ast.walk(tree) if safe(node) for part in (node.func, *node.keywords)]
    for node in ast.walk(tree):
        if node in harmless:
            continue
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.split(".")[0] in FORBIDDEN]
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            found += [str(node.module)] if module in FORBIDDEN else []
            found += [name.name for name in node.names if (module, name.name) in CALLS]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            found += [f"{node.value.id}.{node.attr}"] if (node.value.id, node.attr) in CALLS else []
        if isinstance(node, ast.Attribute) and node.attr in ("read_pickle", "to_pickle"):
            found.append(node.attr)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(node.arg)
    return found


def test_no_pickles() -> None:
    """None is read or written; models travel between the processes of one run by cloudpickle, in one module."""
    package = Path(fp.__file__).parent
    found = {path.relative_to(package).as_posix(): pickles(path.read_text()) for path in package.rglob("*.py")}
    assert {path for path, names in found.items() if names} <= {"model/transport.py"}
    assert set(found["model/transport.py"]) == {"cloudpickle"}
    assert sorted(pickles("import torch\ntorch.load('x')\nfrom numpy import load\nimport pickle")) == [
        "load",
        "pickle",
        "torch.load",
    ]
    for call in ("torch.load('x', weights_only=False)", "torch.load('x', weights_only=yes)", "torch.load", "np.load('x')",
                 "torch.load('x', allow_pickle=False)", "np.load('x', allow_pickle=True)"):  # fmt: skip
        assert pickles(call), call
    assert pickles("torch.load('x', weights_only=True)\nnp.load('x', allow_pickle=False)") == []
