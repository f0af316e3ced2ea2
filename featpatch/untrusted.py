"""Text of users and of foreign files, made harmless for the place where it is shown."""

from html import escape
from pathlib import PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "\n")
"""What a formula of a spreadsheet can begin with, also in full-width form."""


def visible(text: str) -> str:
    r"""For a terminal: characters that steer it, reorder text or can't be seen as `repr` writes them, such as `\x1b`.

    Line ends stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def in_figure(text: str) -> str:
    """For Plotly, which takes tags such as links in names, labels and texts for HTML."""
    return escape(text, quote=False)


def cell(value: object) -> object:
    """For a spreadsheet: text that it would take for a formula gets an apostrophe in front; anything else is as it was."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value


def for_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """A table none of whose texts a spreadsheet takes for a formula."""
    texts = frame.select_dtypes(exclude=["number", "bool"])
    return frame.assign(**{name: texts[name].map(cell) for name in texts}).rename(columns=cell)


def without_folder(name: str) -> str:
    """For files that are passed on: of a path in somebody's folders its last part; names on the hub are as they were."""
    for path in (PurePosixPath(name), PureWindowsPath(name)):
        if path.anchor or {"..", "~"} & set(path.parts):
            return path.name
    return name
