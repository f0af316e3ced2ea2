"""A console that prints text as it is, without markup."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from featpatch.untrusted import visible


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
