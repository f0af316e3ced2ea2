"""The command `featpatch info`."""

import json
from pathlib import Path
from typing import Annotated

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.cli.shown import in_json


@app.command()
def info(
    effects: Annotated[Path, typer.Argument(help="effects.safetensors, as rank writes it.")],
    top: of.Top = 5,
    by: of.By = None,
    threshold: of.Threshold = None,
    as_json: of.Json = False,
) -> None:
    """Say what a table of effects holds and where it comes from.

    Example: featpatch info featpatch-out/effects.safetensors
    """
    with clear_errors():
        table = fp.Effects.load(effects)
        shown = of.Shown(top, by, threshold)
        table = shown.labelled(table)
        if as_json:
            typer.echo(in_json(table, shown))
            return
        screen = console()
        screen.print(f"{len(table)} rows of {table.value} effects, {table.rows_ranked} ranked, {len(table.clean)} pairs")
        for name, value in table.about().items():
            screen.print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}", highlight=False)
        screen.print(repr(shown.rows(table)), highlight=False)
