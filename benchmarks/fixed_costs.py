"""Costs of a study in addition to its sweep: loading, self-check, plan, command line, check of pairs, feature descriptions.

    python benchmarks/fixed_costs.py                                    # 30 layers in Llama's shape, random weights
    python benchmarks/fixed_costs.py SmolLM2-135M-Instruct.Q4_1.gguf    # the real model; needs the package gguf
    python benchmarks/fixed_costs.py --pairs 8

The study has two TopK dictionaries of principal directions, which explain less than 0.95 of the variance, as nearly all real
dictionaries do, and 32 pairs of prompts. Times are CPU times of one thread. The command line, and the loading with which it is
compared, run in separate processes, including imports. `pairs.check` and `fp.max_activating`, which run prompts in batches, are
compared with a loop that runs one prompt per forward pass.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

os.environ["TQDM_DISABLE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from sae_lens import TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import featpatch as fp
from featpatch.selfcheck import check
from featpatch.tasks.ioi import ioi

T = TypeVar("T")

LAYERS, WIDTH, VOCABULARY = 30, 576, 2048
SAE_LAYERS, ACTIVE = (24, 27), 96
TEXTS, DESCRIBED = 60, 10
GOALS = {"plan": 1 / 5, "self-check": 3.0, "rank": 5.0, "at once": 5.0}


def seconds_of(run: Callable[[], T]) -> tuple[float, T]:
    """Return the CPU seconds of a call, and its result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def seconds_of_process(*command: str) -> float:
    """Return the CPU seconds of a command that is run in a separate process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def save_model(folder: Path, gguf: Path | None) -> None:
    """Save a model and its tokenizer as a Hugging Face folder."""
    if gguf is not None:
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_config(read.config)  # a model that was read from GGUF can't be saved
        model.load_state_dict(read.state_dict())
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    else:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=1536, num_hidden_layers=LAYERS,
                num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=256, initializer_range=0.05,
            )
        )  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(fp.load_demo().folder / "model")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_sae(folder: Path, layer: int, activations: torch.Tensor) -> None:
    """Save a TopK dictionary whose directions are the principal directions of some activations, with both signs."""
    width = activations.shape[1]
    config = TopKSAEConfig(
        width, 2 * width, k=ACTIVE, rescale_acts_by_decoder_norm=False,
        metadata=SAEMetadata(hook_name=f"blocks.{layer}.hook_resid_pre"), apply_b_dec_to_input=True,
    )  # fmt: skip
    sae = TopKSAE(config)
    with torch.no_grad():
        directions = torch.linalg.svd(activations - activations.mean(0), full_matrices=True).Vh
        sae.W_dec.copy_(torch.cat([directions, -directions]))
        sae.W_enc.copy_(sae.W_dec.T)
        sae.b_dec.copy_(activations.mean(0))
    sae.save_model(folder)


def check_one_by_one(model: Any, pairs: fp.Pairs) -> list[float]:
    """Compute the preferences that `pairs.check` reports, with one prompt per forward pass."""
    found = []
    for pair in pairs:
        for prompt in (pair.clean, pair.corrupted):
            log_p = model(torch.tensor([prompt]))[0, -1].log_softmax(-1)
            right, wrong = (log_p[list(answers)].logsumexp(0) for answers in (pair.correct, pair.wrong))
            found.append(float(right - wrong))
            log_p[list(prompt)].sum()
    return found


def describe_one_by_one(model: Any, saes: list[Any], features: list[fp.Node], texts: list[str]) -> torch.Tensor:
    """Return the activations on every token from which `fp.max_activating` finds its words, with one text per forward pass."""
    by_hook = {sae.cfg.metadata.hook_name: sae for sae in saes}
    rows = []
    for text in texts:
        _, cache = model.run_with_cache(model.to_tokens(text), names_filter=lambda name: name in by_hook)
        encoded = {hook: sae.encode(cache[hook])[0] for hook, sae in by_hook.items()}
        rows.append(torch.stack([encoded[node.site][:, node.index] for node in features], 1))
    return torch.cat(rows)


def main() -> None:
    """Measure and print everything; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", nargs="?", type=Path)
    parser.add_argument("--pairs", type=int, default=32)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place, torch.no_grad():
        measured = measure(Path(place), options.gguf, options.pairs)
    print(json.dumps(measured))


def measure(place: Path, gguf: Path | None, n: int) -> dict[str, float]:
    """Measure all costs, print them line by line and return them in seconds."""
    save_model(place / "model", gguf)
    model = fp.load(place / "model").model
    demo = fp.load_demo()
    drawn = ioi(model.tokenizer, n) if gguf is not None else demo.pairs("ioi", n=n)
    pairs, texts = fp.Pairs(tuple(drawn)), [text[:120] for text in demo.text()[:TEXTS]]
    (place / "pairs.jsonl").write_text("\n".join(json.dumps(line) for line in written(model, pairs)))
    folders = [place / f"sae-{layer}" for layer in SAE_LAYERS]
    for layer, folder in zip(SAE_LAYERS, folders, strict=True):
        hook = f"blocks.{layer}.hook_resid_pre"
        read = [model.run_with_cache(torch.tensor([pair.clean]), names_filter=hook)[1][hook][0, 1:] for pair in pairs]
        save_sae(folder, layer, torch.cat(read))

    found: dict[str, float] = {}

    def tell(name: str, seconds: float, beside: str = "") -> None:
        found[name] = seconds
        print(f"{name:28} {seconds:7.2f} s  {beside}", flush=True)

    seconds, (model, saes) = seconds_of(lambda: fp.load(place / "model", folders, check=False))
    tell("fp.load without check", seconds)
    seconds, checked = seconds_of(lambda: check(model, saes, pairs))
    variances = ", ".join(f"{fit.explained_variance:.2f}" for fit in checked.fits)
    tell("self-check", seconds, f"of dictionaries that explain {variances}; goal {GOALS['self-check']:.0f} s")
    seconds, effects = seconds_of(lambda: fp.rank_features(model, saes, pairs, progress=False))
    sweep = seconds
    tell("rank_features", seconds, f"{2 * len(effects.row)} patches")
    seconds, plan = seconds_of(lambda: fp.plan(model, saes, pairs))
    tell("plan", seconds, f"{seconds / sweep:.2f} of the sweep, goal {GOALS['plan']:.2f}; it predicts {plan.patches} patches, "
        f"{plan.seconds:.1f} s")  # fmt: skip
    arguments = [part for folder in folders for part in ("--sae", str(folder))]
    names = f"{str(place / 'model')!r}, {[str(folder) for folder in folders]!r}"
    alone = (
        f"import featpatch as fp; model, saes = fp.load({names}, check=False, progress=False); "
        f"pairs = fp.Pairs.from_jsonl(model, {str(place / 'pairs.jsonl')!r}); fp.check(model, saes, pairs); "
        "fp.rank_features(model, saes, pairs, progress=False)"
    )
    library = seconds_of_process("-c", alone)
    tell("process: load, check, rank", library, "imports included")
    seconds = seconds_of_process(
        "-m", "featpatch", "rank", "--model", str(place / "model"), *arguments, "--pairs", str(place / "pairs.jsonl"),
        "--out", str(place / "out"),
    )  # fmt: skip
    over = seconds - library
    tell("process: featpatch rank", seconds, f"{over:+.1f} s for tables, files and the report, goal {GOALS['rank']:.0f} s")

    nodes = effects.top(DESCRIBED, kind="feature").nodes
    for name, at_once, one_by_one in (
        ("pairs.check", lambda: pairs.check(model), lambda: check_one_by_one(model, pairs)),
        (
            "fp.max_activating",
            lambda: fp.max_activating(model, saes, nodes, texts),
            lambda: describe_one_by_one(model, saes, list(nodes), texts),
        ),
    ):
        before, _ = seconds_of(one_by_one)
        seconds, _ = seconds_of(at_once)
        found[f"{name}, one by one"] = before
        tell(name, seconds, f"{before / seconds:.1f} x faster than one by one ({before:.2f} s), goal {GOALS['at once']:.0f} x")
    return found


def written(model: Any, pairs: fp.Pairs) -> list[dict[str, Any]]:
    """Return pairs as the lines of a JSON-lines file without labels; BOS is left out, because reading adds it again."""
    decode, lines = model.tokenizer.decode, []
    for pair in pairs:
        first = 1 if 0 in pair.special else 0
        texts = {name: decode(list(tokens[first:])) for name, tokens in (("clean", pair.clean), ("corrupted", pair.corrupted))}
        answers = {"correct": [decode([token]) for token in pair.correct], "wrong": [decode([token]) for token in pair.wrong]}
        lines.append({**texts, **answers})
    return lines


if __name__ == "__main__":
    main()
