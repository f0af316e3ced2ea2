"""Checks that the content of a file is a valid table of effects, before anything is computed from it."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from featpatch.errors import FeatpatchError
from featpatch.patch import DIRECTIONS, EFFECTS, Edge, Node

MAX_METRIC, MIN_GAP = 1e100, 1e-100
"""Bounds on metric values and on the mean gap, so that no ratio of them overflows."""


def nodes_of(content: Any) -> tuple[Node, ...]:
    """Parse a list of nodes.

    Raises:
        FeatpatchError: an entry is not a node, or a node occurs twice.
    """
    if not isinstance(content, list):
        raise FeatpatchError(f"nodes are {_short(content)}: expected a list")
    nodes = tuple(map(_node, content))
    if len(set(nodes)) < len(nodes):
        raise FeatpatchError(f"{len(nodes) - len(set(nodes))} of {len(nodes)} nodes are duplicates: expected each node once")
    return nodes


def check_metadata(metadata: Any, rows: int) -> None:
    """Check the type and value of every metadata entry that is used in computations; other entries are only shown.

    Args:
        rows: the number of nodes.

    Raises:
        FeatpatchError: an entry is not valid, or a required one is missing.
    """
    if not isinstance(metadata, dict):
        raise FeatpatchError(f"metadata is {_short(metadata)}: expected an object")
    for name, (fits, expected) in METADATA.items():
        if (name in metadata or name in NEEDED) and not fits(metadata.get(name)):
            raise FeatpatchError(f"{name} is {_short(metadata.get(name))}: expected {expected}")
    if metadata["metrics"][0] != metadata["metric"]:
        raise FeatpatchError(f"metric is {metadata['metric']!r}: expected the first of {metadata['metrics']}")
    for effect, values in metadata.get("screening", {}).get("estimates", {}).items():
        if len(values) != rows:
            raise FeatpatchError(f"there are {len(values)} estimates of {effect}: expected {rows}, one per row")
    if metadata.get("shown_rows", 0) > rows:
        raise FeatpatchError(f"shown_rows is {metadata['shown_rows']}: expected at most {rows}, the number of rows")


def check_columns(table: Mapping[str, Any], rows: int) -> None:
    """Check that the columns have the right types, shapes and ranges, and that the metadata fits the number of pairs.

    Args:
        rows: the number of nodes.

    Raises:
        FeatpatchError: a column is not valid, an entry occurs twice, or a value that should be finite is not.
    """
    metadata, pairs = table["metadata"], table["clean"].size
    for names, size in ((("clean", "corrupted"), pairs), (("row", "pair", "denoised", "noised"), table["row"].size)):
        for name in names:
            kind = np.int64 if name in ("row", "pair") else np.float64
            column = table[name]
            if column.dtype != kind or column.shape != (size,):
                raise FeatpatchError(f"{name} is {column.dtype} {column.shape}: expected {np.dtype(kind)} ({size},)")
    for name, below in (("row", rows), ("pair", pairs)):
        if table[name].size and not 0 <= table[name].min() <= table[name].max() < below:
            raise FeatpatchError(f"{name} goes from {table[name].min()} to {table[name].max()}: expected 0 to {below - 1}")
    if len(np.unique(table["row"] * pairs + table["pair"])) < table["row"].size:
        raise FeatpatchError("there are several entries for one row and pair: expected one")
    runs = {"denoising": table["denoised"], "noising": table["noised"]}
    for direction, column in runs.items():
        run = direction in metadata["directions"]
        wrong = int((~np.isfinite(column) if run else ~np.isnan(column)).sum())
        if wrong and not (run and metadata.get("finished") is False):
            expected = "all of them in a finished table" if run else "none in a direction that was not run"
            raise FeatpatchError(
                f"{wrong} of {column.size} values of {direction} are {'not ' if run else ''}finite: expected {expected}"
            )
    known = [column[~np.isnan(column)] for column in runs.values()]
    size = np.abs(np.concatenate([table["clean"], table["corrupted"], *known])).max(initial=0)
    if not size <= MAX_METRIC or not pairs or abs((table["clean"] - table["corrupted"]).mean()) < MIN_GAP:
        raise FeatpatchError(
            f"values of {metadata['metric']} in {pairs} pairs are as large as {size:.3g}: expected finite values and a "
            "mean gap that is not zero"
        )
    for name in ("tags", "of_pairs"):
        if name in metadata and len(metadata[name]) != pairs:
            raise FeatpatchError(f"{name} has {len(metadata[name])} entries: expected {pairs}, one per pair")


def _node(values: Any) -> Node:
    """Parse a node from its 5 fields, or an edge from 7, of which the last two hold the fields of its sender and receiver.

    Raises:
        FeatpatchError: the fields are not those of a node or an edge.
    """
    if not isinstance(values, list) or len(values) not in (5, 7):
        raise FeatpatchError(f"a node is {_short(values)}: expected its 5 fields, or the 7 of an edge")
    site, kind, index, position, sae, *ends = values
    fit = _text(site) and _text(kind) and (index is None or _count(index)) and _place(position) and _text(sae)
    if not fit or (kind == "edge") != bool(ends):
        raise FeatpatchError(f"a node is {_short(values)}: expected site, kind, index, position and SAE")
    return Edge(site, kind, index, position, sae, *map(_node, ends)) if ends else Node(site, kind, index, position, sae)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _count(value: Any) -> bool:
    """Return whether a value is a non-negative integer that a float represents exactly, so that nothing overflows."""
    return type(value) is int and 0 <= value < 2**53


def _place(value: Any) -> bool:
    return _text(value) or _count(value)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _list(fits: Callable[[Any], bool], least: int = 0) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and len(value) >= least and all(map(fits, value))


def _names(value: Any) -> bool:
    return _list(_text, 1)(value) and len(set(value)) == len(value)


def _model(value: Any) -> bool:
    return _texts(value) and {"name", "sha256"} <= set(value)


def _screening(value: Any) -> bool:
    """Return whether a value holds the entries that an audit and the summary of hook points read."""
    if not isinstance(value, dict) or not all(_count(value.get(name)) for name in ("k", "sampled", "candidates", "looks")):
        return False
    changed, estimates = value.get("changed_features"), value.get("estimates", {})
    return (
        value["k"] > 0
        and value["looks"] > 0
        and value["k"] + value["sampled"] <= value["candidates"]
        and _list(lambda one: _list(_place, 4)(one) and len(one) == 4 and _text(one[0]) and _text(one[1]) and _count(one[3]))(
            changed
        )
        and _columns(estimates)
    )


def _columns(value: Any) -> bool:
    """Return whether a value is an object that holds a list of numbers for each effect."""
    return (
        isinstance(value, dict)
        and set(value) <= set(EFFECTS)
        and all(_list(lambda one: type(one) is float and abs(one) < MAX_METRIC)(column) for column in value.values())
    )


NEEDED = ("metric", "metrics", "directions")

METADATA: dict[str, tuple[Callable[[Any], bool], str]] = {
    "metric": (_text, "a name"),
    "metrics": (_names, "names of metrics, each once"),
    "directions": (lambda value: _names(value) and set(value) <= set(DIRECTIONS), f"some of {', '.join(DIRECTIONS)}"),
    "positions": (lambda value: _text(value) or _list(_place)(value), "a text, or a list of labels and indices"),
    "components": (_list(_text), "a list of names"),
    "route": (_text, "a text"),
    "pairs": (_text, "a digest"),
    "model": (_model, "name and sha256"),
    "saes": (_texts, "digests by name"),
    "versions": (_texts, "versions by name"),
    "tags": (_list(_texts), "an object of texts per pair"),
    "of_pairs": (_list(_count), "a list of indices"),
    "rows_ranked": (_count, "a number of rows"),
    "threshold": (lambda value: type(value) is float and 0 < value < 1, "a share between 0 and 1"),
    "shown_rows": (_count, "a number of rows"),
    "finished": (lambda value: isinstance(value, bool), "true or false"),
    "screening": (_screening, "what rank_features(exact='screened') notes"),
}
"""For each metadata entry, the test that it must pass and what to expect, in words."""


def _short(value: Any) -> str:
    return repr(value)[:60]
