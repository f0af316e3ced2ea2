"""The commands `featpatch report` and `featpatch compare`."""

import json
from pathlib import Path
from typing import Annotated

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.files import check_writable

File = Annotated[Path, typer.Argument(help="effects.safetensors, as rank writes it.")]


@app.command()
def report(
    effects: File,
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    components: Annotated[Path | None, typer.Option(help="Effects of components, for the maps.")] = None,
    threshold: of.Threshold = None,
    as_json: of.Json = False,
) -> None:
    """Write a table of effects as one HTML file. `rank` and `demo` write theirs with prompts and features.

    Example: featpatch report featpatch-out/effects.safetensors --out report.html
    """
    with clear_errors():
        check_writable(out)
        others = None if components is None else fp.Effects.load(components)
        table = fp.Effects.load(effects)
        table = table if threshold is None else table.with_threshold(threshold)
        written = table.report(out, components=others)
        if as_json:
            typer.echo(json.dumps({"written": str(written)}))
        else:
            console().print(f"wrote {written}")


@app.command()
def compare(
    features: File,
    components: Annotated[Path, typer.Argument(help="effects.safetensors, as components writes it.")],
    as_json: of.Json = False,
) -> None:
    """Set features beside components of the same pairs: sites and positions, and how far they agree.

    Example: featpatch compare featpatch-out/effects.safetensors featpatch-components/effects.safetensors
    """
    with clear_errors():
        found = fp.compare(fp.Effects.load(features), fp.Effects.load(components))
        if as_json:
            typer.echo(found.table.to_json(orient="records", indent=1))
        else:
            console().print(repr(found), highlight=False)
