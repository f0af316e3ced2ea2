"""The program, its console and its errors. Exit codes: 0 done, 1 a check failed, 2 unusable input."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console

from featpatch.errors import FeatpatchError, as_path

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
    """A FeatpatchError becomes one line and exit code 2."""
    try:
        yield
    except FeatpatchError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error


def check_folder(out: Path) -> None:
    """Refuses results in the place of a file."""
    if as_path(out).exists() and not out.is_dir():
        raise FeatpatchError(f"--out {str(out)!r} is a file: expected a folder for the results, new or existing")
