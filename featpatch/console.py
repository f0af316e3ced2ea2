"""A console that prints text as it is, without markup, and the notice that a sweep takes long."""

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

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
