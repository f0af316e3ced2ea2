"""Storage of effects in safetensors files, never pickles: columns are tensors, and the header holds everything else as JSON.

The header also holds a SHA-256 of the content, so that a damaged file is refused instead of being read as different results.
Before anything is computed from a file, its content is checked.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from featpatch.effects.audit import without_estimates
from featpatch.effects.measured import Measured
from featpatch.errors import FeatpatchError, errors_about
from featpatch.files import read_json, writing
from featpatch.nodes import DIRECTIONS, EFFECTS, Edge, Node

MAX_METRIC, MIN_GAP = 1e100, 1e-100
"""Bounds on metric values and on the mean gap, so that no ratio of them overflows."""

FORMAT = "featpatch effects 2"
COLUMNS = ("clean", "corrupted", "row", "pair", "denoised", "noised")
VALUES = ("clean", "corrupted", "denoised", "noised")
"""The columns that are stored again for each further metric, under names such as `clean of prob`."""


def save(effects: Measured, path: Path) -> Path:
    """Write the file completely or not at all, and create its folder if it is missing.

    For rows that were taken from a larger table, two things are stored in addition: the number of ranked rows in that table, on
    which q-values depend, and after the rows themselves those of the whole activations at their hook points, on which quadrants
    depend and which `load` hides. An audit needs all rows, so it is not possible after loading taken rows.

    Raises:
        FeatpatchError: the effects could not be loaded again, or the file can't be written.
    """
    shown = len(effects)
    if effects.taken_from is not None:
        effects = _with_whole_activations(effects)
    metadata = {**effects.metadata, "metrics": effects.metrics}
    with errors_about("these effects can't be saved, because the file could not be loaded again"):
        for table in (effects, *effects.others.values()):
            check_columns({**vars(table), "metadata": metadata}, len(effects.nodes))
    if effects.taken_from is not None:
        metadata["rows_ranked"] = effects.rows_ranked
        metadata["shown_rows"] = shown
        metadata.pop("screening", None)
    header = {
        "format": FORMAT,
        "value": effects.value,
        "nodes": json.dumps([astuple(node) for node in effects.nodes]),
        "metadata": json.dumps(metadata, sort_keys=True),
    }
    columns: dict[str, Any] = {name: getattr(effects, name) for name in COLUMNS}
    for metric, other in effects.others.items():
        columns |= {f"{name} of {metric}": getattr(other, name) for name in VALUES}
    for metric, table in ((effects.metadata["metric"], effects), *effects.others.items()):
        columns |= {f"spread of {effect} of {metric}": values for effect, values in table.spread.items()}
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    with writing(path) as file:
        try:
            save_file(columns, file, metadata={**header, "sha256": _digest(header, columns)})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(str(error)) from error
    return path


def load(path: Path) -> list[dict[str, Any]]:
    """Read a file for `Effects.load`, which describes the errors, and return the fields of one `Effects` per metric."""
    if not path.is_file():
        raise FeatpatchError(f"there is no effects file {str(path)!r}: expected a file written by Effects.save; check the path")
    header: dict[str, str] = {}
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise FeatpatchError(f"its format is {header.get('format')!r}: expected {FORMAT!r}")
        if header.pop("sha256", None) != _digest(header, columns):
            raise ValueError("its contents do not match their SHA-256")
        nodes, metadata = nodes_of(read_json(header["nodes"])), read_json(header["metadata"])
        check_metadata(metadata, len(nodes))
        others = metadata["metrics"][1:]
        spreads: dict[str, dict[str, Any]] = {
            m: {e: columns.pop(name) for e in EFFECTS if (name := f"spread of {e} of {m}") in columns}
            for m in metadata["metrics"]
        }
        if set(columns) != {*COLUMNS, *(f"{v} of {m}" for m in others for v in VALUES)}:
            raise FeatpatchError(f"it has the columns {sorted(columns)}: expected those of {', '.join(metadata['metrics'])}")
        shared = {"nodes": nodes, "metadata": metadata, "value": header["value"], **{name: columns[name] for name in COLUMNS}}
        unscreened = {
            **metadata,
            **({"screening": without_estimates(metadata["screening"])} if "screening" in metadata else {}),
        }
        tables = [shared] + [
            {**shared, "metadata": {**unscreened, "metric": m}, **{v: columns[f"{v} of {m}"] for v in VALUES}} for m in others
        ]
        for table, (m, spread) in zip(tables, spreads.items(), strict=True):
            check_columns(table, len(nodes))
            if any(column.shape != (len(nodes),) or column.dtype != np.float64 for column in spread.values()):
                raise FeatpatchError(f"the spread of {m} does not fit: expected {len(nodes)} float64 values, one per row")
            noise = metadata.get("noise")
            if spread and not (isinstance(noise, dict) and _count(noise.get("draws"))):
                raise FeatpatchError(f"noise is {_short(noise)}: expected its number of draws")
            table["spread"] = spread
        return tables
    except (SafetensorError, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        what = "is damaged" if header.get("format") == FORMAT else "is damaged or holds no effects"
        raise FeatpatchError(
            f"{str(path)!r} {what} ({error}): expected a file written by Effects.save; check the path or save the effects again"
        ) from error


def _with_whole_activations(effects: Measured) -> Measured:
    """Add the rows of the whole activations at the rows' hook points and positions, if they are not among the rows."""
    places = {(node.site, node.position) for node in effects.nodes}
    shown = effects.rows_in_whole().tolist()
    more = [
        row
        for row, node in enumerate(effects.whole.nodes)
        if node.kind == "activation" and (node.site, node.position) in places
    ]
    return effects.whole.take([*shown, *sorted(set(more) - set(shown))])


def _digest(header: Mapping[str, str], columns: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the header and of the names, types, shapes and bytes of the columns."""
    total = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name, column in sorted(columns.items()):
        total.update(f"{name} {column.dtype} {column.shape}".encode())
        total.update(column.data)
    return total.hexdigest()


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
    """Check the type and value of the metadata that is used in computations, of a table with this number of rows.

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
    """Check that the columns have the right types, shapes and ranges for this number of rows, and that metadata fits the pairs.

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
            raise FeatpatchError(f"{name} ranges from {table[name].min()} to {table[name].max()}: expected 0 to {below - 1}")
    if len(np.unique(table["row"] * pairs + table["pair"])) < table["row"].size:
        raise FeatpatchError("a row and pair has several entries: expected one")
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
    shares = metadata.get("unit", "gap") == "gap"
    if not size <= MAX_METRIC or not pairs or (shares and abs((table["clean"] - table["corrupted"]).mean()) < MIN_GAP):
        raise FeatpatchError(
            f"values of {metadata['metric']} in {pairs} pairs are as large as {size:.3g}, or have no mean gap: expected "
            "smaller values and a mean gap other than zero"
        )
    for name in ("tags", "places", "lengths", "of_pairs"):
        if name in metadata and len(metadata[name]) != pairs:
            raise FeatpatchError(f"{name} has {len(metadata[name])} entries: expected {pairs}, one per pair")
    listed = metadata.get("positions")
    if isinstance(listed, list) and any(len(places) != len(listed) for places in metadata.get("places", [])):
        raise FeatpatchError(f"places of a pair do not have {len(listed)} entries: expected one per entry of positions")


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
    return _text(value) or (type(value) is int and abs(value) < 2**53)


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
    "unit": (lambda value: value in ("gap", "metric"), "gap or metric"),
    "positions": (lambda value: _text(value) or _list(_place)(value), "a string, or a list of labels and indices"),
    "components": (_list(_text), "a list of names"),
    "route": (_text, "a text"),
    "pairs": (_text, "a digest"),
    "model": (_model, "name and sha256"),
    "saes": (_texts, "digests by name"),
    "versions": (_texts, "versions by name"),
    "tags": (_list(_texts), "an object of strings per pair"),
    "places": (_list(_list(_count)), "a list of token positions per pair"),
    "tokens": (_list(_text), "the texts of tokens"),
    "sites": (_list(_text), "names of hook points"),
    "lengths": (_list(_count), "a number of tokens per pair"),
    "of_pairs": (_list(_count), "a list of indices"),
    "rows_ranked": (_count, "a number of rows"),
    "threshold": (lambda value: type(value) is float and 0 < value < 1, "a share between 0 and 1"),
    "shown_rows": (_count, "a number of rows"),
    "finished": (lambda value: isinstance(value, bool), "true or false"),
    "screening": (_screening, "the record written by rank_features(screen=...)"),
}
"""For each metadata entry, the test that it must pass and what to expect, in words."""


def _short(value: Any) -> str:
    return repr(value)[:60]
