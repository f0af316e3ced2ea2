"""Which heads of SmolLM2 carry capitals at the last word? `python -m examples.real_model.capitals`, after the model is prepared.

The pairs differ in the country: "The capital of France is" against "The capital of Germany is", and the answer is Paris against
Berlin. A head's recovery is the share of the difference of the two answers' logits that its clean output at the last word
brings back in the run of the other prompt (denoising, exact).
"""

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

import featpatch as fp
from featpatch.cli.app import clear_errors
from featpatch.reporting.terminal import ranked

from .prepare import LABEL, MODEL, load
from .tasks import capitals


def main(
    folder: Annotated[Path, typer.Option("--model", help="Folder of the prepared model.")] = MODEL,
    heads: Annotated[int, typer.Option(help="Number of heads to show.")] = 8,
) -> None:
    """Print how well the model knows capitals, and the heads that carry them at the last word."""
    torch.set_num_threads(1)
    with clear_errors():
        console, start = Console(width=130), time.perf_counter()
        model = load(folder)
        pairs = capitals(model)
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
