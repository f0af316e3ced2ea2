"""The program, its console and its errors. Exit codes: 0 done, 1 a check failed, 2 unusable input, 130 interrupted."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from featpatch.errors import FeatpatchError

INTERRUPTED = 130
"""The exit code of a command that was ended by Ctrl-C, as shells have it."""

app = typer.Typer(
    name="featpatch", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="Which SAE features cause this behaviour? Exact causal ranking, in both directions.",
)  # fmt: skip


def console(*, json: bool = False) -> Console:
    """Where tables go; notes beside JSON go to standard error."""
    width = None if sys.stdout.isatty() else 176
    return Console(width=width, stderr=json)


@contextmanager
def clear_errors() -> Iterator[None]:
    """A FeatpatchError becomes one line and exit code 2, an interruption exit code 130."""
    try:
        yield
    except KeyboardInterrupt as error:
        Console(stderr=True).print("interrupted", style="yellow")
        raise typer.Exit(INTERRUPTED) from error
    except FeatpatchError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error
