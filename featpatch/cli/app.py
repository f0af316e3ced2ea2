"""The command-line program, its console and its error handling.

Exit codes are 0 for success, 1 for a failed check, 2 for bad input and 130 for an interruption.
"""

import re
import shlex
import sys
import warnings
from ast import literal_eval
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from inspect import signature
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from featpatch.console import PlainConsole
from featpatch.errors import FeatpatchError
from featpatch.untrusted import visible

PANELS = START, RANK, INSPECT, SCALE = "Start here", "Rank", "Inspect", "Scale"
"""The groups of commands in the help of the program, in this order."""


class Program(TyperGroup):
    """The group of all commands, which rewords Typer's own error messages and escapes control characters in them."""

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
    """Escape control characters in the messages of Typer's exceptions, and name the value that pydantic refused."""
    try:
        yield
    except Exception as error:
        if hasattr(error, "format_message"):
            message = error.format_message().replace("Value error, ", "")
            refused: Any = error.__cause__
            if hasattr(refused, "errors"):
                value = repr(refused.errors()[0]["input"])
                message = re.sub(r", unable to parse .*", "", message).replace("Input should be", f"{value} should be")
            message = visible(message)
            error.format_message = lambda: message
        raise


INTERRUPTED = 130
"""The exit code of a command that was interrupted by Ctrl-C, the same as in shells."""

app = typer.Typer(name="featpatch", cls=Program, no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"featpatch {version('featpatch')}")
        raise typer.Exit
    return asked


@app.callback()
def program(version: Annotated[bool, typer.Option("--version", callback=_version, help="Print the version.")] = False) -> None:
    """Which SAE features cause this behaviour? Exact causal ranking, in both directions."""


def console(*, json: bool = False) -> PlainConsole:
    """Return the console for tables, or for notes on standard error if JSON goes to standard output."""
    return PlainConsole(stderr=json)


def bars(*, json: bool) -> bool:
    """Return whether progress bars are shown: on a terminal, without JSON."""
    return not json and sys.stderr.isatty()


PHRASES = {
    r", or a function metric\(.*?(?=; did you mean|$)": "",
    r"metric '([^']*)' is unknown: (expected one of [\w, ]*)": r"--metric \1: \2; repeat --metric for several",
    r"one name or one function; call this once for each metric": "one metric; run the command once for each",
    r", or an object such as fp\.Ray\(\.\.\.\)": "",
    r"give short names and layers=\.\.\., or call this function once per layer": "run the command once per layer",
    r"a file written by Effects\.save": "an effects.safetensors file of rank, components or demo",
    r"pass them with saes=, or --sae for each": "pass each with --sae",
    r"call compare\(rank_features\(\.\.\.\), rank_components\(\.\.\.\)\)": "give the file of rank first, "
    "then that of components",
    r"values: '[^']* feature (\d+) @ all'": r"--feature \1",
    r"\) with (screen|journal|executor): ": r") with --\1: ",
    r"pass journal='work.journal' to": "pass --journal FILE to",
    r"pass long_answers=True \(.*?\) and metric='sequence_log_prob_diff'": "pass --metric sequence_log_prob_diff",
    r"the same call with it": "the same command",
    r"(can't be written \((?!No space left).*?\)): expected a folder with write permission and free disk space; an existing "
    r"file is left unchanged; free some space, or": r"\1: expected a folder that can be written to;",
}
"""Patterns of parts of the library's messages that advise on Python, each with what to say on the command line."""

ARGUMENT = re.compile(
    r"(?<!=)'[^']*'|(?<!=)\"[^\"]*\"|(?<![\w'\"/.=-])([a-z_]+)=('[^']*'|\[[^\]]*\]|-?\d+(?:\.\d+)?(?:e[+-]?\d+)?\b)"
)
"""An argument of Python with its value, as messages of the library quote it; or a quotation, which may hold the like."""

NAMES = {"saes": "sae", "directions": "direction"}
"""The options whose names differ from those of the library's arguments, by the latter."""


def in_options(message: str) -> str:
    """Return a message of the library in terms of the command line: `k=-5: ...` becomes `--k -5: ...`."""
    parameters = [
        of for info in app.registered_commands if info.callback for of in signature(info.callback).parameters.values()
    ]
    several_times = {of.name for of in parameters if "list[" in str(of.annotation)}
    options = {of.name for of in parameters}

    def as_option(found: re.Match[str]) -> str:
        name, text = NAMES.get(found[1], found[1]), found[2]
        try:
            value = literal_eval(text) if name in options else None
        except (ValueError, SyntaxError):
            value = None
        if value is None:
            return found[0]
        several = [*map(str, value)] if isinstance(value, list) else [value if isinstance(value, str) else text]
        given = several if name in several_times else [",".join(several)]
        return " ".join(f"--{name} {shlex.quote(one)}" for one in given)

    for python, here in PHRASES.items():
        message = re.sub(python, here, message, flags=re.DOTALL)
    return ARGUMENT.sub(as_option, message)


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn a FeatpatchError within the context into one line and exit code 2, and an interruption into exit code 130.

    The line speaks of options where the error of the library speaks of arguments, and so does that of each warning.
    """
    told = PlainConsole(stderr=True)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: told.print(f"warning: {in_options(str(message))}", style="yellow")
        try:
            yield
        except KeyboardInterrupt as error:
            told.print(in_options(f"interrupted; {error}" if str(error) else "interrupted"), style="yellow")
            raise typer.Exit(INTERRUPTED) from error
        except FeatpatchError as error:
            told.print(f"error: {in_options(str(error))}", style="red", highlight=False)
            raise typer.Exit(2) from error
