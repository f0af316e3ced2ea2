"""The command `featpatch stream`."""

from pathlib import Path
from typing import Annotated

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.cli.output import Output


@app.command()
def stream(
    model: of.Model,
    sae: of.Saes,
    pairs: of.PairsFile,
    positions: of.Positions = "all",
    direction: of.Directions = "both",
    metric: of.MetricNames = of.LOGIT_DIFF,
    device: of.Device = "cpu",
    block: Annotated[int, typer.Option(min=1, help="How many pairs are read and ranked at a time.")] = 1000,
    top: of.Top = 20,
    by: of.By = None,
    threshold: of.Threshold = None,
    out: of.Out = Path("featpatch-stream"),
    executor: of.Executor = "serial",
    address: of.Address = None,
    workers: of.Workers = None,
    as_json: of.Json = False,
) -> None:
    """Rank features over more pairs than memory holds, block by block, into Parquet; the same command goes on after a stop.

    Example: featpatch stream --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --pairs pairs.jsonl --block 500
    """
    with clear_errors():
        from featpatch.cli.shown import in_json
        from featpatch.terminal import ranked

        claimed = Output.open(out)
        elsewhere = of.executor(executor, address, workers)
        shown = of.Shown.of(top, by, threshold, direction)
        screen = console(json=as_json)
        loaded = fp.load(model, sae, device=device, check=False, progress=not as_json)
        stored = fp.stream_features(
            loaded.model,
            loaded.saes,
            fp.Pairs.blocks_from_jsonl(loaded.model, pairs, size=block, long_answers=of.of_sequences(metric)),
            claimed.folder,
            positions=of.spans(positions),
            directions=of.ways(direction),
            metric=metric,
            executor=elsewhere,
            progress=not as_json,
        )
        effects = shown.labelled(stored.top(top, by=by))
        if as_json:
            typer.echo(in_json(effects, shown))
        else:
            screen.print(ranked(effects, by))
            screen.print(repr(stored), highlight=False)
