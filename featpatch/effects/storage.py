"""Effects on disk: columns as tensors of one safetensors file, the rest as JSON in its header. Never a pickle."""

import json
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from featpatch.effects.audit import without_estimates
from featpatch.effects.content import check_columns, check_metadata, nodes_of
from featpatch.errors import FeatpatchError
from featpatch.foreign import read_json

if TYPE_CHECKING:
    from featpatch.effects.effects import Effects

FORMAT = "featpatch effects 1"
COLUMNS = ("clean", "corrupted", "row", "pair", "denoised", "noised")
VALUES = ("clean", "corrupted", "denoised", "noised")
"""The columns that each further metric has, as `clean of prob`."""


def save(effects: "Effects", path: Path) -> Path:
    """Writes the file; the folder is made where it is missing.

    Of rows that were taken from a larger table the number of ranked rows there is noted, so that q-values still count them; an
    audit needs all rows, and is no longer possible.
    """
    metadata = {**effects.metadata, "metrics": effects.metrics}
    if effects.taken_from is not None:
        metadata["rows_ranked"] = effects.rows_ranked
        metadata.pop("screening", None)
    header = {
        "format": FORMAT,
        "value": effects.value,
        "nodes": json.dumps([astuple(node) for node in effects.nodes]),
        "metadata": json.dumps(metadata, sort_keys=True),
    }
    columns = {name: getattr(effects, name) for name in COLUMNS}
    for metric, other in effects.others.items():
        columns |= {f"{name} of {metric}": getattr(other, name) for name in VALUES}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: np.ascontiguousarray(column) for name, column in columns.items()}, path, metadata=header)
    return path


def load(path: Path) -> list[dict[str, Any]]:
    """The fields of the `Effects` of each metric.

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
