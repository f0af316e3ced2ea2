"""The command `steer`, which prints generations side by side, the plain one first."""

import json
from contextlib import nullcontext
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Table

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import INSPECT, app, bars, clear_errors, console
from featpatch.errors import FeatpatchError
from featpatch.untrusted import visible


@app.command(rich_help_panel=INSPECT)
def steer(
    model: of.Model,
    sae: Annotated[str, typer.Option(help="SAE of the features, in the same form as for rank.")],
    feature: Annotated[list[int], typer.Option(min=0, help="Index of a feature that is steered. Repeatable: all at once.")],
    prompt: Annotated[list[str], typer.Option(help="Text to continue. Repeatable.")],
    dose: Annotated[list[float], typer.Option(help="The number; negative ones as --dose=-4. Repeatable: one text each.")],
    how: Annotated[Literal["add", "set", "scale"], typer.Option(help="What the number does to the feature's value.")] = "add",
    unit: Annotated[
        Literal["raw", "mean", "max"],
        typer.Option(help="Unit of the number: raw, or the mean (where active) or maximum of the feature on the reference."),
    ] = "raw",
    reference: Annotated[
        Path | None, typer.Option(help="With a unit: text file with a document per line; by default the prompts.")
    ] = None,
    positions: Annotated[
        Literal["all", "prompt", "generated", "newest"],
        typer.Option(help="Tokens that are steered; newest: the last token of the prompt and every generated one."),
    ] = "all",
    tokens: Annotated[int, typer.Option(min=1, help="How many tokens to generate, greedily.")] = 20,
    device: of.Device = "cpu",
    as_json: of.Json = False,
) -> None:
    """Steer features while the model continues prompts, and print the texts beside what it writes without steering.

    Example: featpatch steer --model gpt2 --sae my-sae --feature 433 --dose 4 --unit mean --prompt "Once upon a time"
    """
    with clear_errors():
        if strange := [number for number in dose if not isfinite(number)]:
            raise FeatpatchError(f"--dose {strange[0]}: expected a finite number; give another dose")
        texts = None
        if unit != "raw":
            from featpatch.pairs.files import read

            text = "" if reference is None else read(reference, "a text file", "a document per line")
            texts = [line for line in text.splitlines() if line.strip()] or prompt
        elif reference is not None:
            raise FeatpatchError(
                "--reference with --unit raw: expected no reference, because raw numbers need none; leave it out"
            )
        loaded, saes = fp.load(model, [sae], device=device, check=False, progress=bars(json=as_json))
        options: dict[str, Any] = {
            "saes": saes, "how": how, "unit": unit, "reference": texts, "positions": positions
        }  # fmt: skip
        nodes = [fp.feature(saes[0], index) for index in dict.fromkeys(feature)]
        rows: list[dict[str, Any]] = [
            {
                "prompt": each,
                "plain": _continued(loaded, each, tokens),
                "steered": [
                    {"dose": number, "text": _continued(loaded, each, tokens, dict.fromkeys(nodes, number), options)}
                    for number in dict.fromkeys(dose)
                ],
            }
            for each in prompt
        ]
        if as_json:
            typer.echo(json.dumps(rows, indent=1))
            return
        for row in rows:
            table = Table("dose", "text", title=visible(f"{row['prompt']} ..."), title_justify="left")
            table.add_row("none", visible(str(row["plain"])))
            for found in row["steered"]:
                table.add_row(f"{found['dose']:g}", visible(found["text"]))
            console().print(table, highlight=False)


def _continued(model: Any, prompt: str, tokens: int, values: Any = None, options: Any = None) -> str:
    """Return what the model writes after a prompt, steered if there are values."""
    from featpatch.model.transformer_lens import wrap

    lens, ids = wrap(model), model.to_tokens(prompt)
    with fp.steer(model, values, **options) if values else nullcontext():
        made = lens.generate(ids, tokens)
    return str(lens.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
