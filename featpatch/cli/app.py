"""The program, its console and its errors. Exit codes: 0 done, 1 a check failed, 2 unusable input, 130 interrupted."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from featpatch.console import PlainConsole
from featpatch.errors import FeatpatchError
from featpatch.untrusted import visible


class Program(TyperGroup):
    """The commands; what Typer says of options that it refuses is shown as all other text is."""

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        """Options of the program itself are read here."""
        with _visible_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        """Options of a command are read here."""
        with _visible_errors():
            return super().invoke(ctx)


@contextmanager
def _visible_errors() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):
            said = visible(error.format_message())
            error.format_message = lambda: said
        raise


INTERRUPTED = 130
"""The exit code of a command that was ended by Ctrl-C, as shells have it."""

app = typer.Typer(
    name="featpatch", cls=Program, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="Which SAE features cause this behaviour? Exact causal ranking, in both directions.",
)  # fmt: skip


def console(*, json: bool = False) -> PlainConsole:
    """Where tables go; notes beside JSON go to standard error."""
    return PlainConsole(stderr=json, width=176)


@contextmanager
def clear_errors() -> Iterator[None]:
    """A FeatpatchError becomes one line and exit code 2, an interruption exit code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        PlainConsole(stderr=True).print("interrupted", style="yellow")
        raise typer.Exit(INTERRUPTED) from error
    except FeatpatchError as error:
        PlainConsole(stderr=True).print(f"error: {error}", style="red", highlight=False)
        raise typer.Exit(2) from error
