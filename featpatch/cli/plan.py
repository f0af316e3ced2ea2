"""The commands `featpatch plan` and `featpatch predict`."""

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.cost import GPUS, SHAPES
from featpatch.sites import COMPONENTS, SHOWN


@app.command()
def plan(
    model: of.Model,
    pairs: of.PairsFile,
    sae: of.Saes = [],  # noqa: B006 - typer copies it
    sites: Annotated[
        str | None,
        typer.Option(
            help=f"Components to plan for, without --sae: some of {', '.join(COMPONENTS)}; {','.join(SHOWN)} by default."
        ),
    ] = None,
    positions: of.Positions = "all",
    direction: of.Directions = "both",
    metric: of.MetricNames = of.LOGIT_DIFF,
    device: of.Device = "cpu",
    as_json: of.Json = False,
) -> None:
    """Estimate what `rank`, or without --sae `components`, will take: patches, memory and time, from one batch run now.

    Example: featpatch plan --model my-gpt2 --sae saes/blocks.8.hook_resid_pre --pairs pairs.jsonl --positions each
    """
    with clear_errors():
        from featpatch.terminal import planned

        work = of.alone(model, sae, pairs, positions, direction, metric, device, progress=not as_json)
        asked = None if sites is None else [name for name in sites.split(",") if name]
        found = fp.plan(**{**work, "saes": work["saes"] or None}, sites=asked)
        _show(found, planned(found), as_json=as_json)


@app.command()
def predict(
    shape: Annotated[str, typer.Argument(help=f"A model: {', '.join(SHAPES)}.")],
    features: Annotated[int, typer.Option(help="Features of a dictionary.")] = 16384,
    pairs: Annotated[int, typer.Option(help="How many pairs.")] = 100,
    active: Annotated[int, typer.Option(help="Active features of a position, L0.")] = 64,
    tokens: Annotated[int, typer.Option(help="Of a prompt.")] = 20,
    changed: Annotated[int, typer.Option(help="Positions from the first differing token to the answer.")] = 5,
    layers: Annotated[str | None, typer.Option(help="Blocks with a dictionary, e.g. 6,12; the middle one by default.")] = None,
    direction: of.Directions = "both",
    device: Annotated[str | None, typer.Option(help=f"Of each worker: {', '.join(GPUS)}.")] = None,
    workers: Annotated[int, typer.Option(help="How many of them.")] = 1,
    as_json: of.Json = False,
) -> None:
    """Predict the time and memory of `rank` from sizes alone, without a model.

    Example: featpatch predict gemma-2-9b --features 131072 --pairs 10000 --device h100 --workers 8
    """
    with clear_errors():
        from featpatch.terminal import predicted

        chosen = None
        if layers is not None:
            chosen = [-1 if (number := of.integer(layer)) is None else number for layer in layers.split(",")]
        found = fp.predict(
            shape, features=features, pairs=pairs, active=active, tokens=tokens, changed=changed, layers=chosen,
            directions=len(of.ways(direction)), device=device, workers=workers,
        )  # fmt: skip
        _show(found, predicted(found), as_json=as_json)


def _show(found: "fp.Plan | fp.Prediction", table: Table, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(found)))
    else:
        console().print(table)
