"""Differences in values between a sweep on Ray workers and a serial sweep: python benchmarks/workers.py."""

from math import ceil, log10

import numpy as np
import torch

import featpatch as fp


def main() -> None:
    """Compare both sweeps on the shipped model, with two threads in this process and one in a worker."""
    torch.set_num_threads(2)
    demo = fp.load_demo()
    pairs = demo.pairs("ioi", n=8)
    serial, on_ray = (
        fp.rank_features(demo.model, demo.saes, pairs, positions=["S2", "end"], executor=executor, progress=False)
        for executor in (None, fp.Ray(workers=2, cpus=1))
    )
    assert serial.nodes == on_ray.nodes
    worst = max(np.abs(serial.denoised - on_ray.denoised).max(), np.abs(serial.noised - on_ray.noised).max())
    print(f"below 1e{ceil(log10(worst))} of a logit in float32 on the shipped model")


if __name__ == "__main__":
    main()
