"""Measure the memory of a cross-layer transcoder of 26 layers x 16k features whose decoders stay in their files.

A random transcoder of that size, with narrow activations so that its files fit on any disk, is written layer by layer. Then two
new processes read it: one reads the rows of the features that a few tokens activate, and the other one the whole dictionary.

    python benchmarks/clt_memory.py [--width 24] [--tokens 64]
"""

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

LAYERS, FEATURES = 26, 16384


def write(folder: Path, width: int) -> int:
    """Write a random transcoder in circuit-tracer's layout, of which about 1 feature in 500 is active; return its bytes."""
    generator = torch.Generator().manual_seed(0)
    for layer in range(LAYERS):
        encoder = torch.randn(FEATURES, width, generator=generator) / width**0.5
        parts = {"W_enc": encoder, "b_enc": torch.full((FEATURES,), -2.9), "b_dec": torch.zeros(width)}
        save_file({f"{name}_{layer}": value for name, value in parts.items()}, folder / f"W_enc_{layer}.safetensors")
        decoder = torch.randn(FEATURES, LAYERS - layer, width, generator=generator)
        save_file({f"W_dec_{layer}": decoder}, folder / f"W_dec_{layer}.safetensors")
    settings = {"model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid",
                "feature_output_hook": "hook_mlp_out"}  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return sum(file.stat().st_size for file in folder.iterdir())


def run(folder: Path, width: int, tokens: int, whole: bool) -> None:
    """Encode and decode some random tokens, and print what that took."""
    from featpatch import load_sae
    from featpatch.sae import cross_formats
    from featpatch.sae.cross_codec import CrossCodec

    limit = sys.maxsize if whole else 0
    cross_formats.KEPT = {"encoders": limit, "decoders": limit}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    codec = CrossCodec(load_sae(folder), torch.zeros(1))
    x = torch.randn(1, tokens, LAYERS * width, generator=torch.Generator().manual_seed(1))
    start = time.perf_counter()
    code = codec.encode(x)
    encoded = time.perf_counter() - start
    codec.decode(code.features, {})
    decoded = time.perf_counter() - start - encoded
    active = (code.features != 0).flatten(0, 1).any(0).nonzero()[:, 0]
    codec.rows(active[: active.numel() // 50])
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{'whole in memory' if whole else 'rows from files'}: {len(active):,} of {codec.d_sae:,} features active on {tokens} "
        f"tokens; encode {encoded:.2f} s, decode {decoded:.2f} s; peak RSS above that of the imports, in MB: {peak:.0f}"
    )


def main() -> None:
    """Write the transcoder and measure both ways of reading it, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--read", nargs=2, metavar=("FOLDER", "HOW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.read:
        run(Path(given.read[0]), given.width, given.tokens, given.read[1] == "whole")
        return
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), given.width)
        named = f"CLT of {LAYERS} x {FEATURES:,} features, width {given.width}, float32"
        print(f"{named}: {size / 2**20:,.0f} MB in its files", flush=True)
        peaks = []
        for how, tokens in (("rows", 1), ("rows", given.tokens), ("whole", given.tokens)):
            own = ["--width", str(given.width), "--tokens", str(tokens), "--read", folder, how]
            done = subprocess.run([sys.executable, __file__, *own], check=True, stdout=subprocess.PIPE, text=True).stdout
            print(done, end="", flush=True)
            peaks.append(done.rsplit(" ", 1)[1].strip())
    print(
        f"one token takes {peaks[0]} MB and {given.tokens} tokens {peaks[1]} MB, while the whole dictionary in memory takes "
        f"{peaks[2]} MB"
    )


if __name__ == "__main__":
    main()
