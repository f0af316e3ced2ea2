"""Growth of memory and time for dictionaries of up to a million features and tables of up to a million rows.

python benchmarks/scale.py [--features 16384 131072 1048576] [--rows 10000 100000 1000000]

Each size is measured in a separate process, so that peak memory is not shared. There is a small model, a TopK dictionary with
64 active features, and 4 pairs of 20 tokens that differ in half of them. Only features that differ between the runs are stored.
"""

import json
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

import numpy as np
import torch
from alone import alone
from memory import peak_of
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import GPT2Config, GPT2LMHeadModel

import featpatch as fp
from featpatch.reporting.sections import ROWS

WIDTH, ACTIVE, TOKENS, PAIRS, SITE = 64, 64, 20, 4, "blocks.1.hook_resid_pre"


def one_dictionary(features: int) -> dict[str, float]:
    """Rank the features of a dictionary; return the sizes in MiB, the CPU seconds and the numbers of rows and entries."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=200, n_positions=32, n_embd=WIDTH, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config).eval()
    bridge = build_bridge_from_module(model, "GPT2LMHeadModel", hf_config=config, tokenizer=None, device="cpu")
    options = {"k": ACTIVE, "rescale_acts_by_decoder_norm": False, "metadata": SAEMetadata(hook_name=SITE)}
    sae = TopKSAE(TopKSAEConfig(WIDTH, features, "float32", **options))
    tokens = torch.randint(1, 200, (2, PAIRS, TOKENS))
    tokens[1, :, : TOKENS // 2] = tokens[0, :, : TOKENS // 2]
    pairs = fp.Pairs.from_tokens(tokens[0], tokens[1], torch.arange(PAIRS) + 3, torch.arange(PAIRS) + 9)
    start = time.process_time()
    effects, extra = peak_of(lambda: fp.rank_features(bridge, sae, pairs, progress=False))
    weights = 4 * sum(parameter.numel() for parameter in sae.parameters()) / 2**20
    return {"weights": weights, "extra": extra, "seconds": time.process_time() - start,
            "rows": len(effects), "entries": len(effects.row)}  # fmt: skip


def one_table(rows: int) -> dict[str, float]:
    """Sort, write, read and report a table of random effects; return the CPU seconds and the bytes of the report."""
    random, nodes = np.random.default_rng(0), tuple(fp.Node(SITE, "feature", index, "all", SITE) for index in range(rows))
    pair, change = random.integers(0, PAIRS, rows), random.normal(size=(2, rows)) / 100
    metadata = {
        "metric": "logit_diff",
        "metrics": ["logit_diff"],
        "directions": ["denoising", "noising"],
        "positions": "all",
        "pairs": "none",
        "model": {"name": "none", "sha256": "none"},
        "versions": {},
        "saes": {},
        "finished": True,
    }
    clean, corrupted = np.full(PAIRS, 2.0), np.zeros(PAIRS)
    effects = fp.Effects(nodes, clean, corrupted, np.arange(rows), pair, change[0], 2.0 - change[1], metadata)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, step in (
            ("sort", lambda: effects.top(20).to_pandas()),
            ("write", lambda: effects.save(Path(folder) / "effects.safetensors")),
            ("read", lambda: fp.Effects.load(Path(folder) / "effects.safetensors")),
            ("report", lambda: fp.report(effects, Path(folder) / "report.html")),
        ):
            start = time.process_time()
            step()
            found[name] = time.process_time() - start
        found["report_bytes"] = (Path(folder) / "report.html").stat().st_size
    return found


def main(features: list[int], rows: list[int]) -> None:
    """Print both tables in Markdown, and the README's sentence about the last row of the second."""
    print("| features | weights | extra peak | rows | kept differences | CPU time |\n" + "|---" * 6 + "|")
    for size in features:
        found = alone(__file__, "--alone", "one_dictionary", str(size))
        counts = " | ".join(f"{found[name]:,}" for name in ("rows", "entries"))
        print(
            f"| {size:,} | {found['weights']:,.0f} MiB | {found['extra']:,.0f} MB | {counts} | {found['seconds']:.1f} s |",
            flush=True,
        )
    print("\n| rows | sort, first 20 with intervals | write | read | report | size of the report |\n" + "|---" * 6 + "|")
    for size in rows:
        found = alone(__file__, "--alone", "one_table", str(size))
        seconds = " | ".join(f"{found[name]:.2f} s" for name in ("sort", "write", "read", "report"))
        print(f"| {size:,} | {seconds} | {found['report_bytes'] / 2**20:.1f} MiB |", flush=True)
    print(
        f"\nA table of {size:,} rows sorts in {found['sort']:.1f} s, is read in {found['read']:.1f} s and reported in "
        f"{found['report']:.1f} s of CPU time (the report shows the {ROWS:,} largest effects)."
    )


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--features", type=int, nargs="*", default=[2**14, 2**17, 2**20])
    parser.add_argument("--rows", type=int, nargs="*", default=[10**4, 10**5, 10**6])
    parser.add_argument("--alone", nargs=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.alone:
        print(json.dumps(globals()[arguments.alone[0]](int(arguments.alone[1]))))
    else:
        main(arguments.features, arguments.rows)
