"""The one way to a terminal: what is printed is text, not markup."""

import sys
from typing import Any

from rich.console import Console
from rich.text import Text

from featpatch.untrusted import visible


class PlainConsole(Console):
    """A console that shows text as it is: brackets mean nothing, and characters that would steer the terminal are visible.

    Args:
        stderr: whether it prints to standard error.
        width: of the lines where standard output is no terminal.
    """

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(width=None if sys.stdout.isatty() else width, stderr=stderr, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """As rich does for whatever it is given as a string, cells and titles of tables too."""
        return super().render_str(visible(text), **options)
