"""Trains a cross-layer transcoder (CLT) of the MLPs and a crosscoder of the residual stream."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import featpatch as fp

from .activations import load_model
from .batch_top_k import Part, Units, fit
from .dictionaries import batches, sample
from .files import write_json


@dataclass(frozen=True)
class CrossSettings:
    """Size and training of a dictionary over several hook points.

    Attributes:
        reads, writes: hook points, from the lowest up.
        by_layer: whether each hook point that is read has features of its own, which write to its layer and all above (a
            CLT); else all features read and write everything (a crosscoder).
        width: features of each hook point that is read (CLT), or in all (crosscoder).
        k: how many of them may fire on one word on average.
        rows, length, samples, batch, rate, repeat: as in `DictionarySettings`.
        dtype: of the weights in the files.
    """

    reads: tuple[str, ...]
    writes: tuple[str, ...]
    by_layer: bool
    width: int
    k: int
    rows: int = 9000
    length: int = 48
    samples: int = 1_100_000
    batch: int = 1024
    rate: float = 1e-3
    repeat: int = 3
    dtype: str = "float16"


STREAM = (*(f"blocks.{layer}.hook_resid_pre" for layer in range(4)), "blocks.3.hook_resid_post")
CROSS = {
    "clt": CrossSettings(
        reads=tuple(f"blocks.{layer}.mlp.hook_in" for layer in range(4)),
        writes=tuple(f"blocks.{layer}.hook_mlp_out" for layer in range(4)),
        by_layer=True,
        width=512,
        k=12,
        samples=1_600_000,
    ),
    "crosscoder": CrossSettings(reads=STREAM, writes=STREAM, by_layer=False, width=2048, k=40, samples=1_400_000),
}
"""By the name of the folder."""


def start(settings: CrossSettings, width: int) -> list[Part]:
    """Random weights: decoder rows of length 1, the encoder their transpose where it reads what it writes."""
    n_in, n_out = len(settings.reads), len(settings.writes)
    ends = [(n, n + 1, n, n_out) for n in range(n_in)] if settings.by_layer else [(0, n_in, 0, n_out)]
    parts = []
    for end in ends:
        first_in, last_in, first_out, last_out = (n * width for n in end)
        W_dec = torch.randn(settings.width, last_out - first_out)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        W_enc = W_dec[:, : last_in - first_in].clone()
        W_enc /= W_enc.norm(dim=1, keepdim=True)
        bias = torch.zeros(settings.width)
        parts.append(Part(slice(first_in, last_in), slice(first_out, last_out), W_enc.T.contiguous(), bias, W_dec))
    return parts


def train(model_folder: Path, out: Path, seed: int, settings: CrossSettings) -> None:
    """Trains a CLT or a crosscoder and saves it, with a record (training.json)."""
    torch.manual_seed(seed)
    begun = time.process_time()
    hooks = list(dict.fromkeys([*settings.reads, *settings.writes]))
    amount = {"rows": settings.rows, "length": settings.length, "repeat": settings.repeat}
    found = dict(zip(hooks, sample(load_model(model_folder), seed, hooks, **amount), strict=True))
    width = found[hooks[0]].shape[1]
    x = torch.cat([found[hook] for hook in settings.reads], dim=1)
    y = x if settings.reads == settings.writes else torch.cat([found[hook] for hook in settings.writes], dim=1)
    del found
    data = ((part[0], part[-1]) for part in batches(seed, settings.batch, *([x] if y is x else [x, y])))
    parts, b_dec = start(settings, width), torch.zeros(y.shape[1])
    steps = settings.samples // settings.batch
    units = Units.of(*next(data), width)
    threshold = fit(data, parts, b_dec, units, k=settings.k, steps=steps, rate=settings.rate)
    _made(settings, parts, b_dec.unflatten(0, (-1, width)), threshold, width).save(out, dtype=settings.dtype)
    record = {"seed": seed, "cpu_seconds": round(time.process_time() - begun), "settings": asdict(settings)}
    write_json(out / "training.json", record)


def _made(
    settings: CrossSettings, parts: Sequence[Part], b_dec: torch.Tensor, threshold: torch.Tensor, width: int
) -> fp.dictionaries.CrossLayerTranscoder | fp.dictionaries.Crosscoder:
    """The trained weights as an object of featpatch."""
    hooks = {"hook": settings.reads, "hook_out": settings.writes, "model": "featpatch-demo"}
    if settings.by_layer:
        return fp.dictionaries.CrossLayerTranscoder(
            W_enc=torch.stack([part.W_enc.T for part in parts]),
            W_dec=[part.W_dec.unflatten(1, (-1, width)) for part in parts],
            b_enc=torch.stack([part.b_enc for part in parts]),
            b_dec=b_dec,
            threshold=threshold,
            **hooks,
        )
    (part,) = parts
    return fp.dictionaries.Crosscoder(
        W_enc=part.W_enc.unflatten(0, (-1, width)),
        W_dec=part.W_dec.unflatten(1, (-1, width)).transpose(0, 1),
        b_enc=part.b_enc,
        b_dec=b_dec,
        threshold=threshold[0],
        **hooks,
    )
