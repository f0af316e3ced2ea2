"""featpatch rank, featpatch plan."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, check_folder, clear_errors, console
from featpatch.cli.shown import show
from featpatch.cost.known import GPUS, SHAPES
from featpatch.errors import FeatpatchError


@app.command()
def rank(
    model: of.Model,
    sae: of.Saes,
    pairs: of.PairsFile,
    positions: of.Positions = "all",
    direction: of.Directions = "both",
    metric: of.MetricNames = of.LOGIT_DIFF,
    device: of.Device = "cpu",
    top: of.Top = 20,
    out: of.Out = Path("featpatch-out"),
    journal: of.JournalFile = None,
    exact: Annotated[
        Literal["all", "screened"], typer.Option(help="Run all features, or those that gradient estimates put first.")
    ] = "all",
    k: Annotated[
        int | None, typer.Option("--k", help="screened: how many are run for their estimates; 200 by default.")
    ] = None,
    audit: Annotated[int | None, typer.Option(help="screened: how many others, drawn at random; 100 by default.")] = None,
    target: Annotated[
        float | None,
        typer.Option(help="screened: share of the true top 20 that is to be found; doubles the sample until then."),
    ] = None,
    executor: of.Executor = "serial",
    address: of.Address = None,
    workers: of.Workers = None,
    as_json: of.Json = False,
) -> None:
    """Rank the features of your own SAEs on your own prompt pairs. Ctrl-C shows what is finished.

    Example: featpatch rank --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --pairs pairs.jsonl --positions each
    """
    with clear_errors():
        check_folder(out)
        elsewhere = of.executor(executor, address, workers)
        screen = console(json=as_json)
        screen.print(f"loading {model} and {len(sae)} SAE{'s' if len(sae) > 1 else ''}")
        work = of.study(screen, model, sae, pairs, positions, direction, metric, device)
        effects = fp.rank_features(**work, exact=exact, k=k, audit=audit, target=target, journal=journal, executor=elsewhere)
        show(screen, effects, top, out, work, as_json=as_json)


@app.command()
def plan(
    model: Annotated[str | None, of.MODEL] = None,
    sae: Annotated[list[str] | None, of.SAES] = None,
    pairs: Annotated[Path | None, of.PAIRS] = None,
    positions: of.Positions = "all",
    direction: of.Directions = "both",
    metric: of.MetricNames = of.LOGIT_DIFF,
    device: of.Device = "cpu",
    shape: Annotated[str | None, typer.Option(help=f"Without a model: {', '.join(SHAPES)}.")] = None,
    features: Annotated[int, typer.Option(help="shape: features of a dictionary.")] = 16384,
    count: Annotated[int, typer.Option(help="shape: how many pairs.")] = 100,
    active: Annotated[int, typer.Option(help="shape: active features of a position, L0.")] = 64,
    tokens: Annotated[int, typer.Option(help="shape: of a prompt.")] = 20,
    changed: Annotated[int, typer.Option(help="shape: positions from the first differing token to the answer.")] = 5,
    layers: Annotated[str | None, typer.Option(help="shape: blocks with a dictionary, e.g. 6,12; the middle one.")] = None,
    gpu: Annotated[str | None, typer.Option(help=f"shape: {', '.join(GPUS)}.")] = None,
    workers: Annotated[int, typer.Option(help="shape: how many of them.")] = 1,
    as_json: of.Json = False,
) -> None:
    """Estimate what `rank` with the same options will take: patches, operations, memory, time; or predict it from sizes alone.

    Example: featpatch plan --model my-gpt2 --sae saes/blocks.8.hook_resid_pre --pairs pairs.jsonl --positions each

    featpatch plan --shape gemma-2-9b --features 131072 --count 10000 --gpu h100 --workers 8
    """
    with clear_errors():
        import json

        from featpatch.terminal import planned, predicted

        screen = console(json=as_json)
        found: fp.Plan | fp.Prediction
        if shape is not None:
            chosen = None if layers is None else [int(layer) if layer.isdecimal() else -1 for layer in layers.split(",")]
            found = fp.predict(
                shape, features=features, pairs=count, active=active, tokens=tokens, changed=changed, layers=chosen,
                directions=2 if direction == "both" else 1, device=gpu, workers=workers,
            )  # fmt: skip
            table = predicted(found)
        elif model is None or not sae or pairs is None:
            raise FeatpatchError(f"--model {model}, --sae {sae}, --pairs {pairs}: expected all three, or --shape")
        else:
            found = fp.plan(**of.study(screen, model, sae, pairs, positions, direction, metric, device))
            table = planned(found)
        if as_json:
            typer.echo(json.dumps(asdict(found)))
        else:
            screen.print(table)
