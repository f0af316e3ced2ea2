"""The command `featpatch run`, which reads the options of another command from a file."""

import re
import sys
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from featpatch.cli.app import SCALE, app, clear_errors
from featpatch.errors import FeatpatchError, closest
from featpatch.files import as_path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@app.command(rich_help_panel=SCALE)
def run(
    study: Annotated[
        Path, typer.Argument(help="A TOML file with command = 'rank' (or another command) and the command's options by name.")
    ],
) -> None:
    """Run a command with options from a file: lists give repeated options, `arguments` gives positional arguments.

    Relative paths start from the current folder, as on the command line.

    Example: featpatch run study.toml
    """
    with clear_errors():
        arguments = read(study)
    app(arguments)


def read(study: Path) -> list[str]:
    """Convert a study file to the arguments of a command line.

    Raises:
        FeatpatchError: the file is missing or can't be read, is not TOML or names no command, or a value can't be an option.
    """
    if not as_path(study).exists():
        raise FeatpatchError(f"the study {str(study)!r} does not exist: expected a TOML file; check the path")
    try:
        content: dict[str, Any] = tomllib.loads(study.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise FeatpatchError(f"the study {str(study)!r} can't be read ({error}): expected a TOML file; correct it") from error
    command = content.pop("command", None)
    known = {each.name or each.callback.__name__: each.callback for each in app.registered_commands if each.callback}
    if not isinstance(command, str) or command not in known or command == "run":
        raise FeatpatchError(f"command={command!r} in {str(study)!r}: expected one of {', '.join(sorted({*known} - {'run'}))}")
    options = ["arguments", *(name.removeprefix("as_") for name in signature(known[command]).parameters)]
    if odd := [name for name in content if name.replace("-", "_") not in options]:
        choice = f"{', '.join(options)}{closest(odd[0], options)}"
        raise FeatpatchError(f"{odd[0]} in {str(study)!r}: expected an option of {command}, one of {choice}")
    arguments = [command]
    for name, value in content.items():
        several = value if isinstance(value, list) else [value]
        if not re.fullmatch(r"[a-z][a-z_-]*", name) or not all(isinstance(one, (str, int, float)) for one in several):
            raise FeatpatchError(
                f"{name}={repr(value)[:60]} in {str(study)!r}: expected the value of an option: a string, a number, true or "
                "false, or a list of these"
            )
        if name == "arguments":
            arguments += map(str, several)
        elif isinstance(value, bool):
            arguments += ["--" + name.replace("_", "-")] if value else []
        else:
            arguments += [part for one in several for part in ("--" + name.replace("_", "-"), str(one))]
    return arguments
