"""The command `featpatch rank`."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.cli.output import Output
from featpatch.cli.shown import show


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
    by: of.By = None,
    threshold: of.Threshold = None,
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
        results = Output.open(out, journal)
        elsewhere = of.executor(executor, address, workers)
        shown = of.Shown.of(top, by, threshold, direction)
        screen = console(json=as_json)
        screen.print(f"loading {model} and {len(sae)} SAE{'s' if len(sae) > 1 else ''}")
        work = of.study(screen, model, sae, pairs, positions, direction, metric, device, progress=not as_json)
        from featpatch.ranking.screen import Screen

        options: dict[str, Any] = {"k": k, "audit": audit, "target": target}
        screen_of = Screen(**{name: value for name, value in options.items() if value is not None})
        screening = None if exact == "all" else {name: getattr(screen_of, name) for name in options}
        results.check_same(work, kind="features" if screening is None else "screened features", screening=screening)
        effects = fp.rank_features(
            **work, exact=exact, k=k, audit=audit, target=target, journal=journal, executor=elsewhere, progress=not as_json
        )
        show(screen, effects, shown, results, work, as_json=as_json)
