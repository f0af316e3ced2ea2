"""The commands that measure: `rank`, `components`, `stream` and `plan`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import RANK, SCALE, app, bars, clear_errors, console
from featpatch.cli.output import Output, in_json, show
from featpatch.errors import counted
from featpatch.sites import COMPONENTS, DEFAULT_COMPONENTS


@app.command(rich_help_panel=RANK)
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
    method: of.Method = "exact",
    screen: Annotated[
        bool, typer.Option("--screen", help="Patch only the features with the largest gradient estimates.")
    ] = False,
    k: Annotated[
        int | None, typer.Option("--k", help="With --screen: how many of the top-ranked features to patch; 200 by default.")
    ] = None,
    audit: Annotated[
        int | None,
        typer.Option(
            help="With --screen: how many of the other features, drawn at random, to patch as an audit; 100 by default."
        ),
    ] = None,
    target: Annotated[
        float | None,
        typer.Option(
            help="With --screen: fraction of the true top 20 to find; the patched sample doubles until it is reached."
        ),
    ] = None,
    executor: of.Executor = "serial",
    address: of.Address = None,
    workers: of.Workers = None,
    as_json: of.Json = False,
) -> None:
    """Rank the features of your own SAEs on your own prompt pairs: exactly, or by gradient estimates with --method.

    Ctrl-C stops the sweep and shows the results so far.

    Example: featpatch rank --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --pairs pairs.jsonl --positions S2,end
    """
    with clear_errors():
        from featpatch.reporting.terminal import checked

        results = Output.open(out, journal)
        elsewhere = of.executor(executor, address, workers)
        shown = of.Shown.of(top, by, threshold, direction)
        options: dict[str, Any] = {"k": k, "audit": audit, "target": target}
        given = {name: value for name, value in options.items() if value is not None}
        if given and not screen:
            raise fp.FeatpatchError(f"{', '.join(f'--{name}' for name in given)} without --screen: expected --screen too")
        screening = fp.Screen(**given) if screen else None
        of.check_methods(method, screening, metric, direction, {"screen": screening, "journal": journal, "executor": elsewhere})
        out_to = console(json=as_json)
        out_to.print(f"loading {model} and {counted(len(sae), 'SAE')}")
        work = of.study(model, sae, pairs, positions, direction, metric, device, progress=bars(json=as_json))
        out_to.print(checked(fp.check(work["model"], work["saes"], work["pairs"])))
        kind = "screened features" if screening else "features" if method == "exact" else f"estimates by {method}"
        results.check_same(
            work, kind=kind, screening={name: getattr(screening, name) for name in options} if screening else None
        )
        effects = fp.rank_features(
            **work, method=method, screen=screening, journal=journal, executor=elsewhere, progress=bars(json=as_json)
        )
        show(out_to, effects, shown, results, work, as_json=as_json)


@app.command(rich_help_panel=RANK)
def components(
    model: of.Model,
    pairs: of.PairsFile,
    sites: Annotated[str, typer.Option(help=f"Which components to rank: some of {', '.join(COMPONENTS)}.")] = ",".join(
        DEFAULT_COMPONENTS
    ),
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
    """Rank heads and their parts, MLPs, neurons and the residual stream by exact patching, on the same scale as features.

    Example: featpatch components --model gpt2 --pairs pairs.jsonl --sites z,mlp_out --positions S2,end
    """
    with clear_errors():
        results = Output.open(out, journal)
        elsewhere = of.executor(executor, address, workers)
        shown = of.Shown.of(top, by, threshold, direction)
        screen, chosen = console(json=as_json), of.components(sites, positions)
        work = of.study(model, [], pairs, positions, direction, metric, device, progress=bars(json=as_json)) | chosen
        del work["saes"]
        results.check_same(work, kind="components")
        effects = fp.rank_components(**work, journal=journal, executor=elsewhere, progress=bars(json=as_json))
        show(screen, effects, shown, results, work, as_json=as_json)


@app.command(rich_help_panel=SCALE)
def stream(
    model: of.Model,
    sae: of.Saes,
    pairs: of.PairsFile,
    positions: of.Positions = "all",
    direction: of.Directions = "both",
    metric: of.MetricNames = of.LOGIT_DIFF,
    device: of.Device = "cpu",
    block: Annotated[int, typer.Option(min=1, help="How many pairs to read and rank at a time.")] = 1000,
    top: of.Top = 20,
    by: of.By = None,
    threshold: of.Threshold = None,
    out: Annotated[Path, typer.Option(help="Folder for about.json and the Parquet files of effects and pairs.")] = Path(
        "featpatch-stream"
    ),
    executor: of.Executor = "serial",
    address: of.Address = None,
    workers: of.Workers = None,
    as_json: of.Json = False,
) -> None:
    """Rank features over more pairs than fit in memory, block by block, into Parquet; repeat the command to resume it.

    Example: featpatch stream --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --pairs pairs.jsonl --block 500
    """
    with clear_errors():
        from featpatch.reporting.terminal import ranked

        claimed = Output.open(out)
        elsewhere = of.executor(executor, address, workers)
        shown = of.Shown.of(top, by, threshold, direction)
        screen = console(json=as_json)
        asked = of.checked(pairs, positions, direction, metric)
        loaded = fp.load(model, sae, device=device, check=False, progress=bars(json=as_json))
        stored = fp.stream_features(
            loaded.model,
            loaded.saes,
            fp.Pairs.blocks_from_jsonl(loaded.model, pairs, size=block, long_answers=of.of_sequences(metric)),
            claimed.folder,
            **asked,
            executor=elsewhere,
            progress=bars(json=as_json),
        )
        effects = shown.labelled(stored.top(top, by=by))
        if as_json:
            typer.echo(in_json(effects, shown))
        else:
            screen.print(ranked(effects, by))
            screen.print(repr(stored), highlight=False)


@app.command(rich_help_panel=SCALE)
def plan(
    model: of.Model,
    pairs: of.PairsFile,
    sae: of.Saes = [],  # noqa: B006 - typer copies it
    sites: Annotated[
        str | None,
        typer.Option(
            help=f"Components to plan for, if there is no --sae: some of {', '.join(COMPONENTS)}; "
            f"{','.join(DEFAULT_COMPONENTS)} by default."
        ),
    ] = None,
    positions: of.Positions = "all",
    direction: of.Directions = "both",
    metric: of.MetricNames = of.LOGIT_DIFF,
    device: of.Device = "cpu",
    as_json: of.Json = False,
) -> None:
    """Estimate the cost of `rank` (without --sae, of `components`): patches, memory and time, extrapolated from one batch.

    Example: featpatch plan --model my-gpt2 --sae saes/blocks.8.hook_resid_pre --pairs pairs.jsonl --positions S2,end
    """
    with clear_errors():
        from featpatch.reporting.terminal import planned

        asked = {} if sites is None else of.components(sites, positions)
        if sites is not None and sae:
            raise fp.FeatpatchError("--sites with --sae: expected --sites for components or --sae for features; leave one out")
        work = of.study(model, sae, pairs, positions, direction, metric, device, progress=bars(json=as_json))
        found = fp.plan(**{**work, "saes": work["saes"] or None}, **asked)
        if as_json:
            typer.echo(json.dumps(asdict(found)))
        else:
            console().print(planned(found))
