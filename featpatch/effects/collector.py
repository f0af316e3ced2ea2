"""Collection of metric values into a table of effects, with one row per node, and of what the values depend on."""

import hashlib
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

import featpatch
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError
from featpatch.model.lens import Lens
from featpatch.nodes import DIRECTIONS, Direction, Effect, Node
from featpatch.pairs.pair import Positions, Wanted
from featpatch.pairs.pairs import Pairs


@dataclass(frozen=True)
class Collector:
    """A collector of the metric values of patched runs.

    Attributes:
        metrics: the names of the metrics, in the order of the columns.
        rows: the row of each node.
        row, pair: the row and the pair of each entry.
        values: for each direction, arrays `[nodes, metrics]` in the order in which they were added.
    """

    metrics: tuple[str, ...]
    rows: dict[Node, int] = field(default_factory=dict)
    row: list[int] = field(default_factory=list)
    pair: list[int] = field(default_factory=list)
    values: dict[Direction, list[NDArray[np.float64]]] = field(default_factory=lambda: {d: [] for d in DIRECTIONS})

    def add(self, pair: int, nodes: Sequence[Node], values: Mapping[Direction, NDArray[np.float64]]) -> None:
        """Add the values `[nodes, metrics]` of some nodes in one pair, for the directions that were run."""
        self.row.extend(self.rows.setdefault(node, len(self.rows)) for node in nodes)
        self.pair.extend([pair] * len(nodes))
        for direction, column in self.values.items():
            column.append(values.get(direction, np.full((len(nodes), len(self.metrics)), np.nan)))

    def effects(
        self, clean: NDArray[np.float64], corrupted: NDArray[np.float64], metadata: Mapping[str, Any], value: str = "exact"
    ) -> Effects:
        """Return the table of the first metric, which holds those of the other metrics, with command and time as metadata.

        Args:
            clean, corrupted: the metrics of the unpatched runs, `[pairs, metrics]`.
            metadata: further metadata of the table.
            value: `"exact"` or `"estimate"`.
        """
        nodes, row, pair = tuple(self.rows), np.array(self.row, dtype=np.int64), np.array(self.pair, dtype=np.int64)
        none = np.zeros((0, len(self.metrics)))
        denoised, noised = (np.concatenate([none, *self.values[direction]]) for direction in DIRECTIONS)
        made = {"command": _command(), "finished_at": datetime.now(timezone.utc).isoformat(timespec="seconds")}
        tables = {
            metric: Effects(
                nodes=nodes,
                clean=clean[:, column],
                corrupted=corrupted[:, column],
                row=row,
                pair=pair,
                denoised=denoised[:, column],
                noised=noised[:, column],
                metadata={**metadata, **made, "metric": metric},
                value=value,
            )
            for column, metric in enumerate(self.metrics)
        }
        first = tables.pop(self.metrics[0])
        return replace(first, others=tables)


def _command() -> str:
    """Return the command that is running: with options if it is featpatch, else only the name of the program.

    Folders and the address of a cluster are removed. The options of other programs are left out, because they may hold
    passwords and tokens.
    """
    program = Path(sys.argv[0])
    if program.stem != "featpatch" and program.parts[-2:] != ("featpatch", "__main__.py"):
        return program.name
    kept: list[str] = []
    for argument in sys.argv[1:]:
        option, equals, value = argument.partition("=") if argument.startswith("--") else ("", "", argument)
        hidden = "--address" in (option if equals else "", *kept[-1:])
        kept.append(option + equals + ("..." if hidden else without_folder(value)))
    return shlex.join(["featpatch", *kept])


def averaged(tables: Sequence[Effects], about: Mapping[str, Any]) -> Effects:
    """Average tables of the same pairs and metrics over draws of noise; an entry that a table lacks has no effect there.

    Args:
        tables: one table per draw, at least two.
        about: metadata in which the average differs from the first table.
    """
    first, pairs = tables[0], len(tables[0].clean)
    nodes = tuple(dict.fromkeys(node for table in tables for node in table.nodes))
    number = {node: row for row, node in enumerate(nodes)}
    rows = [np.array([number[node] for node in table.nodes], dtype=np.int64) for table in tables]
    keys = [row[table.row] * pairs + table.pair for row, table in zip(rows, tables, strict=True)]
    every = np.unique(np.concatenate(keys))
    row, pair = np.divmod(every, pairs)
    denoised, noised = [], []
    for table, key in zip(tables, keys, strict=True):
        run = table.directions_run()
        denoised.append(np.where("recovery" in run, table.corrupted, np.nan)[pair])
        noised.append(np.where("degradation" in run, table.clean, np.nan)[pair])
        at = np.searchsorted(every, key)
        denoised[-1][at], noised[-1][at] = table.denoised, table.noised
    spread: dict[Effect, NDArray[np.float64]] = {}
    for effect in first.directions_run():
        pooled = np.zeros((len(tables), len(nodes)))
        for draw, (of_table, table) in enumerate(zip(rows, tables, strict=True)):
            pooled[draw, of_table] = table.pooled(effect)
        spread[effect] = pooled.std(0, ddof=1)
    return replace(
        first,
        nodes=nodes,
        clean=np.mean([table.clean for table in tables], 0),
        corrupted=np.mean([table.corrupted for table in tables], 0),
        row=row,
        pair=pair,
        denoised=np.mean(denoised, 0),
        noised=np.mean(noised, 0),
        metadata={**first.metadata, **about, "metric": first.metadata["metric"]},
        spread=spread,
        others={name: averaged([table.for_metric(name) for table in tables], about) for name in first.others},
    )


def concatenated(tables: Sequence[Effects]) -> Effects:
    """Concatenate the rows of tables that are about the same pairs and metrics and have no row in common."""
    first = tables[0]
    starts = np.cumsum([0, *(len(table) for table in tables[:-1])])
    return replace(
        first,
        nodes=tuple(node for table in tables for node in table.nodes),
        row=np.concatenate([table.row + start for table, start in zip(tables, starts, strict=True)]),
        pair=np.concatenate([table.pair for table in tables]),
        denoised=np.concatenate([table.denoised for table in tables]),
        noised=np.concatenate([table.noised for table in tables]),
        taken_from=None,
        others={name: concatenated([table.for_metric(name) for table in tables]) for name in first.others},
    )


def provenance(lens: Lens, pairs: Pairs) -> dict[str, Any]:
    """Return what results depend on, as plain data.

    These are digests of the pairs, of the model's weights and of this library's code, the tags of pairs if there are any, and
    versions of packages.
    """
    tags = {"tags": [dict(pair.tags) for pair in pairs]} if any(pair.tags for pair in pairs) else {}
    versions = {name: version(name) for name in ("featpatch", "torch", "sae-lens", "transformer-lens")}
    return {
        "pairs": pairs.digest(),
        **tags,
        "model": {"name": without_folder(lens.name), "sha256": lens.digest()},
        "versions": {**versions, "featpatch's code": code_digest()},
    }


def check_saes(effects: Effects, digests: Mapping[str, str]) -> None:
    """Raise a FeatpatchError unless each SAE, given by its name and digest, is one of those of a table."""
    known = effects.metadata.get("saes", {})
    if strange := next((name for name, digest in digests.items() if known.get(name) != digest), None):
        raise FeatpatchError(
            f"the SAE {strange!r} differs from that of the effects: expected some of {', '.join(known)}, with the same "
            "weights; pass the SAEs that were ranked"
        )


def measured_places(
    lens: Lens, pairs: Pairs, positions: Positions, wanted: Sequence[Wanted], sites: Iterable[str]
) -> dict[str, Any]:
    """Return where a table of effects is measured, as plain data, so that a node without a row is known to be unchanged.

    Args:
        positions: the positions that were asked for.
        wanted: for each pair, the token positions that each of them stands for.
        sites: the hook points that are patched.

    Returns:
        `positions` and `sites`; unless positions are `"all"`, `places` with a list per pair: for `"each"` its token positions,
        for a list the first token of each entry; and `tokens`, the text of each token if all clean prompts are the same.
    """
    places = {} if positions == "all" else {"places": [[span[0] for span in of_pair.values()] for of_pair in wanted]}
    decode = getattr(lens.tokenizer, "decode", None)
    one = decode is not None and all(pair.clean == pairs[0].clean for pair in pairs)
    tokens = {"tokens": [decode([token]) for token in pairs[0].clean]} if one and decode is not None else {}
    listed = positions if isinstance(positions, str) else [*wanted[0]]
    return {"positions": listed, "sites": list(dict.fromkeys(sites)), **places, **tokens}


@cache
def code_digest() -> str:
    """Return the SHA-256 of the modules of this package, with their names."""
    package, total = Path(featpatch.__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        total.update(f"{path.relative_to(package).as_posix()}\n".encode() + path.read_bytes())
    return total.hexdigest()


def without_folder(name: str) -> str:
    """Reduce a local path to its last part, for files that are passed on; keep a name on the hub."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or {"..", "~"} & set(path.parts):
            return path.name
    return name
