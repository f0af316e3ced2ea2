"""The command `featpatch components`."""

from pathlib import Path
from typing import Annotated

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.cli.output import Output
from featpatch.cli.shown import show
from featpatch.sites import COMPONENTS, SHOWN


@app.command()
def components(
    model: of.Model,
    pairs: of.PairsFile,
    sites: Annotated[str, typer.Option(help=f"Some of {', '.join(COMPONENTS)}.")] = ",".join(SHOWN),
    positions: of.Positions = "all",
    direction: of.Directions = "both",
    metric: of.MetricNames = of.LOGIT_DIFF,
    device: of.Device = "cpu",
    top: of.Top = 20,
    by: of.By = None,
    threshold: of.Threshold = None,
    out: of.Out = Path("featpatch-components"),
    journal: of.JournalFile = None,
    executor: of.Executor = "serial",
    address: of.Address = None,
    workers: of.Workers = None,
    as_json: of.Json = False,
) -> None:
    """Rank heads, what is inside them, MLPs, neurons and the stream, exactly, on the scale of the features.

    Example: featpatch components --model gpt2 --pairs pairs.jsonl --sites z,mlp_out --positions each
    """
    with clear_errors():
        results = Output.open(out, journal)
        elsewhere = of.executor(executor, address, workers)
        shown = of.Shown.of(top, by, threshold, direction)
        screen = console(json=as_json)
        work = of.alone(model, [], pairs, positions, direction, metric, device, progress=not as_json)
        del work["saes"]
        work["sites"] = [name for name in sites.split(",") if name]
        results.check_same(work, kind="components")
        effects = fp.rank_components(**work, journal=journal, executor=elsewhere, progress=not as_json)
        show(screen, effects, shown, results, work, as_json=as_json)
