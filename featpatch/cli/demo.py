"""The command `featpatch demo`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import START, app, bars, clear_errors, console
from featpatch.cli.output import Output, show
from featpatch.errors import counted

FOLDER = Path("featpatch-demo")
"""The default folder for the results, where the results of an earlier demo are always replaced."""

ENOUGH = 0.8
"""The share of the behaviour that is explained with as few features as possible."""

OTHERS = {"sentiment": "ioi"}
"""The task to try after another one; sentiment by default."""


@app.command(rich_help_panel=START)
def demo(
    task: Annotated[
        Literal["ioi", "capitals", "greater_than", "sentiment"], typer.Option(help="Behaviour to explain.")
    ] = "sentiment",
    pairs: Annotated[int, typer.Option(min=1, max=256, help="How many prompt pairs.")] = 16,
    seed: Annotated[int, typer.Option(help="Random seed for drawing the pairs.")] = 0,
    positions: Annotated[
        str, typer.Option(help="As for rank; by default all labels at which the activations of the two prompts can differ.")
    ] = "",
    top: of.Top = 10,
    out: of.Out = FOLDER,
    as_json: of.Json = False,
) -> None:
    """Find out which features cause a behaviour of the small model that ships with featpatch.

    Example: featpatch demo --task capitals --pairs 16
    """
    with clear_errors():
        results = Output.open(out)
        screen = console(json=as_json)
        screen.print(f"loading the demo model and its SAEs, drawing {counted(pairs, 'pair')} of {task} (seed {seed})")
        shipped = fp.load_demo(progress=bars(json=as_json))
        drawn = shipped.pairs(task, n=pairs, seed=seed)
        decode = shipped.model.tokenizer.decode
        for name, prompt, answers in (
            ("clean", drawn[0].clean, drawn[0].correct),
            ("corrupted", drawn[0].corrupted, drawn[0].wrong),
        ):
            screen.print(f"  {name:<9} {decode(prompt, skip_special_tokens=True)} -> {decode(answers[:1])}", highlight=False)
        changed = [
            label for label in drawn[0].labels if any(max(pair.positions(label)) >= pair.first_difference for pair in drawn)
        ]
        asked = of.spans(positions or ",".join(changed))
        of.check_labels(asked, [(f"pair {number}", pair.labels) for number, pair in enumerate(drawn)])
        study = {"model": shipped.model, "saes": shipped.saes, "pairs": drawn, "positions": asked}
        if out != FOLDER:
            results.check_same({**study, "metric": "logit_diff", "directions": of.ways("both")}, kind="features")
        effects = fp.rank_features(**study, progress=bars(json=as_json))
        told = () if as_json or not effects.finished else tuple(_story(effects, shipped, drawn, top))
        show(screen, effects, of.Shown(top), results, study, told=told, as_json=as_json)
        if not as_json:
            screen.print(
                f"open {out / 'report.html'} in a browser, then try\n"
                f"  featpatch demo --task {OTHERS.get(task, 'sentiment')}\n"
                "  featpatch rank --help   for your own model, SAEs and prompts"
            )


def _story(effects: "fp.Effects", shipped: Any, pairs: "fp.Pairs", top: int) -> Iterator[Any]:
    """Yield what the effects say: a conclusion, the first rows, what activates them, and how many features are enough."""
    from featpatch import sites
    from featpatch.reporting.terminal import detected, ranked, selected_together, steps

    rows = effects.top(top)
    if not len(rows):
        yield "\nNo feature differs between the runs at these positions, so none of them causes the behaviour there.\n"
        return
    first, last = rows.nodes[0], sites.resid_post(shipped.model.cfg.n_layers - 1)
    sae = next(sae for sae in shipped.saes if first.sae.endswith(sae.cfg.metadata.hook_name_out or sae.cfg.metadata.hook_name))
    chosen = fp.select_features(shipped.model, sae, pairs, target=ENOUGH, position=first.position, progress=False)
    described = fp.max_activating(shipped.model, shipped.saes, [*rows.nodes, *chosen.nodes], shipped.text())
    place = f"{sites.short_dictionary(first.sae)} @ {first.position}" + " (after the last layer)" * (first.site == last)
    yield f"\n{selected_together(chosen, place, [described[node] for node in chosen.nodes])}\n"
    yield f"metric {effects.metadata['metric']}: clean {effects.clean.mean():.2f}, corrupted {effects.corrupted.mean():.2f}"
    yield ranked(rows)
    yield "\n".join(["\nwhat the features detect:", *detected({node: described[node] for node in rows.nodes})])
    yield f"\n{steps(chosen)}\n"
