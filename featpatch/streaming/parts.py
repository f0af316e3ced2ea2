"""Storage of the effects of a block of pairs as two Parquet files, one with a row per node and pair, one with a row per pair.

A third file, such as `000003.sha256`, holds the digests of both and of `about.json`. It is written last, so a block is finished
if this file exists. `sha256sum -c *.sha256` in the folder verifies all blocks.
"""

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import pandas as pd
from pandas.api.types import is_float_dtype, is_integer_dtype, is_string_dtype

from featpatch.effects import Effects
from featpatch.errors import FeatpatchError
from featpatch.files import sha256, writing

FIELDS = ("site", "kind", "index", "position", "sae")
"""The columns that identify a node; the position is stored as JSON."""

TYPES = {"integers": is_integer_dtype, "numbers": is_float_dtype, "texts": is_string_dtype}
"""The tests of a column's type, by the name of the type in error messages."""

AGAIN = "expected a block of fp.stream_features; delete its .sha256 file and run it again"
"""The end of every error about a damaged block."""


def write(effects: Effects, folder: Path, block: int, first: int) -> None:
    """Write the three files of a block.

    Args:
        effects: the effects of the block's pairs.
        folder: the folder of the whole stream, with `about.json`.
        block: the number of the block.
        first: the index of the block's first pair among all pairs.
    """
    tables = {name: effects.metric(name) for name in effects.metrics}
    rows = pd.DataFrame({name: [getattr(node, name) for node in effects.nodes] for name in FIELDS})
    rows["position"] = [json.dumps(position) for position in rows["position"]]
    rows = rows.astype({name: "Int64" if name == "index" else "string" for name in FIELDS})
    entries = rows.iloc[effects.row].reset_index(drop=True)
    entries["pair"] = effects.pair + first
    pairs = pd.DataFrame({"pair": range(first, first + len(effects.clean))})
    for metric, table in tables.items():
        entries[f"denoised of {metric}"], entries[f"noised of {metric}"] = table.denoised, table.noised
        pairs[f"clean of {metric}"], pairs[f"corrupted of {metric}"] = table.clean, table.corrupted
    pairs["tags"] = [json.dumps(tags) for tags in effects.metadata.get("tags", [{}] * len(pairs))]
    pairs["digest"] = effects.metadata["pairs"]
    for kind, frame in (("effects", entries), ("pairs", pairs)):
        with writing(folder / name_of(kind, block)) as file:
            frame.to_parquet(file, index=False)
    names = ("about.json", name_of("effects", block), name_of("pairs", block))
    with writing(folder / digests_of(block)) as file:
        file.write_text("".join(f"{sha256((folder / name).read_bytes())}  {name}\n" for name in names))


def name_of(kind: str, block: int) -> str:
    """Return the path of a block's Parquet file of a kind, `effects` or `pairs`, relative to the folder."""
    return f"{kind}/{block:06d}.parquet"


def digests_of(block: int) -> str:
    """Return the name of the file of digests, whose presence marks a block as finished."""
    return f"{block:06d}.sha256"


def read(folder: Path, block: int, name: str) -> bytes:
    """Read a file of a finished block and verify its digest.

    Raises:
        FeatpatchError: the file is missing or damaged.
    """
    path = folder / name
    try:
        content = path.read_bytes()
        lines = (folder / digests_of(block)).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise FeatpatchError(f"{str(path)!r} can't be read ({error}): {AGAIN}") from error
    if f"{sha256(content)}  {name}" not in lines:
        raise FeatpatchError(f"{str(path)!r} does not match its SHA-256 in {digests_of(block)}: {AGAIN}")
    return content


def table(folder: Path, block: int, kind: str, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a block's Parquet file.

    Args:
        folder: the folder of the whole stream.
        block: the number of the block.
        kind: `effects` or `pairs`.
        columns: the names of the columns.

    Raises:
        FeatpatchError: the file is missing or damaged, or a column has the wrong type.
    """
    import pyarrow as pa

    path, content = folder / name_of(kind, block), read(folder, block, name_of(kind, block))
    try:
        found = pd.read_parquet(BytesIO(content), columns=list(columns))
    except (OSError, pa.ArrowException, KeyError, ValueError) as error:
        raise FeatpatchError(f"{str(path)!r} can't be read ({error}): {AGAIN}") from error
    for name in columns:
        expected = "integers" if name in ("pair", "index") else "numbers" if " of " in name else "texts"
        if not TYPES[expected](found[name]):
            raise FeatpatchError(f"{name!r} in {str(path)!r} is of type {found[name].dtype}: expected {expected}; {AGAIN}")
    return found
