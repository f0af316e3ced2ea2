"""A console that prints text as it is, without markup, and tables that fit its width."""

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from featpatch.untrusted import visible

WIDTH = 100
"""The width of the output if it does not go to a terminal, in characters."""


class PlainConsole(Console):
    """A console that shows text literally: brackets are not markup, and control characters are escaped.

    Args:
        stderr: whether to print to standard error.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        terminal = (sys.stderr if stderr else sys.stdout).isatty()
        super().__init__(width=None if terminal else WIDTH, stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string, including cells and titles of tables, with control characters escaped."""
        return super().render_str(visible(text), **options)


NARROW = 15
"""The number of characters that remain of a name that is cut off, at least."""

GAP = 1
"""The number of spaces after each column, beside that of the separator."""


@dataclass(frozen=True)
class Fitted:
    """A table whose cells are never wrapped: if the console is too narrow, columns are left out and then names are cut off.

    Attributes:
        title: the title, above the table.
        columns: the cells of each column, by header; the first columns hold names.
        numbers: the headers of the columns that are aligned on the right.
        spare: the headers of the columns that may be left out, in this order.
        legend: explanations of columns, by header, below the table.
        notes: further text below the table, one paragraph each.
    """

    title: str
    columns: Mapping[str, Sequence[str | Text]]
    numbers: Collection[str] = ()
    spare: Sequence[str] = ()
    legend: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text | Table]:
        """Yield the title, the table and the notes."""
        shown, left_out = {**self.columns}, []
        for header in self.spare:
            if self._excess(shown, options) > 0:
                del shown[header]
                left_out.append(_line(header))
        for header in [header for header in shown if header not in self.numbers]:
            width = max(NARROW, _width(header, shown[header]) - max(0, self._excess(shown, options)))
            shown[header] = [_cut(cell, width) for cell in shown[header]]
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP, 0, 0), collapse_padding=True)
        for header in shown:
            table.add_column(header, justify="right" if header in self.numbers else "left", no_wrap=True, vertical="bottom")
        for row in zip(*shown.values(), strict=True):
            table.add_row(*row)
        yield console.render_str(self.title, style="bold")
        yield table
        notes = [f"{_line(header)}: {text}" for header, text in self.legend.items() if header in shown]
        notes += [*self.notes, *([f"left out of this table for lack of space: {', '.join(left_out)}"] if left_out else [])]
        yield from (console.render_str(note, highlight=False) for note in notes)

    def _excess(self, shown: Mapping[str, Sequence[str | Text]], options: ConsoleOptions) -> int:
        """Return by how many characters these columns are wider than the console."""
        return sum(_width(header, cells) + GAP + 1 for header, cells in shown.items()) - GAP - 1 - options.max_width


def _line(header: str) -> str:
    """Return a header on one line."""
    return " ".join(header.split())


def _width(header: str, cells: Sequence[str | Text]) -> int:
    """Return the width of a column in characters."""
    return max(cell_len(visible(line)) for text in (header, *map(str, cells)) for line in text.split("\n"))


def _cut(cell: str | Text, width: int) -> str | Text:
    """Cut off a cell, with an ellipsis at its end."""
    text = visible(str(cell))
    return cell if cell_len(text) <= width else f"{text[: width - 1]}…"
