"""The command line: parse, call, print."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

import featpatch as fp

app = typer.Typer(
    name="featpatch", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="Which SAE features cause this behaviour? Exact causal ranking, in both directions.",
)  # fmt: skip

Out = Annotated[Path, typer.Option(help="Folder for effects.safetensors, effects.csv and report.html.")]
Top = Annotated[int, typer.Option(min=1, help="How many features to show.")]
Positions = Annotated[
    str, typer.Option(help="'all' (each feature at all positions at once), 'each', or labels and indices such as 'S2,end,3'.")
]


Model = Annotated[str, typer.Option(help="Name on the hub, or folder of a Hugging Face model with its tokenizer.")]
Saes = Annotated[
    list[str],
    typer.Option(help="release/id of sae-lens' registry, owner/repository/folder on the hub, or a folder. Repeatable."),
]
PairsFile = Annotated[Path, typer.Option(help="JSON lines with clean, corrupted, correct, wrong and, if wanted, labels.")]
Directions = Annotated[Literal["both", "denoising", "noising"], typer.Option(help="Sufficient? Necessary?")]
MetricNames = Annotated[
    list[str], typer.Option("--metric", help="What to measure. Repeatable: all are read off the same patched runs.")
]
LOGIT_DIFF = ["logit_diff"]
Device = Annotated[str, typer.Option(help="Where to run, e.g. cpu or cuda.")]


@app.command()
def demo(
    task: Annotated[
        Literal["ioi", "capitals", "greater_than", "sentiment"], typer.Option(help="Behaviour to explain.")
    ] = "ioi",
    pairs: Annotated[int, typer.Option(min=1, help="How many prompt pairs.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed that draws the pairs.")] = 0,
    positions: Positions = "",
    top: Top = 12,
    out: Out = Path("featpatch-demo"),
) -> None:
    """Rank the features behind a behaviour of the model that ships with featpatch.

    Example: featpatch demo --task capitals --pairs 16
    """
    with _clear_errors():
        _check_folder(out)
        console = _console()
        console.print(f"loading the demo model and its SAEs, drawing {pairs} pairs of [bold]{task}[/] (seed {seed})")
        shipped = fp.load_demo()
        drawn = shipped.pairs(task, n=pairs, seed=seed)
        decode = shipped.model.tokenizer.decode
        for name, prompt in (("clean", drawn[0].clean), ("corrupted", drawn[0].corrupted)):
            console.print(f"  e.g. {name:<9} {decode(prompt, skip_special_tokens=True)}", highlight=False)
        console.print(
            f"  answers: {decode(drawn[0].correct[:1])} (clean), {decode(drawn[0].wrong[:1])} (corrupted)", highlight=False
        )
        asked = _positions(positions or ",".join(drawn[0].labels))
        effects = fp.rank_features(shipped.model, shipped.saes, drawn, positions=asked)
        best = effects.top(top)
        descriptions = fp.describe(shipped.model, shipped.saes, best.nodes, shipped.text())
        _show(console, effects, top, out, {"model": shipped.model, "saes": shipped.saes, "pairs": drawn}, descriptions)


@app.command()
def rank(
    model: Model,
    sae: Saes,
    pairs: PairsFile,
    positions: Positions = "all",
    direction: Directions = "both",
    metric: MetricNames = LOGIT_DIFF,
    device: Device = "cpu",
    top: Top = 20,
    out: Out = Path("featpatch-out"),
    journal: Annotated[Path | None, typer.Option(help="File from which an interrupted sweep goes on.")] = None,
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
) -> None:
    """Rank the features of your own SAEs on your own prompt pairs. Ctrl-C shows what is finished.

    Example: featpatch rank --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --pairs pairs.jsonl --positions each
    """
    with _clear_errors():
        _check_folder(out)
        console = _console()
        console.print(f"loading {model} and {len(sae)} SAE{'s' if len(sae) > 1 else ''}")
        work = _own(console, model, sae, pairs, positions, direction, metric, device)
        effects = fp.rank_features(**work, exact=exact, k=k, audit=audit, target=target, journal=journal)
        _show(console, effects, top, out, {name: work[name] for name in ("model", "saes", "pairs")})


@app.command()
def plan(
    model: Model,
    sae: Saes,
    pairs: PairsFile,
    positions: Positions = "all",
    direction: Directions = "both",
    metric: MetricNames = LOGIT_DIFF,
    device: Device = "cpu",
) -> None:
    """Estimate what `rank` with the same options will take: patches, operations, memory, time.

    Example: featpatch plan --model my-gpt2 --sae saes/blocks.8.hook_resid_pre --pairs pairs.jsonl --positions each
    """
    with _clear_errors():
        from featpatch.terminal import planned

        console = _console()
        console.print(planned(fp.plan(**_own(console, model, sae, pairs, positions, direction, metric, device))))


@app.command()
def report(
    effects: Annotated[Path, typer.Argument(help="effects.safetensors, as rank writes it.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    components: Annotated[Path | None, typer.Option(help="Effects of components, for the maps.")] = None,
) -> None:
    """Write a table of effects as one HTML file. `rank` and `demo` write theirs with prompts and features.

    Example: featpatch report featpatch-out/effects.safetensors --out report.html
    """
    with _clear_errors():
        others = None if components is None else fp.Effects.load(components)
        path = fp.Effects.load(effects).report(out, components=others)
        _console().print(f"wrote {path}")


@app.command()
def check(
    pairs: Annotated[Path, typer.Argument(help="JSON lines, as for rank.")],
    model: Model,
    metric: Annotated[
        Literal["logit_diff", "prob_diff", "sequence_log_prob_diff"],
        typer.Option(help="What tells the answers apart; the last one takes answers of several tokens."),
    ] = "logit_diff",
    device: Device = "cpu",
    top: Annotated[int, typer.Option(min=1, help="How many pairs to show.")] = 12,
    out: Annotated[Path | None, typer.Option(help="File for a CSV of all findings.")] = None,
) -> None:
    """Check prompt pairs against the model: is each one clean contrast? Exits with 1 where a pair fails.

    Example: featpatch check pairs.jsonl --model gpt2
    """
    with _clear_errors():
        from featpatch.terminal import by_pair, totals

        console = _console()
        loaded = fp.load(model, device=device).model
        drawn = fp.Pairs.from_jsonl(loaded.tokenizer, pairs, long_answers=_of_sequences([metric]))
        found = drawn.check(loaded) if metric == "sequence_log_prob_diff" else drawn.check(loaded, metric=metric)
        console.print(
            by_pair(found, lambda pair: str(loaded.tokenizer.decode(drawn[pair].clean, skip_special_tokens=True)), top)
        )
        console.print(totals(found))
        if out is not None:
            found.to_pandas().to_csv(out, index=False)
        if not found.ok:
            raise typer.Exit(1)


def _own(
    console: Console, model: str, sae: list[str], pairs: Path, positions: str, direction: str, metric: list[str], device: str
) -> dict[str, Any]:
    """The arguments that `rank_features` and `plan` share; prints how the SAEs fit the model."""
    from featpatch.terminal import checked

    loaded = fp.load(model, sae, device=device, check=False)
    drawn = fp.Pairs.from_jsonl(loaded.model.tokenizer, pairs, long_answers=_of_sequences(metric))
    console.print(checked(fp.check(loaded.model, loaded.saes, drawn)))
    return {
        "model": loaded.model,
        "saes": loaded.saes,
        "pairs": drawn,
        "positions": _positions(positions),
        "directions": ("denoising", "noising") if direction == "both" else (direction,),
        "metric": metric,
    }


def _of_sequences(metric: list[str]) -> bool:
    return all(name.startswith("sequence_") for name in metric)


def _positions(text: str) -> str | list[int | str]:
    parts = [int(part) if part.isdecimal() else part for part in text.split(",") if part]
    return text if text in ("all", "each") else parts


def _show(
    console: Console, effects: Any, top: int, out: Path, study: Mapping[str, Any], descriptions: Mapping[Any, Any] | None = None
) -> None:
    from featpatch.terminal import ranked, site_summary

    effects.save(out / "effects.safetensors")
    effects.to_pandas().to_csv(out / "effects.csv", index=False)
    for name in effects.metrics:
        of = effects.metric(name)
        console.print(f"metric {name}: clean {of.clean.mean():.2f}, corrupted {of.corrupted.mean():.2f}")
    if not effects.finished:
        console.print(f"interrupted: what follows is finished, on {len(effects.clean)} pairs", style="yellow")
    console.print(ranked(effects.top(top), descriptions))
    for node, description in (descriptions or {}).items():
        console.print(f"{node}: " + "; ".join(description.contexts), highlight=False, markup=False)
    console.print(site_summary(effects))
    if "screening" in effects.metadata:
        console.print(repr(effects.audit(top=min(top, effects.metadata["screening"]["k"]))), highlight=False)
    console.print(f"wrote effects.safetensors, effects.csv and report.html to {out}/")
    fp.report(effects, out / "report.html", top=top, **study)


def _check_folder(out: Path) -> None:
    from featpatch.errors import FeatpatchError

    if out.exists() and not out.is_dir():
        raise FeatpatchError(f"--out {str(out)!r} is a file: expected a folder for the results, new or existing")


def _console() -> Console:
    width = None if sys.stdout.isatty() else 176
    return Console(width=width)


@contextmanager
def _clear_errors() -> Iterator[None]:
    from featpatch.errors import FeatpatchError

    try:
        yield
    except FeatpatchError as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
