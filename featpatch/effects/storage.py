"""Storage of effects in safetensors files, never pickles: columns are tensors, and the header holds everything else as JSON.

The header also holds a SHA-256 of the content, so that a damaged file is refused instead of being read as different results.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from featpatch.effects.audit import without_estimates
from featpatch.effects.content import check_columns, check_metadata, nodes_of
from featpatch.errors import FeatpatchError
from featpatch.files import read_json, writing

if TYPE_CHECKING:
    from featpatch.effects.effects import Effects

FORMAT = "featpatch effects 2"
COLUMNS = ("clean", "corrupted", "row", "pair", "denoised", "noised")
VALUES = ("clean", "corrupted", "denoised", "noised")
"""The columns that are stored again for each further metric, under names such as `clean of prob`."""


def save(effects: "Effects", path: Path) -> Path:
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
    try:
        for table in (effects, *effects.others.values()):
            check_columns({**vars(table), "metadata": metadata}, len(effects.nodes))
    except FeatpatchError as error:
        raise FeatpatchError(f"these effects can't be saved, since they could not be loaded again: {error}") from error
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
    columns = {name: np.ascontiguousarray(column) for name, column in columns.items()}
    with writing(path) as file:
        try:
            save_file(columns, file, metadata={**header, "sha256": _digest(header, columns)})
        except SafetensorError as error:  # a full disk, for example
            raise OSError(str(error)) from error
    return path


def _with_whole_activations(effects: "Effects") -> "Effects":
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


def load(path: Path) -> list[dict[str, Any]]:
    """Read a file and return the fields of one `Effects` per metric.

    Raises:
        FeatpatchError: the file is missing, damaged or not a table of effects.
    """
    if not path.is_file():
        raise FeatpatchError(f"there is no effects file {str(path)!r}: give a path that Effects.save wrote")
    try:
        with safe_open(path, "numpy") as file:
            header = file.metadata() or {}
            columns = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if header.get("format") != FORMAT:
            raise FeatpatchError(f"{str(path)!r} has format {header.get('format')!r}: expected {FORMAT!r}")
        if header.pop("sha256", None) != _digest(header, columns):
            raise ValueError("its content does not match its SHA-256")
        nodes, metadata = nodes_of(read_json(header["nodes"])), read_json(header["metadata"])
        check_metadata(metadata, len(nodes))
        others = metadata["metrics"][1:]
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
        for table in tables:
            check_columns(table, len(nodes))
        return tables
    except (SafetensorError, OSError, KeyError, AttributeError, TypeError, ValueError) as error:
        raise FeatpatchError(f"{str(path)!r} is damaged ({error}): expected a file that Effects.save wrote") from error
