"""Cost of one exact patch: featpatch against the loops that users write, in one run, with the results compared.

    python benchmarks/sweep.py                                    # the README's table, each of `RUNS` in a separate process
    python benchmarks/sweep.py --shape gpt2-small --tokens 20     # one of the runs
    python benchmarks/sweep.py --model real                       # SmolLM2-135M-Instruct instead, see `real_sweep.py`

The prompts of a pair differ in one token. Every feature that differs is patched at every position (with --every, at some of
them), in both directions. Times are CPU times of one thread (wall times on a GPU). The loops are timed on patches drawn at
random, between the repeats of featpatch, and their results are compared with featpatch's for the same patches. Reported are
medians over the repeats.

    (a) SAELens: HookedSAETransformer, use_error_term, the feature set by a hook on hook_sae_acts_post, one forward per patch
    (b) TransformerLens: the feature's change added by a hook, one forward per patch
    (c) the same in batches of 32
    limit: the matrix products that the patches need (positions from the patched one on, layers from the hook point on, only
           keys and values of all rows in the last layer), at the rate that a matrix product of 1024 rows (on a GPU, 16,384)
           reaches here
    with GELU: the same and the activation functions of the MLPs, at the rate that they reach here

Each run also times features that write to the outputs of three MLPs beside the same features that write to the lowest alone.
"""

import argparse
import json
import random
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from alone import alone
from bound import bound
from loops import Products, gelu_rate, hook_loop, matrix_rate, saelens_loop, timed
from memory import peak_of
from shapes import SHAPES, Shape, dictionary, models

import featpatch as fp

ANSWERS = 1, 2
"""The right and the wrong answer of every pair."""
RUNS = (
    "--shape gpt2-small --tokens 20",
    "--shape demo --tokens 20 --pairs 32",
    "--shape gpt2-small --tokens 256 --change 240 --repeats 2 --loop 2",
    "--shape gpt2-small --tokens 256 --change 77 --every 32 --repeats 1 --loop 2",
)


def crosscoder(shape: Shape, hooks: int, device: str) -> fp.dictionaries.Crosscoder:
    """Return a random crosscoder that reads the residual stream and writes to the outputs of `hooks` MLPs from there on."""
    generator = torch.Generator().manual_seed(4)
    sizes = {"W_enc": (1, shape.width, shape.d_sae), "W_dec": (hooks, shape.d_sae, shape.width)}
    weights = {name: torch.randn(size, generator=generator) / shape.width**0.5 for name, size in sizes.items()}
    return fp.dictionaries.Crosscoder(
        **{name: weight.to(device) for name, weight in weights.items()}, b_enc=torch.zeros(shape.d_sae, device=device),
        b_dec=torch.zeros(hooks, shape.width, device=device), hook=[f"blocks.{shape.layer}.hook_resid_pre"],
        hook_out=[f"blocks.{shape.layer + above}.hook_mlp_out" for above in range(hooks)], activation="topk", k=shape.k,
    )  # fmt: skip


def several(shape: Shape, model: Any, pairs: fp.Pairs, positions: list[int], repeats: int, device: str) -> float:
    """Return how much more a patch at three hook points costs than one at the lowest of them, in turns."""
    shape, hooks = replace(shape, layer=min(shape.layer, shape.layers - 3)), 3
    seconds: dict[int, list[float]] = {1: [], hooks: []}
    for repeat in range(repeats + 1):
        for number, of_number in seconds.items():
            made = crosscoder(shape, number, device)
            took, effects = timed(
                lambda made=made: fp.rank_features(model, made, pairs, positions=positions, progress=False), device
            )
            if repeat:  # the first one of each warms up
                of_number.append(took / len(effects.row))
    return statistics.median(seconds[hooks]) / statistics.median(seconds[1])


def table() -> None:
    """Run all of `RUNS`; print a Markdown table and the README's sentences about it."""
    found = [alone(__file__, *options.split()) for options in RUNS]
    print("| options | model class | per patch | of the limit | with GELU | faster than (a) | than (b) | than (c) |")
    print("|---" * 8 + "|")
    for options, of in zip(RUNS, found, strict=True):
        for name, ms in of["ms"].items():
            times = " | ".join(f"{of['loops'][loop] / ms:.1f} x" for loop in "abc")
            print(f"| `{options}` | {name} | {ms:.3f} ms | {ms / of['limit']:.2f} x | {ms / of['with GELU']:.2f} x | {times} |")
    peaks = [f"{of['peak']:.0f} MB" for of in found[:3]]
    print(f"No result differs from a loop's by more than {bound(max(of['difference'] for of in found))} of the largest logit.")
    print(
        f"The peak of a sweep lies {', '.join(peaks[:2])} and {peaks[2]} above what was in use before (the first three "
        "commands)."
    )
    ratios = ", ".join(f"{of['several']:.2f}" for of in found)
    print(f"A patch at three hook points takes {ratios} times as long as one at the lowest of them.")
    ms = found[0]["ms"]["TransformerBridge"]
    a, b, c = (f"{found[0]['loops'][loop] / ms:.0f} x" for loop in "abc")
    print(f"{a} slower, one by one\n{b} slower one by one, {c} slower in batches of 32\n{ms:.1f} ms on one CPU thread")


def main() -> None:
    """Measure one run and print the results, with a last line that `table` reads; without options, print the table."""
    if len(sys.argv) == 1:
        table()
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", choices=["real"], help="the real model instead of one with random weights")
    parser.add_argument("--folder", type=Path, help="folder of the real model; by default that of examples/real_model")
    parser.add_argument("--saes", type=Path, help="folder of the real model's SAEs, one folder per hook point; as above")
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--change", type=int, help="position of the token that differs; the middle by default")
    parser.add_argument("--every", type=int, default=1, help="patch at every so-manieth position from the change on")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--loop", type=int, default=6, help="patches per repeat of the loops (a) and (b)")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.model:
        from real_sweep import real

        real(options.folder, options.saes, options.repeats, options.loop)
        return
    shape, device, length = SHAPES[options.shape], options.device, options.tokens
    change = length // 2 if options.change is None else options.change
    built, sae = models(shape, max(64, length), device), dictionary(shape, device)
    hook, hooked = sae.cfg.metadata.hook_name, built["HookedTransformer"]

    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(3, shape.vocab, (options.pairs, length), generator=generator)
    corrupted = clean.clone()
    corrupted[:, change] = (clean[:, change] + 1) % shape.vocab
    answers = (torch.full((options.pairs,), answer) for answer in ANSWERS)
    pairs = fp.Pairs.from_tokens(clean, corrupted, *answers)
    with torch.no_grad():
        at = [hooked.run_with_cache(tokens[:1].to(device), names_filter=hook)[1][hook] for tokens in (clean, corrupted)]
        f_clean, f_corrupted = (sae.encode(x)[0] for x in at)

    def ours(model: Any) -> fp.Effects:
        return fp.rank_features(model, sae, pairs, positions=[*range(change, length, options.every)], progress=False)

    first = {name: peak_of(lambda model=model: ours(model), device) for name, model in built.items()}
    effects, peak = {name: table for name, (table, _) in first.items()}, max(memory for _, memory in first.values())
    first_table = effects["HookedTransformer"]
    patches = 2 * len(first_table.row)
    rows = 2 * sum(length - int(first_table.nodes[row].position) for row in first_table.row)
    needed = Products.of(shape).needed(shape.layers - shape.layer, rows, patches, patches)
    draw = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in (*built, "a", "b", "c")}
    differences: dict[str, float] = dict.fromkeys(("a", "b", "c"), 0.0)
    tokens = corrupted[:1].to(device)
    for _ in range(options.repeats):
        for name, model in built.items():
            seconds, effects[name] = timed(lambda model=model: ours(model), device)
            times[name].append(seconds / patches)
        alone = effects["HookedTransformer"].of_pairs([0])
        values = dict(zip(alone.nodes, alone.denoised.tolist(), strict=True))
        features = [node for node in alone.nodes if node.kind == "feature"]
        few, many = draw.sample(features, options.loop), draw.sample(features, 64)
        changes = {
            node: (int(node.position), (f_clean - f_corrupted)[node.position, node.index] * sae.W_dec[node.index])
            for node in [*few, *many]
        }
        asked = [(node.index, int(node.position), float(f_clean[node.position, node.index])) for node in few]
        for name, drawn, run in (
            ("a", few, lambda asked=asked: saelens_loop(hooked, sae, tokens, ANSWERS, asked)),
            ("b", few, lambda few=few, changes=changes: hook_loop(hooked, hook, tokens, ANSWERS, [changes[n] for n in few], 1)),
            (
                "c",
                many,
                lambda many=many, changes=changes: hook_loop(hooked, hook, tokens, ANSWERS, [changes[n] for n in many], 32),
            ),
        ):
            seconds, found = timed(run, device)
            times[name].append(seconds / len(drawn))
            worst = max(abs(values[node] - value) for node, value in zip(drawn, found, strict=True))
            differences[name] = max(differences[name], worst)
    rate = matrix_rate(shape.width, 4 * shape.width, device)
    with torch.no_grad():
        largest = float(hooked(tokens).abs().max())
    median = {name: statistics.median(values) for name, values in times.items()}
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else "one CPU thread"
    print(f"{options.shape}, {options.pairs} x {length} tokens, token {change} differs, on {where}")
    print(f"site: entry of block {shape.layer} of {shape.layers}; TopK dictionary of {shape.d_sae} features, k = {shape.k}")
    print(f"{patches} patches, {rows / patches:.1f} rows each, {needed / patches / 1e9:.3f} GFLOP each in matrix products")
    limit = needed / patches / rate
    activated = 4 * shape.width * (rows * (shape.layers - shape.layer - 1) + patches)
    with_gelu = limit + activated / patches / gelu_rate(4 * shape.width, device)
    print(f"limit: {limit * 1e3:.3f} ms per patch at {rate / 1e9:.0f} GFLOP/s; with GELU {with_gelu * 1e3:.3f} ms")
    for name in built:
        print(
            f"featpatch, {name}: {median[name] * 1e3:.3f} ms per patch, {median[name] / limit:.2f} x limit, "
            f"{median[name] / with_gelu:.2f} x with GELU; "
            + ", ".join(f"{median[loop] / median[name]:.1f} x faster than ({loop})" for loop in "abc")
        )
    print("; ".join(f"({loop}) {median[loop] * 1e3:.1f} ms" for loop in "abc"))
    worst = ", ".join(f"({loop}) {value / largest:.1e}" for loop, value in differences.items())
    print(f"largest difference to the loops, over the largest logit {largest:.1f}: {worst}")
    print(f"extra memory at the peak of a sweep: {peak:.0f} MB")
    positions = [*range(change, length, options.every)]
    ratio = several(shape, built["TransformerBridge"], pairs, positions, options.repeats, device)
    print(f"features that write to three MLPs' outputs: {ratio:.2f} x the time of the same at the lowest")
    found = {
        "ms": {name: median[name] * 1e3 for name in built}, "loops": {loop: median[loop] * 1e3 for loop in "abc"},
        "limit": limit * 1e3, "with GELU": with_gelu * 1e3, "difference": max(differences.values()) / largest, "peak": peak,
        "several": ratio,
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
