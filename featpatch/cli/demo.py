"""The command `featpatch demo`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.cli.output import Output, show

FOLDER = Path("featpatch-demo")
"""The default folder for the results, where the results of an earlier demo are always replaced."""


@app.command()
def demo(
    task: Annotated[
        Literal["ioi", "capitals", "greater_than", "sentiment"], typer.Option(help="Behaviour to explain.")
    ] = "ioi",
    pairs: Annotated[int, typer.Option(min=1, help="How many prompt pairs.")] = 32,
    seed: Annotated[int, typer.Option(help="Random seed for drawing the pairs.")] = 0,
    positions: Annotated[
        str, typer.Option(help="As for rank; by default all labels at which the activations of the two prompts can differ.")
    ] = "",
    top: of.Top = 12,
    out: of.Out = FOLDER,
    as_json: of.Json = False,
) -> None:
    """Rank the features behind a behaviour of the model that ships with featpatch.

    Example: featpatch demo --task capitals --pairs 16
    """
    with clear_errors():
        results = Output.open(out)
        screen = console(json=as_json)
        screen.print(f"loading the demo model and its SAEs, drawing {pairs} pairs of {task} (seed {seed})")
        shipped = fp.load_demo(progress=not as_json)
        drawn = shipped.pairs(task, n=pairs, seed=seed)
        decode = shipped.model.tokenizer.decode
        for name, prompt in (("clean", drawn[0].clean), ("corrupted", drawn[0].corrupted)):
            screen.print(f"  e.g. {name:<9} {decode(prompt, skip_special_tokens=True)}", highlight=False)
        screen.print(
            f"  answers: {decode(drawn[0].correct[:1])} (clean), {decode(drawn[0].wrong[:1])} (corrupted)", highlight=False
        )
        changed = [
            label for label in drawn[0].labels if any(max(pair.positions(label)) >= pair.first_difference for pair in drawn)
        ]
        asked = of.spans(positions or ",".join(changed))
        study = {"model": shipped.model, "saes": shipped.saes, "pairs": drawn, "positions": asked}
        if out != FOLDER:
            results.check_same({**study, "metric": "logit_diff", "directions": of.ways("both")}, kind="features")
        effects = fp.rank_features(**study, progress=not as_json)
        descriptions = fp.max_activating(shipped.model, shipped.saes, effects.top(top).nodes, shipped.text())
        show(screen, effects, of.Shown(top), results, study, descriptions, as_json=as_json)
