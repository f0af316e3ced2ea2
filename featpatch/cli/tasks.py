"""The command `featpatch tasks`."""

import json
import re
from inspect import getdoc, getmodule
from pathlib import Path
from typing import Annotated, Any

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.errors import FeatpatchError
from featpatch.files import check_writable

ANSWERS = 4
"""The largest number of right, and of wrong, answers shown for a pair."""


@app.command()
def tasks(
    task: Annotated[str | None, typer.Argument(help="Task to draw pairs from; without one, all tasks are listed.")] = None,
    n: Annotated[int | None, typer.Option("-n", "--n", min=1, help="How many pairs to draw; 5 by default.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to draw pairs for: name on the hub, or folder; by default the demo model.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed that draws the pairs; 0 by default.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON lines file to write the pairs to, for other commands' --pairs.")
    ] = None,
    as_json: of.Json = False,
) -> None:
    """List the built-in tasks with their labels, or draw pairs of one of them for a model.

    Example: featpatch tasks ioi -n 32 --model gpt2 --out pairs.jsonl
    """
    with clear_errors():
        screen = console(json=as_json)
        if task is None:
            given = [
                name for name, value in {"-n": n, "--model": model, "--seed": seed, "--out": out}.items() if value is not None
            ]
            if given:
                raise FeatpatchError(
                    f"{', '.join(given)} without a task: expected also a task, one of {', '.join(fp.tasks.TASKS)}"
                )
            known = {name: _about(make) for name, make in fp.tasks.TASKS.items()}
            if as_json:
                typer.echo(json.dumps([{"task": name, **about} for name, about in known.items()], indent=1))
            for name, about in {} if as_json else known.items():
                screen.print(f"{name}: {about['about']}\n  {about['labels']}", highlight=False)
            return
        if task not in fp.tasks.TASKS:
            raise FeatpatchError(f"task {task!r} is unknown: expected one of {', '.join(fp.tasks.TASKS)}")
        if out is not None:
            check_writable(out)
        progress = not as_json
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
            screen.print(f"wrote {len(drawn)} pairs to {out}")


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
    more = len(shown) - ANSWERS
    return shown if isinstance(shown, str) else ", ".join(shown[:ANSWERS]) + (f" and {more} more" if more > 0 else "")
