"""Effects while they come in, patch by patch; one row per node, in order of appearance."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpatch.effects.effects import Effects
from featpatch.patch import DIRECTIONS, Direction, Node
from featpatch.untrusted import without_folder


@dataclass(frozen=True)
class Collector:
    """Gathers the metric values of patched runs.

    Attributes:
        metrics: their names, in the order of the columns.
    """

    metrics: tuple[str, ...]
    rows: dict[Node, int] = field(default_factory=dict)
    row: list[int] = field(default_factory=list)
    pair: list[int] = field(default_factory=list)
    values: dict[Direction, list[NDArray[np.float64]]] = field(default_factory=lambda: {d: [] for d in DIRECTIONS})

    def add(self, pair: int, nodes: Sequence[Node], values: Mapping[Direction, NDArray[np.float64]]) -> None:
        """The values `[nodes, metrics]` of some nodes in one pair, for the directions that were run."""
        self.row.extend(self.rows.setdefault(node, len(self.rows)) for node in nodes)
        self.pair.extend([pair] * len(nodes))
        for direction, column in self.values.items():
            column.append(values.get(direction, np.full((len(nodes), len(self.metrics)), np.nan)))

    def effects(
        self, clean: NDArray[np.float64], corrupted: NDArray[np.float64], metadata: Mapping[str, Any], value: str = "exact"
    ) -> Effects:
        """The first metric's table, with command and time; the others are in it. Clean and corrupted are `[pairs, metrics]`."""
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
    """Return the command that is running: featpatch's own with its options, of other programs only the name.

    Folders and the address of a cluster are removed. Arguments of other programs may hold passwords and tokens.
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
