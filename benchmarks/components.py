"""Cost of one exact component patch: featpatch against TransformerLens' own patching functions, with the results compared.

    python benchmarks/components.py [--shape demo] [--tokens 20]

There is one pair whose prompts differ in one token. featpatch runs every patch of a component, by position, in both directions,
including checks and base runs; TransformerLens' function runs some of them in the denoising direction, with one forward pass
each. Times are CPU times of one thread.
"""

import argparse
import random
import time
from functools import partial
from typing import Any

import pandas as pd
import torch
from bound import bound
from shapes import SHAPES, models
from transformer_lens import patching

import featpatch as fp

CORRECT, WRONG = 1, 2
THEIRS: dict[str, Any] = {
    "resid_pre": patching.get_act_patch_resid_pre,
    "mlp_out": patching.get_act_patch_mlp_out,
    "z": patching.get_act_patch_attn_head_out_by_pos,
    "q": patching.get_act_patch_attn_head_q_by_pos,
    "k": patching.get_act_patch_attn_head_k_by_pos,
    "v": patching.get_act_patch_attn_head_v_by_pos,
    "pattern": patching.get_act_patch_attn_head_pattern_by_pos,
}


@torch.no_grad()
def by_transformer_lens(
    model: Any, name: str, nodes: list[fp.Node], clean: torch.Tensor, corrupted: torch.Tensor
) -> tuple[float, list[float]]:
    """Patch nodes with TransformerLens, and return the CPU seconds per patch and the metric of each node."""
    _, cache = model.run_with_cache(clean)
    rows = [(int(node.site.split(".")[1]), int(node.position), node.index) for node in nodes]
    order = [(layer, head, position) if name == "pattern" else (layer, position, head) for layer, position, head in rows]
    index = pd.DataFrame([[part for part in row if part is not None] for row in order])
    start = time.process_time()
    function = partial(THEIRS[name].func, **{**THEIRS[name].keywords, "index_axis_names": None}, index_df=index)
    found = function(model, corrupted, cache, lambda logits: logits[0, -1, CORRECT] - logits[0, -1, WRONG])
    return (time.process_time() - start) / len(nodes), found.tolist()


def main() -> None:
    """Measure all components and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2-small")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--loop", type=int, default=48, help="number of randomly drawn patches that TransformerLens runs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape, length = SHAPES[options.shape], options.tokens
    clean = torch.randint(3, shape.vocab, (1, length), generator=torch.Generator().manual_seed(1))
    corrupted = clean.clone()
    corrupted[0, length * 3 // 10] = (clean[0, length * 3 // 10] + 1) % shape.vocab
    pairs = fp.Pairs.from_tokens(clean, corrupted, torch.tensor([CORRECT]), torch.tensor([WRONG]))
    print(f"{options.shape}, {length} tokens, one CPU thread")
    faster: dict[str, list[float]] = {name: [] for name in THEIRS}
    largest = 0.0
    for kind, model in models(shape, length, "cpu").items():
        fp.rank_components(model, pairs, sites="mlp_out", progress=False)
        for name in THEIRS:
            start = time.process_time()
            effects = fp.rank_components(model, pairs, sites=name, positions="each", progress=False)
            ours = (time.process_time() - start) / (2 * len(effects.row))
            drawn = random.Random(0).sample(range(len(effects.row)), min(options.loop, len(effects.row)))
            nodes = [effects.nodes[effects.row[entry]] for entry in drawn]
            theirs, found = by_transformer_lens(model, name, nodes, clean, corrupted)
            worst = max(abs(value - effects.denoised[entry]) for value, entry in zip(found, drawn, strict=True))
            print(
                f"{kind} {name}: {ours * 1e3:.2f} ms per patch, TransformerLens {theirs * 1e3:.1f} ms, "
                f"{theirs / ours:.1f} x faster; largest difference {worst:.1e}"
            )
            faster[name].append(theirs / ours)
            largest = max(largest, worst)
    said = {name: "{:.0f} x and {:.0f} x".format(*factors) for name, factors in faster.items()}
    print(
        "a head's z is {:.0f} x (TransformerBridge) and {:.0f} x (HookedTransformer) faster, ".format(*faster["z"])
        + f"q {said['q']}, k {said['k']}, v {said['v']}, a row of the pattern {said['pattern']}; whole activations, of "
        f"which a pair has few, {said['resid_pre']} (the residual stream) and {said['mlp_out']} (MLPs). No result differs "
        f"by more than {bound(largest, 2)}."
    )
    every = [factor for factors in faster.values() for factor in factors]
    print(f"{min(every):.0f} x to {max(every):.0f} x slower")


if __name__ == "__main__":
    main()
