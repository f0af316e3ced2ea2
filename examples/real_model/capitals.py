"""Which heads of SmolLM2 carry capitals at the last word? `python -m examples.real_model.capitals`, after the model is prepared.

The pairs differ in the country: "The capital of France is" against "The capital of Germany is", and the answer is Paris against
Berlin. A head's recovery is the share of the difference of the two answers' logits that its clean output at the last word
brings back in the run of the other prompt (denoising, exact).
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import featpatch as fp
from featpatch.cli.app import clear_errors
from featpatch.errors import FeatpatchError
from featpatch.reporting.terminal import ranked

from .prepare import LABEL, MODEL

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon", "Greece": "Athens",
    "Poland": "Warsaw", "Sweden": "Stockholm", "Norway": "Oslo", "Denmark": "Copenhagen", "Hungary": "Budapest",
    "Russia": "Moscow", "Egypt": "Cairo", "Iran": "Tehran", "China": "Beijing", "Japan": "Tokyo",
}  # fmt: skip
"""Countries and capitals that are one token each in SmolLM2's vocabulary."""
PROMPT = "The capital of {} is"


def pairs_of(model: Any) -> fp.Pairs:
    """Make a pair for each country, with the next country of the list in the corrupted prompt."""
    countries = list(CAPITALS)
    others = [*countries[1:], countries[0]]
    return fp.Pairs.from_prompts(
        model,
        clean=[PROMPT.format(country) for country in countries],
        corrupted=[PROMPT.format(country) for country in others],
        correct=[f" {CAPITALS[country]}" for country in countries],
        wrong=[f" {CAPITALS[country]}" for country in others],
        labels=[{"subject": country} for country in countries],
    )


def load(folder: Path) -> Any:
    """Load the prepared model.

    Raises:
        FeatpatchError: it has not been prepared.
    """
    if not (folder / "config.json").is_file():
        raise FeatpatchError(
            f"there is no model in {str(folder)!r}: expected it to be prepared; run `python -m examples.real_model`"
        )
    return fp.load(folder, progress=False).model


def main(
    folder: Annotated[Path, typer.Option("--model", help="Folder of the prepared model.")] = MODEL,
    heads: Annotated[int, typer.Option(help="Number of heads to show.")] = 8,
) -> None:
    """Print how well the model knows capitals, and the heads that carry them at the last word."""
    torch.set_num_threads(1)
    with clear_errors():
        console, start = Console(width=130), time.perf_counter()
        model = load(folder)
        pairs = pairs_of(model)
        print(f"{LABEL}: loaded in {time.perf_counter() - start:.0f} s; {pairs}")
        print(pairs.check(model))
        start = time.perf_counter()
        effects = fp.rank_components(model, pairs, sites="z", positions=[-1], directions=["denoising"], progress=False)
        seconds = time.perf_counter() - start
        print(f"logit difference: clean {effects.clean.mean():.2f}, corrupted {effects.corrupted.mean():.2f}")
        console.print(ranked(effects.top(heads)))
        print(f"{len(effects)} heads patched in {len(pairs)} pairs, in {seconds:.0f} s on one thread.")


if __name__ == "__main__":
    typer.run(main)
