"""The command `featpatch verify`."""

import json
from pathlib import Path
from typing import Annotated

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console


@app.command()
def verify(
    effects: Annotated[Path, typer.Argument(help="effects.safetensors, as rank and components write it.")],
    model: of.Model,
    pairs: of.PairsFile,
    sae: Annotated[list[str] | None, typer.Option(help="Those that were ranked, by name or folder. Repeatable.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows, drawn at random.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Draws the rows.")] = 0,
    device: of.Device = "cpu",
    as_json: of.Json = False,
) -> None:
    """Measure random rows of a table again and compare. Exits with 1 where one is not as it was.

    Example: featpatch verify results/effects.safetensors --model gpt2 --sae my-sae --pairs pairs.jsonl
    """
    with clear_errors():
        table = fp.Effects.load(effects)
        work = of.alone(model, sae or [], pairs, "all", "both", list(table.metrics), device, progress=not as_json)
        found = fp.verify(
            table, work["model"], work["pairs"], saes=work["saes"] or None, rows=rows, seed=seed, progress=not as_json
        )
        if as_json:
            typer.echo(json.dumps({"ok": found.ok, "rows": found.table().to_dict("records"), "versions": found.versions}))
        else:
            console().print(repr(found), highlight=False)
        if not found.ok:
            raise typer.Exit(1)
