"""The command-line program, its console and its error handling.

Exit codes are 0 for success, 1 for a failed check, 2 for bad input and 130 for an interruption.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import typer
from typer.core import TyperGroup

from featpatch.console import PlainConsole
from featpatch.errors import FeatpatchError
from featpatch.untrusted import visible

PANELS = START, RANK, INSPECT, SCALE = "Start here", "Rank", "Inspect", "Scale"
"""The groups of commands in the help of the program, in this order."""


class Program(TyperGroup):
    """The group of all commands, which escapes control characters in Typer's own error messages too."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands, group by group."""
        return sorted(super().list_commands(ctx), key=lambda name: PANELS.index(cast(Any, self.commands[name]).rich_help_panel))

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Parse the options of the program itself."""
        with _visible_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Parse the options of a command, and run it."""
        with _visible_errors():
            return super().invoke(ctx)


@contextmanager
def _visible_errors() -> Iterator[None]:
    """Escape control characters in the messages of Typer's exceptions that are raised within the context."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):
            message = visible(error.format_message())
            error.format_message = lambda: message
        raise


INTERRUPTED = 130
"""The exit code of a command that was interrupted by Ctrl-C, the same as in shells."""

app = typer.Typer(
    name="featpatch", cls=Program, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="Which SAE features cause this behaviour? Exact causal ranking, in both directions.",
)  # fmt: skip


def console(*, json: bool = False) -> PlainConsole:
    """Return the console for tables, or for notes on standard error if JSON goes to standard output."""
    return PlainConsole(stderr=json)


def bars(*, json: bool) -> bool:
    """Return whether progress bars are shown: on a terminal, without JSON."""
    return not json and sys.stderr.isatty()


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a FeatpatchError within the context into one line and exit code 2, and an interruption into exit code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        PlainConsole(stderr=True).print("interrupted", style="yellow")
        raise typer.Exit(INTERRUPTED) from error
    except FeatpatchError as error:
        PlainConsole(stderr=True).print(f"error: {error}", style="red", highlight=False)
        raise typer.Exit(2) from error
