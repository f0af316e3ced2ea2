"""Functions that make text from users, files and other libraries safe for terminals, figures, spreadsheets and errors."""

import re
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

FORMULAS = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20", "\t", "\r", "\n")
"""The characters that a spreadsheet formula can begin with, also in full-width form."""

UNSAFE_ADVICE = re.compile(
    "weights_only|trust_remote_code|ignore_mismatched_sizes|use_safetensors|allow_pickle=True|safe_globals"
    "|trust the source|trusted source|arbitrary code|two options"
)
"""A pattern for sentences in which other libraries advise to run code from a file or to ignore what is wrong with it."""


def visible(text: str) -> str:
    r"""Escape characters that control a terminal, reorder text or are invisible, as `repr` does (`\x1b`); keep line ends."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text)


def in_figure(text: str) -> str:
    """Escape HTML in text for a Plotly figure, which would otherwise render tags such as links."""
    return escape(text, quote=False)


def for_spreadsheets(frame: "pd.DataFrame") -> "pd.DataFrame":
    """Return a copy of a table in which texts that a spreadsheet would take for formulas begin with an apostrophe."""
    texts = frame.select_dtypes(exclude=["number", "bool"])
    return frame.assign(**{name: texts[name].map(_cell) for name in texts}).rename(columns=_cell)


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULAS) else value


def short(error: Exception) -> str:
    """Return the message of another library's exception on one line of at most 300 characters, without unsafe advice."""
    sentences = re.split(r"(?<=[.!?])\s+", " ".join(str(error).split()))
    return " ".join(each for each in sentences if not UNSAFE_ADVICE.search(each))[:300]
