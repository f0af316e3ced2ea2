"""The commands that inspect: `check`, `verify`, `info`, `report`, `compare` and `tasks`."""

import json
import re
from inspect import getdoc, getmodule
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import INSPECT, START, app, bars, clear_errors, console
from featpatch.cli.output import in_json
from featpatch.errors import FeatpatchError, closest, counted, listed
from featpatch.files import write_csv


@app.command(rich_help_panel=START)
def check(
    model: of.Model,
    pairs: of.PairsFile,
    metric: Annotated[
        Literal["logit_diff", "prob_diff", "sequence_log_prob_diff"],
        typer.Option(help="Metric that compares the answers; the last one supports answers of several tokens."),
    ] = "logit_diff",
    device: of.Device = "cpu",
    top: Annotated[int, typer.Option(min=1, help="How many pairs to show.")] = 12,
    sae: Annotated[
        list[str] | None, typer.Option(help="SAE whose fit to the model is checked; same form as for rank. Repeatable.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="CSV file to write all findings to.")] = None,
    as_json: of.Json = False,
) -> None:
    """Check that each prompt pair is one clean contrast for the model and, with --sae, that each SAE fits the model.

    Exits with code 1 if a pair fails, or if an SAE does not fit or explains less than its configuration claims.

    Example: featpatch check --model gpt2 --pairs pairs.jsonl
    """
    with clear_errors():
        if out is not None:
            of.check_out(out, ".csv")
        from featpatch.reporting.terminal import by_pair, checked, totals

        of.checked(pairs, "all", "both", [metric])
        loaded, saes = fp.load(model, sae, device=device, check=False, progress=bars(json=as_json))
        drawn = fp.Pairs.from_jsonl(loaded, pairs, long_answers=of.of_sequences([metric]))
        found = drawn.check(loaded, metric=metric)
        fits = fp.check(loaded, saes, drawn) if saes else None
        if as_json:
            typer.echo(found.to_pandas().to_json(orient="records", indent=1))
            if fits is not None:
                console(json=True).print(repr(fits), highlight=False)
        else:
            screen = console()
            decode = loaded.tokenizer.decode
            screen.print(by_pair(found, lambda pair: str(decode(drawn[pair].clean, skip_special_tokens=True)), top))
            screen.print(totals(found))
            if fits is not None:
                screen.print(checked(fits))
        if out is not None:
            write_csv(out, found.to_pandas())
        if not (found.ok and (fits is None or fits.ok)):
            raise typer.Exit(1)


@app.command(rich_help_panel=INSPECT)
def verify(
    effects: Annotated[Path, typer.Argument(help="The effects.safetensors file written by rank or components.")],
    model: of.Model,
    pairs: of.PairsFile,
    sae: Annotated[list[str] | None, typer.Option(help="The SAEs that were ranked, by name or folder. Repeatable.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many randomly drawn rows to measure again.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for drawing the rows.")] = 0,
    device: of.Device = "cpu",
    as_json: of.Json = False,
) -> None:
    """Measure random rows of a table again and compare. Exits with code 1 if a value is not reproduced.

    Example: featpatch verify results/effects.safetensors --model gpt2 --sae my-sae --pairs pairs.jsonl
    """
    with clear_errors():
        table = of.table(effects)
        work = of.study(model, sae or [], pairs, "all", "both", list(table.metrics), device, progress=bars(json=as_json))
        found = fp.verify(
            table, work["model"], work["pairs"], saes=work["saes"] or None, rows=rows, seed=seed, progress=bars(json=as_json)
        )
        if as_json:
            typer.echo(json.dumps({"ok": found.ok, "rows": found.table().to_dict("records"), "versions": found.versions}))
        else:
            console().print(repr(found), highlight=False)
        if not found.ok:
            raise typer.Exit(1)


@app.command(rich_help_panel=INSPECT)
def info(
    effects: of.EffectsFile, top: of.Top = 5, by: of.By = None, threshold: of.Threshold = None, as_json: of.Json = False
) -> None:
    """Show what a table of effects contains and how it was produced.

    Example: featpatch info featpatch-out/effects.safetensors
    """
    with clear_errors():
        from featpatch.reporting.terminal import ranked

        table = of.table(effects)
        table = (shown := of.Shown(top, by, threshold)).labelled(table)
        if as_json:
            typer.echo(in_json(table, shown))
            return
        screen = console()
        rows = counted(len(table), "row")
        screen.print(f"{rows} of {table.value} effects, {table.rows_ranked} ranked, {counted(len(table.clean), 'pair')}")
        for name, value in table.about().items():
            screen.print(f"{name}: {value if isinstance(value, str) else json.dumps(value)}", highlight=False)
        screen.print(ranked(shown.rows(table), shown.by))


@app.command(rich_help_panel=INSPECT)
def report(
    effects: of.EffectsFile,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    components: Annotated[Path | None, typer.Option(help="Component effects (effects.safetensors), shown as heatmaps.")] = None,
    threshold: of.Threshold = None,
    as_json: of.Json = False,
) -> None:
    """Write a table of effects as one HTML file. The reports of `rank` and `demo` also show prompts and feature cards.

    Example: featpatch report featpatch-out/effects.safetensors --out report.html
    """
    with clear_errors():
        of.check_out(out, ".html")
        others = None if components is None else of.table(components)
        written = fp.report(of.Shown(0, threshold=threshold).labelled(of.table(effects)), out, components=others)
        if as_json:
            typer.echo(json.dumps({"written": str(written)}))
        else:
            console().print(f"wrote {written}")


@app.command(rich_help_panel=INSPECT)
def compare(
    features: Annotated[Path, typer.Argument(help="The effects.safetensors file written by rank or demo.")],
    components: Annotated[Path, typer.Argument(help="The effects.safetensors file written by components.")],
    as_json: of.Json = False,
) -> None:
    """Compare the effects of features and components on the same pairs, by hook point and position.

    Example: featpatch compare featpatch-out/effects.safetensors featpatch-components/effects.safetensors
    """
    with clear_errors():
        from featpatch.reporting.terminal import compared

        found = fp.compare(of.table(features), of.table(components))
        if as_json:
            typer.echo(found.table.to_json(orient="records", indent=1))
        else:
            console().print(compared(found))


ANSWERS = 4
"""The largest number of right, and of wrong, answers shown for a pair."""


@app.command(rich_help_panel=START)
def tasks(
    task: Annotated[str | None, typer.Argument(help="Task to draw pairs from; omit it to list all tasks.")] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", min=1, help="How many pairs to draw; 5 by default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to draw pairs for: a name on the hub, or a folder; the demo model by default.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed for drawing the pairs; 0 by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file to write the pairs to, for the --pairs option of other commands.")
    ] = None,
    as_json: of.Json = False,
) -> None:
    """List the built-in tasks with their labels, or draw pairs of one of them for a model.

    Example: featpatch tasks ioi -n 32 --model gpt2 --out pairs.jsonl
    """
    with clear_errors():
        screen, names = console(json=as_json), list(fp.tasks.TASKS)
        if task is None:
            options = {"-n": n, "--model": model, "--seed": seed, "--out": out}
            if given := [name for name, value in options.items() if value is not None]:
                raise FeatpatchError(f"{', '.join(given)} without a task: expected a task too, one of {', '.join(names)}")
            known = {name: _about(make) for name, make in fp.tasks.TASKS.items()}
            if as_json:
                typer.echo(json.dumps([{"task": name, **about} for name, about in known.items()], indent=1))
            for name, about in {} if as_json else known.items():
                screen.print(f"{name}: {about['about']}\n  {about['labels']}", highlight=False)
            return
        if task not in names:
            raise FeatpatchError(f"task {task!r} is unknown: expected one of {', '.join(names)}{closest(task, names)}")
        if out is not None:
            of.check_out(out, ".jsonl")
        progress = bars(json=as_json)
        loaded = (fp.load_demo(progress=progress) if model is None else fp.load(model, check=False, progress=progress)).model
        drawn = fp.tasks.TASKS[task](loaded, 5 if n is None else n, seed=seed or 0)
        if as_json:
            typer.echo(json.dumps([_texts(pair, loaded.tokenizer) for pair in drawn], indent=1))
        for pair in () if as_json else drawn:
            for name, shown in _texts(pair, loaded.tokenizer).items():
                screen.print(f"{name:<10}{_line(shown)}", highlight=False)
            screen.print("")
        if out is not None:
            drawn.to_jsonl(out, tokenizer=loaded)
            screen.print(f"wrote {counted(len(drawn), 'pair')} to {out}")


def _about(make: Any) -> dict[str, str]:
    """Return a description of a task and its labels, taken from its docstrings."""
    module = getdoc(getmodule(make)) or ""
    labels = re.search(r"Labels: [^.]*\.", getdoc(make) or "")
    return {"about": " ".join(module.split("\n\n")[0].split()), "labels": " ".join(labels[0].split()) if labels else ""}


def _texts(pair: "fp.Pair", tokenizer: Any) -> dict[str, Any]:
    """Return the prompts and answers of a pair as texts, and the positions of its labels."""
    prompts = {name: tokenizer.decode(getattr(pair, name), skip_special_tokens=True) for name in ("clean", "corrupted")}
    answers = {name: [tokenizer.decode([token]) for token in getattr(pair, name)] for name in ("correct", "wrong")}
    return {**prompts, **answers, "labels": dict(pair.labels)}


def _line(shown: Any) -> str:
    """Format a field of a pair as one line."""
    if isinstance(shown, dict):
        return ", ".join(f"{label} {position}" for label, position in shown.items())
    return shown if isinstance(shown, str) else listed(shown, ANSWERS)
