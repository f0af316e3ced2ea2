"""The command `featpatch check`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import featpatch as fp
from featpatch.cli import options as of
from featpatch.cli.app import app, clear_errors, console
from featpatch.files import check_writable, write_csv


@app.command()
def check(
    model: of.Model,
    pairs: of.PairsFile,
    metric: Annotated[
        Literal["logit_diff", "prob_diff", "sequence_log_prob_diff"],
        typer.Option(help="What tells the answers apart; the last one takes answers of several tokens."),
    ] = "logit_diff",
    device: of.Device = "cpu",
    top: Annotated[int, typer.Option(min=1, help="How many pairs to show.")] = 12,
    sae: Annotated[list[str] | None, typer.Option(help="An SAE that is to fit the model, as for rank. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="File for a CSV of all findings.")] = None,
    as_json: of.Json = False,
) -> None:
    """Check prompt pairs against the model: is each one clean contrast? With --sae: does each SAE fit the model?

    Exits with 1 where a pair fails, or an SAE does not fit or explains less than its configuration claims.

    Example: featpatch check --model gpt2 --pairs pairs.jsonl
    """
    with clear_errors():
        if out is not None:
            check_writable(out)
        from featpatch.terminal import by_pair, checked, totals

        loaded, saes = fp.load(model, sae, device=device, check=False, progress=not as_json)
        drawn = fp.Pairs.from_jsonl(loaded, pairs, long_answers=of.of_sequences([metric]))
        found = drawn.check(loaded) if metric == "sequence_log_prob_diff" else drawn.check(loaded, metric=metric)
        fits = fp.check(loaded, saes, drawn) if saes else None
        if as_json:
            typer.echo(found.to_pandas().to_json(orient="records", indent=1))
            if fits is not None:
                console(json=True).print(repr(fits), highlight=False)
        else:
            screen = console()
            screen.print(
                by_pair(found, lambda pair: str(loaded.tokenizer.decode(drawn[pair].clean, skip_special_tokens=True)), top)
            )
            screen.print(totals(found))
            if fits is not None:
                screen.print(checked(fits))
        if out is not None:
            write_csv(out, found.to_pandas())
        if not (found.ok and (fits is None or fits.ok)):
            raise typer.Exit(1)
