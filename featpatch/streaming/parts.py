"""Effects of a block of pairs as two Parquet files: one row per node and pair, one row per pair."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from featpatch.effects import Effects
from featpatch.patch import Node

FIELDS = ("site", "kind", "index", "position", "sae")
"""A node's columns; its position is JSON."""


def write(effects: Effects, folder: Path, block: int, first: int) -> None:
    """Both files, the one of the pairs last: a block is finished where that is there.

    Args:
        first: the number of the block's first pair among all pairs.
    """
    tables = {name: effects.metric(name) for name in effects.metrics}
    rows = pd.DataFrame({name: [getattr(node, name) for node in effects.nodes] for name in FIELDS})
    rows["index"] = rows["index"].astype("Int64")
    rows["position"] = [json.dumps(position) for position in rows["position"]]
    entries = rows.iloc[effects.row].reset_index(drop=True)
    entries["pair"] = effects.pair + first
    pairs = pd.DataFrame({"pair": range(first, first + len(effects.clean))})
    for metric, table in tables.items():
        entries[f"denoised of {metric}"], entries[f"noised of {metric}"] = table.denoised, table.noised
        pairs[f"clean of {metric}"], pairs[f"corrupted of {metric}"] = table.clean, table.corrupted
    pairs["tags"] = [json.dumps(tags) for tags in effects.metadata.get("tags", [{}] * len(pairs))]
    pairs["digest"] = effects.metadata["pairs"]
    for kind, frame in (("effects", entries), ("pairs", pairs)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        unfinished = folder / kind / f"{block:06d}.unfinished"
        frame.to_parquet(unfinished, index=False)
        os.replace(unfinished, path_of(folder, kind, block))


def path_of(folder: Path, kind: str, block: int) -> Path:
    """Of one of a block's files."""
    return folder / kind / f"{block:06d}.parquet"


def node_of(row: Any) -> Node:
    """From a row with a node's columns."""
    index = None if pd.isna(row.index_) else int(row.index_)
    return Node(row.site, row.kind, index, json.loads(row.position), row.sae)
