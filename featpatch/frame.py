"""Pandas tables that print all of their columns."""

from bisect import bisect
from functools import cache
from shutil import get_terminal_size
from typing import Any

import numpy as np
import pandas as pd

from featpatch.untrusted import visible

WIDTH, LINES, ROWS = 160, 24, 20
"""The largest numbers of characters per line, of lines (more if the terminal is narrower) and of rows of a printed table."""


class Frame(pd.DataFrame):  # type: ignore[misc]  # pandas has no types here
    """A pandas DataFrame that prints all of its columns, with intervals next to their values."""

    @property
    def _constructor(self) -> type["Frame"]:
        return Frame

    def __repr__(self) -> str:
        return text(self, "; to_string() shows them")


def text(frame: pd.DataFrame, hint: str = "") -> str:
    """Format the first rows of a table with all columns, in several blocks if too long; a hint follows the number of others.

    `x`, `x_low` and `x_high` become one column; a cell is empty if its value is unknown or does not apply to the row.
    """
    if not len(frame):
        return "no rows" + f"; columns {', '.join(map(str, frame.columns))}" * bool(len(frame.columns))
    width = min(WIDTH, get_terminal_size((WIDTH, LINES)).columns)
    if not frame.columns.is_unique:
        return visible(frame.head(ROWS).to_string(line_width=width))
    shown, names = frame.head(ROWS), [str(name) for name in frame.columns]
    cells = {name: [_cell(value) for value in shown.iloc[:, column]] for column, name in enumerate(names)}
    for name in [name for name in names if {f"{name}_low", f"{name}_high"} <= set(names)]:
        low, high = cells.pop(f"{name}_low"), cells.pop(f"{name}_high")
        cells[name] = [f"{of} [{a}, {b}]" if a and b else of for of, a, b in zip(cells[name], low, high, strict=True)]
    table = pd.DataFrame(cells, index=shown.index)
    plain = isinstance(frame.index, pd.RangeIndex)

    @cache
    def lines(rows: int) -> list[str]:
        return table.head(rows).to_string(index=not plain, line_width=width).splitlines()

    rows = len(table)
    most = LINES * WIDTH // width
    if len(lines(rows)) > most:  # more rows need more lines
        rows = max(1, bisect(range(1, rows), most, key=lambda fewer: len(lines(fewer))))
    more = [f"... {len(frame) - rows:,} more rows{hint}"] if len(frame) > rows else []
    return visible("\n".join([*lines(rows), *more]))


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value + 0.0:.3g}" if isinstance(value, float) else str(value)
