"""Plain text for terminals: a console without markup, tables with all of their columns, and notices that a sweep takes long."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.text import Text
from tqdm.auto import tqdm

from featpatch.untrusted import visible

LONG = 60.0
"""The number of remaining seconds from which a sweep is announced."""
READ = 0.01
"""The number of seconds below which a batch was probably read from a journal and not run."""


class PlainConsole(Console):
    """A console that shows text literally: brackets are not markup, and control characters are escaped.

    Args:
        stderr: whether to print to standard error.
        width: the line width if standard output is not a terminal.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(width=None if sys.stdout.isatty() else width, stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string, including cells and titles of tables, with control characters escaped."""
        return super().render_str(visible(text), **options)


def announcing(bar: "tqdm[Any]") -> Callable[[int], None]:
    """Return a function that updates a progress bar batch by batch and, for a long sweep, says once how much time is left.

    The estimate is made after the first batch that is run. The first call is for patches that need no batch.
    """
    last, told = None, False

    def done(items: int) -> None:
        nonlocal last, told
        now = time.monotonic()
        bar.update(items)
        if not told and last is not None and items and now - last > READ:
            told, left = True, (bar.total - bar.n) / items * (now - last)
            if left > LONG and not bar.disable:
                about = timedelta(seconds=round(left))
                bar.write(
                    f"{bar.total:,} {bar.unit}es in total, about {about} left (estimated from the first batch)", file=sys.stderr
                )
        last = now

    return done


WIDTH, LINES, ROWS = 160, 24, 20
"""The largest numbers of characters per line, of lines and of rows of a printed table."""


class Frame(pd.DataFrame):  # type: ignore[misc]  # pandas has no types here
    """A pandas DataFrame that prints all of its columns, with intervals next to their values."""

    @property
    def _constructor(self) -> type["Frame"]:
        return Frame

    def __repr__(self) -> str:
        return text(self)


def text(frame: pd.DataFrame) -> str:
    """Format the first rows of a table with all columns, in several blocks if the lines would be too long.

    `x`, `x_low` and `x_high` become one column; a cell is empty if its value is unknown or does not apply to the row.
    """
    if not len(frame):
        return f"no rows; columns {', '.join(map(str, frame.columns))}"
    if not frame.columns.is_unique:
        return visible(frame.head(ROWS).to_string(line_width=WIDTH))
    shown, names = frame.head(ROWS), [str(name) for name in frame.columns]
    cells = {name: [_cell(value) for value in shown.iloc[:, column]] for column, name in enumerate(names)}
    for name in [name for name in names if {f"{name}_low", f"{name}_high"} <= set(names)]:
        low, high = cells.pop(f"{name}_low"), cells.pop(f"{name}_high")
        cells[name] = [f"{of} [{a}, {b}]" if a and b else of for of, a, b in zip(cells[name], low, high, strict=True)]
    table = pd.DataFrame(cells, index=shown.index)
    plain = isinstance(frame.index, pd.RangeIndex)

    def lines(rows: int) -> list[str]:
        return table.head(rows).to_string(index=not plain, line_width=WIDTH).splitlines()

    rows = next((rows for rows in range(len(table), 1, -1) if len(lines(rows)) <= LINES), 1)
    more = [f"... {len(frame) - rows:,} more rows"] if len(frame) > rows else []
    return visible("\n".join([*lines(rows), *more]))


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return ""
    return f"{value + 0.0:.3g}" if isinstance(value, float) else str(value)
