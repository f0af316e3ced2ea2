"""The command line: parse, call, print."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console

app = typer.Typer(
    name="featpatch", no_args_is_help=True, add_completion=True, pretty_exceptions_enable=False,
    help="Which SAE features cause this behaviour? Exact causal ranking, in both directions.",
)  # fmt: skip

Out = Annotated[Path, typer.Option(help="Folder for effects.safetensors, effects.csv and report.html.")]
Top = Annotated[int, typer.Option(min=1, help="How many features to show.")]
Positions = Annotated[
    str, typer.Option(help="'all' (each feature at all positions at once), 'each', or labels and indices such as 'S2,end,3'.")
]


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
        from featpatch.checkpoints import load_demo
        from featpatch.firing import describe

        console = _console()
        console.print(f"loading the demo model and its SAEs, drawing {pairs} pairs of [bold]{task}[/] (seed {seed})")
        shipped = load_demo()
        drawn = shipped.pairs(task, n=pairs, seed=seed)
        decode = shipped.model.tokenizer.decode
        for name, prompt in (("clean", drawn[0].clean), ("corrupted", drawn[0].corrupted)):
            console.print(f"  e.g. {name:<9} {decode(prompt, skip_special_tokens=True)}", highlight=False)
        console.print(
            f"  answers: {decode(drawn[0].correct[:1])} (clean), {decode(drawn[0].wrong[:1])} (corrupted)", highlight=False
        )
        effects = _rank(shipped.model, shipped.saes, drawn, positions or ",".join(drawn[0].labels))
        best = effects.top(top)
        _show(console, effects, top, out, describe(shipped.model, shipped.saes, best.nodes, shipped.text()))


@app.command()
def rank(
    model: Annotated[Path, typer.Option(help="Folder of a Hugging Face model with its tokenizer.")],
    sae: Annotated[list[Path], typer.Option(help="Folder of a sae-lens SAE or transcoder; may be given several times.")],
    pairs: Annotated[Path, typer.Option(help="JSON lines with clean, corrupted, correct, wrong and, if wanted, labels.")],
    positions: Positions = "all",
    direction: Annotated[Literal["both", "denoising", "noising"], typer.Option(help="Sufficient? Necessary?")] = "both",
    metric: Annotated[str, typer.Option(help="What to measure at the answer position.")] = "logit_diff",
    device: Annotated[str, typer.Option(help="Where to run, e.g. cpu or cuda.")] = "cpu",
    top: Top = 20,
    out: Out = Path("featpatch-out"),
) -> None:
    """Rank the features of your own SAEs on your own prompt pairs.

    Example: featpatch rank --model my-gpt2 --sae saes/blocks.8.hook_resid_pre --pairs pairs.jsonl --positions each
    """
    with _clear_errors():
        from featpatch.lens.load import load_bridge, load_sae
        from featpatch.pairs import Pairs

        console = _console()
        console.print(f"loading {model} and {len(sae)} SAE{'s' if len(sae) > 1 else ''}")
        bridge = load_bridge(model, device)
        loaded = [load_sae(path, device) for path in sae]
        own = Pairs.from_jsonl(bridge.tokenizer, pairs)
        directions = ("denoising", "noising") if direction == "both" else (direction,)
        _show(console, _rank(bridge, loaded, own, positions, metric=metric, directions=directions), top, out)


def _rank(model: Any, saes: Any, pairs: Any, positions: str, **options: Any) -> Any:
    from featpatch.patching import rank_features

    parts = [int(part) if part.isdecimal() else part for part in positions.split(",") if part]
    return rank_features(model, saes, pairs, positions=positions if positions in ("all", "each") else parts, **options)


def _show(console: Console, effects: Any, top: int, out: Path, descriptions: Mapping[Any, Any] | None = None) -> None:
    from featpatch.report import ranked, site_summary

    effects.save(out / "effects.safetensors")
    effects.to_pandas().to_csv(out / "effects.csv", index=False)
    console.print(
        f"metric {effects.metadata['metric']}: clean {effects.clean.mean():.2f}, corrupted {effects.corrupted.mean():.2f}"
    )
    console.print(ranked(effects.top(top), descriptions))
    for node, description in (descriptions or {}).items():
        console.print(f"{node}: " + "; ".join(description.contexts), highlight=False, markup=False)
    console.print(site_summary(effects))
    console.print(f"wrote effects.safetensors, effects.csv and report.html to {out}/")
    console.save_html(str(out / "report.html"))


def _console() -> Console:
    width = None if sys.stdout.isatty() else 160
    return Console(record=True, width=width)


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
