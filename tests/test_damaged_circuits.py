"""Damaged and hostile files of circuits and of labels: each gives a clean error or a right result.

FEATPATCH_EXAMPLES=10000 draws as many files of each kind.
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from damage import as_json, clean, damaged, harmless, swapped
from drawn import each
from hypothesis import given
from hypothesis import strategies as st
from small import Small, small_hooked
from test_circuit_files import theirs
from test_circuit_journals import tiny
from test_edges import named
from test_sets import pairs_of

import featpatch as fp

SITE = "blocks.1.hook_resid_pre"


@cache
def small() -> Small:
    return small_hooked()


def edges(path: Path, **options: Any) -> fp.Circuit:
    model = tiny()
    return fp.find_circuit(model.model, pairs_of(model), over="edges", scores="estimate", size=5, progress=False, **options)


def features(path: Path) -> fp.Circuit:
    """A circuit of features, of which two are a group."""
    nodes = [fp.Node(SITE, "feature", n, sae=SITE) for n in range(4)]
    patches = [fp.Patch((nodes[0], nodes[1]), "two"), *nodes[2:]]
    model = small()
    return fp.find_circuit(
        model.model, pairs_of(model), nodes=patches, saes=model.at(SITE), errors="in", size=2, progress=False
    )


FORMS: dict[str, tuple[Callable[[Path], fp.Circuit], Any]] = {
    "edges": (edges, "featpatch"),
    "edges to means": (lambda path: edges(path, to="mean_by_position"), "featpatch"),
    "features": (features, "featpatch"),
    "EAP-IG": (edges, "eap_ig"),
}


def fields(node: fp.Node) -> list[Any]:
    """A node as our files have it."""
    own = [node.site, node.kind, node.index, node.position, node.sae]
    return [*own, fields(node.sender), fields(node.receiver)] if isinstance(node, fp.Edge) else own


@pytest.mark.parametrize("form", FORMS)
def test_damaged_circuits(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # types are not checked outside of tests
    make, kind = FORMS[form]
    original, path, ends = make(tmp_path), tmp_path / "circuit.json", Counter[str]()
    model, saes = (small(), small().at(SITE)) if form == "features" else (tiny(), None)
    pairs = pairs_of(model)
    whole = original.save(path, form=kind).read_bytes()
    known = json.loads(whole)

    def loaded(content: bytes, again: bool) -> str:
        path.write_bytes(content)
        with harmless(tmp_path):
            found = clean(lambda: fp.load_circuit(path, model.model, pairs, saes=saes))
            if found is None:
                return "refused"
            assert repr(found)
            if again:
                clean(lambda: found.stability(resamples=1))
        read = json.loads(content)
        if kind == "eap_ig":
            assert {theirs(named(edge)) for edge in found.items} == {
                n for n, entry in read["edges"].items() if entry["in_graph"]
            }
            numbers = {theirs(named(edge)): score for edge, score in zip(found.graph.items, found.scores, strict=True)}
            assert numbers == {name: entry["score"] for name, entry in read["edges"].items()}
            same = True
        else:
            assert list(map(fields, found.items)) == read["items"]
            assert list(map(fields, found.graph.candidates)) == read["candidates"]
            assert found.scores.tolist() == read["scores"]
            measured = ("metric", "outside", "positions", "ablation", "over")
            same = all(read["metadata"].get(name) == known["metadata"].get(name) for name in measured)
            same &= all(read.get(name) == known.get(name) for name in ("candidates", "groups"))
        if not same:
            return "another graph"
        assert found.faithfulness == pytest.approx(replace(original, items=found.items).faithfulness, abs=1e-9)
        return "right"

    assert loaded(whole, True) == "right"

    @each(0.2)
    @given(
        damaged(whole) | swapped(known).map(lambda value: as_json(value).encode("utf-8", "surrogatepass")), st.integers(0, 7)
    )
    def check(content: bytes, number: int) -> None:
        ends[loaded(content, number == 41)] += 1

    check()
    assert ends["refused"] > 0, ends
    assert ends["right"] > 0, ends


LABELS = [{"layer": "1-res", "index": "3", "description": "a name"}, {"layer": "1-res", "index": 5, "description": "a verb"},
          {"layer": "1-res", "index": "3", "description": "another"}]  # fmt: skip
AS_FILES = {
    "JSON": lambda value: as_json(value).encode("utf-8", "surrogatepass"),
    "JSON Lines": lambda value: "\n".join(map(as_json, value if isinstance(value, list) else [value])).encode(
        "utf-8", "surrogatepass"
    ),
    "compressed": lambda value: gzip.compress(as_json(value).encode("utf-8", "surrogatepass"), mtime=0),
}


@pytest.mark.parametrize("form", AS_FILES)
def test_damaged_labels(form: str, tmp_path: Path) -> None:
    encode, path, sae, ends = AS_FILES[form], tmp_path / "labels", small().at(SITE), Counter[str]()

    def loaded(content: bytes) -> str:
        path.write_bytes(content)
        with harmless(tmp_path):
            found = clean(lambda: fp.load_labels(path, sae))
        if found is None:
            return "refused"
        text = (gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content).decode()
        entries = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
        expected: dict[int, str] = {}
        for entry in entries:
            expected.setdefault(int(entry["index"]), entry["description"].strip())
        assert {node.index: label for node, label in found.items()} == expected
        assert all(node == fp.feature(sae, node.index) for node in found)
        return "right"

    assert loaded(encode(LABELS)) == "right"

    @each(0.2)
    @given(damaged(encode(LABELS)) | swapped(LABELS).map(encode))
    def check(content: bytes) -> None:
        ends[loaded(content)] += 1

    check()
    assert ends["refused"] > 0, ends
    assert ends["right"] > 0, ends
