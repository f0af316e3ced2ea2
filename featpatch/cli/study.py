"""featpatch run: a study that is written down."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from featpatch.cli.app import app, clear_errors
from featpatch.errors import FeatpatchError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@app.command()
def run(study: Annotated[Path, typer.Argument(help="A TOML file: command = 'rank', and its options by name.")]) -> None:
    """Run a command whose options stand in a file: lists for repeated options, `arguments` for what has no name.

    Paths are as on the command line.

    Example: featpatch run study.toml
    """
    with clear_errors():
        arguments = read(study)
    app(arguments)


def read(study: Path) -> list[str]:
    """The command line that the file stands for.

    Raises:
        FeatpatchError: no such file, no TOML, no command, or a value that is no option.
    """
    try:
        content: dict[str, Any] = tomllib.loads(study.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise FeatpatchError(f"the study {str(study)!r} can't be read ({error}): expected a TOML file") from error
    command = content.pop("command", None)
    names = {info.name or info.callback.__name__ for info in app.registered_commands if info.callback} - {"run"}
    if command not in names:
        raise FeatpatchError(f"command={command!r} in {str(study)!r}: expected one of {', '.join(sorted(names))}")
    arguments = [str(command), *map(str, content.pop("arguments", []))]
    for name, value in content.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            arguments += [option] if value else []
        elif isinstance(value, (str, int, float, list)):
            for one in value if isinstance(value, list) else [value]:
                arguments += [option, str(one)]
        else:
            raise FeatpatchError(f"{name}={value!r} in {str(study)!r}: expected a text, a number, true or false, or a list")
    return arguments
