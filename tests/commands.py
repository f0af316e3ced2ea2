"""The command line, in the process of the tests, which has loaded torch already, or in one of its own."""

import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

from typer.testing import CliRunner

from featpatch.cli.app import app


def run(*arguments: str | Path, folder: Path) -> "CompletedProcess[str]":
    """A command in a folder; whatever is not an exit is raised."""
    before, command = (sys.argv, os.getcwd()), [*map(str, arguments)]
    sys.argv = ["featpatch", *command]
    os.chdir(folder)
    try:
        done = CliRunner().invoke(app, command)
    finally:
        sys.argv = before[0]
        os.chdir(before[1])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return CompletedProcess(command, done.exit_code, done.stdout, done.stderr)


def started(*arguments: str | Path, folder: Path) -> "CompletedProcess[str]":
    """The same as a user starts it."""
    command = [sys.executable, "-m", "featpatch", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
