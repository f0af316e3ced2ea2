"""Cost of screening: estimates, the screened sweep and the full exact sweep in one run, and what screening missed.

    python benchmarks/screening.py              # the README's table, each of `RUNS` in a separate process
    python benchmarks/screening.py --shipped    # one of the runs

A run has either a model with random weights, pairs whose prompts differ in one token and a dictionary at hook_resid_pre of some
layers, or the shipped model with pairs of indirect objects. Every feature that differs is patched at every position, in both
directions. Times are CPU times of one thread.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from alone import alone
from shapes import SHAPES, dictionary, models

import featpatch as fp

TOP = 20
RUNS = ("--shipped", "--shape demo --layers 0 1 2 3 --pairs 32", "--shape gpt2-small --layers 2 6 10")


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the CPU seconds of a call, and its result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def drawn(vocabulary: int, length: int, pairs: int) -> fp.Pairs:
    """Draw pairs of random prompts that differ in one token, at a third of their length."""
    clean = torch.randint(3, vocabulary, (pairs, length), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[:, length // 3] = 3 + (clean[:, length // 3] - 2) % (vocabulary - 3)
    return fp.Pairs.from_tokens(clean, corrupted, torch.full((pairs,), 1), torch.full((pairs,), 2))


def report(model: Any, saes: list[Any], pairs: fp.Pairs, positions: Any, k: int, audit: int) -> None:
    """Measure and print the times of all three sweeps, and what the screened sweep found."""
    options: dict[str, Any] = {"positions": positions, "progress": False}
    fp.rank_features(model, saes, pairs[:1], screen=fp.Screen(k=TOP, audit=1), **options)
    estimating, estimate = timed(lambda: fp.rank_features(model, saes, pairs, method="atp", **options))
    screening, screened = timed(lambda: fp.rank_features(model, saes, pairs, screen=fp.Screen(k=k, audit=audit), **options))
    sweeping, full = timed(lambda: fp.rank_features(model, saes, pairs, **options))
    features = full.take(full.ranked)
    truth = {features.nodes[row] for row in np.argsort(-features.sizes(), kind="stable")[:TOP]}
    values = dict(zip(full.nodes, full.pooled("recovery"), strict=True))
    off = max(abs(values[node] - value) for node, value in zip(screened.nodes, screened.pooled("recovery"), strict=True))
    agreement = fp.calibrate(estimate, full).table(TOP).iloc[0]
    print(
        f"{len(features)} features in {len(pairs)} pairs: full exact sweep {sweeping:.1f} s; estimates {estimating:.1f} s "
        f"({sweeping / estimating:.1f} x faster, Pearson to exact {agreement['pearson']:.2f}); screened, {k} + {audit} "
        f"patched, {screening:.1f} s ({sweeping / screening:.1f} x faster than the full "
        f"sweep)\n{len(truth & set(screened.nodes))} of the true top {TOP} were patched; largest difference of an exact value "
        f"{off:.1e}\n{screened.audit(top=TOP)}"
    )
    found = {
        "features": len(features), "pairs": len(pairs), "full": sweeping, "estimates": estimating, "screened": screening,
        "k": k, "audit": audit, "run": len(truth & set(screened.nodes)),
    }  # fmt: skip
    print(json.dumps(found))


def table() -> None:
    """Run all of `RUNS`; print a Markdown table and how much faster estimates are in the last run."""
    found = [alone(__file__, *options.split()) for options in RUNS]
    counts = f"{found[0]['k']} + {found[0]['audit']}"
    print(
        f"| options | full exact sweep | estimates | screened, {counts} | of the true top {TOP} patched |\n" + "|---" * 5 + "|"
    )
    for options, of in zip(RUNS, found, strict=True):
        size = f"{of['features']} features, {of['pairs']} pair{'s' * (of['pairs'] > 1)}"
        seconds = " | ".join(f"{of[name]:.1f} s" for name in ("full", "estimates", "screened"))
        print(f"| `{options}` ({size}) | {seconds} | {of['run']} |")
    print(f"{found[-1]['full'] / found[-1]['estimates']:.0f} x faster for a ranking")


def main() -> None:
    """Measure one run and print the results, with a last line that `table` reads; without options, print the table."""
    if len(sys.argv) == 1:
        table()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="demo")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--layers", type=int, nargs="+", default=[2])
    parser.add_argument("--k", type=int, default=200)
    parser.add_argument("--audit", type=int, default=100)
    parser.add_argument("--shipped", action="store_true", help="use the shipped model, with 32 pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.shipped:
        demo = fp.load_demo()
        report(demo.model, demo.saes, demo.pairs("ioi", n=32), ["S2", "end"], options.k, options.audit)
        return
    shape = SHAPES[options.shape]
    model = models(shape, options.tokens, "cpu")["TransformerBridge"]
    saes = [dictionary(replace(shape, layer=layer), "cpu") for layer in options.layers]
    report(model, saes, drawn(shape.vocab, options.tokens, options.pairs), "each", options.k, options.audit)


if __name__ == "__main__":
    main()
