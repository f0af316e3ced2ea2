"""Growth of the cost of a sweep with features, positions, layers to run and pairs, as a table and a plot.

    python benchmarks/growth.py [--out build/growth.svg]

The model has the width of GPT-2 small, six layers and random weights. Times are CPU times of one thread. One quantity varies
while the others are constant. "Extra MB" is the peak memory of the sweep minus the memory in use when it began.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import torch
from memory import peak_of
from plotly.subplots import make_subplots
from rich.console import Console
from rich.table import Table
from shapes import SHAPES, Shape, dictionary, models

import featpatch as fp

BASE = replace(SHAPES["gpt2-small"], layers=6, layer=2, vocab=5000, d_sae=4096)
GROWS: dict[str, list[dict[str, Any]]] = {
    "active features (k)": [{"k": k} for k in (8, 16, 32, 64)],
    "positions": [{"tokens": tokens} for tokens in (10, 20, 40, 80)],
    "layers to run": [{"layer": layer} for layer in (4, 3, 2, 0)],
    "pairs": [{"pairs": pairs} for pairs in (1, 2, 4, 8)],
}


def sweep(shape: Shape, tokens: int, pairs: int) -> tuple[int, int, float, float]:
    """Return the patches, rows, CPU seconds and extra memory in MB of one sweep after a warm-up."""
    model, sae = models(shape, 128, "cpu")["TransformerBridge"], dictionary(shape, "cpu")
    clean = torch.randint(3, shape.vocab, (pairs, tokens), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, tokens // 2] = (clean[:, tokens // 2] + 1) % shape.vocab
    asked = fp.Pairs.from_tokens(clean, corrupted, torch.ones(pairs).long(), 2 * torch.ones(pairs).long())
    fp.rank_features(model, sae, asked[:1], positions=[tokens // 2], progress=False)
    plan = fp.plan(model, sae, asked, positions="each")
    start = time.process_time()
    _, memory = peak_of(lambda: fp.rank_features(model, sae, asked, positions="each", progress=False))
    return plan.patches, plan.rows, time.process_time() - start, memory


def main() -> None:
    """Measure all sweeps, print the table and write the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", default="build/growth.svg", help="file for the plot: .html, or .svg or .png if plotly's exporter is installed"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("grows", "to", "patches", "rows", "CPU s", "ms per patch", "us per row", "extra MB")
    per_block: list[float] = []
    figure = make_subplots(1, len(GROWS), subplot_titles=list(GROWS))
    for column, (name, values) in enumerate(GROWS.items(), 1):
        at, seconds = [], []
        for value in values:
            sizes = {"tokens": 20, "pairs": 1, **value}
            shape = replace(BASE, **{key: size for key, size in sizes.items() if key not in ("tokens", "pairs")})
            patches, rows, spent, memory = sweep(shape, sizes["tokens"], sizes["pairs"])
            (size,) = value.values()
            at.append(BASE.layers - size if "layer" in value else size)
            seconds.append(spent)
            per_block.append(spent / rows / (BASE.layers - shape.layer))
            table.add_row(
                name, str(at[-1]), f"{patches:,}", f"{rows:,}", f"{spent:.2f}", f"{spent / patches * 1e3:.2f}",
                f"{spent / rows * 1e6:.0f}", f"{memory:.0f}",
            )  # fmt: skip
        figure.add_trace(go.Scatter(x=at, y=seconds, mode="lines+markers", name=name), 1, column)
        figure.update_xaxes(title=name, row=1, col=column)
    figure.update_yaxes(title="CPU seconds", rangemode="tozero", col=1)
    figure.update_layout(width=1400, height=400, showlegend=False, template="plotly_white")
    Console().print(table)
    print(f"at a nearly constant time per row and layer ({min(per_block) * 1e6:.0f} us to {max(per_block) * 1e6:.0f} us)")
    Path(options.out).parent.mkdir(exist_ok=True)
    if options.out.endswith(".html"):
        figure.write_html(options.out, include_plotlyjs=True)
    else:
        figure.write_image(options.out)


if __name__ == "__main__":
    main()
