"""Concatenation of tables of effects."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from featpatch.effects.effects import Effects


def joined(tables: "Sequence[Effects]") -> "Effects":
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
        others={name: joined([table.others[name] for table in tables]) for name in first.others},
    )
