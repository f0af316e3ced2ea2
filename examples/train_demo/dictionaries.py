"""Trains the sparse autoencoders with sae-lens, and the transcoders."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata
from transformer_lens.model_bridge import TransformerBridge

from .activations import activations, load_model
from .files import write_json
from .transcoder import train_transcoder
from .vocabulary import rows as packed


@dataclass(frozen=True)
class DictionarySettings:
    """Size and training of one dictionary.

    Attributes:
        reads, writes: hooks; they differ for a transcoder.
        width, k: features in all, and those that may fire on one word on average.
        rows, length: how much of the corpus is read.
        samples, batch: activations seen in training.
        rate: of Adam; falls to a tenth in the last third.
        repeat: how often a word just before an answer counts, where the model must decide.
    """

    reads: str
    writes: str
    width: int = 1024
    k: int = 12
    rows: int = 9000
    length: int = 48
    samples: int = 1_100_000
    batch: int = 1024
    rate: float = 1e-3
    repeat: int = 3


def _at(hook: str) -> DictionarySettings:
    return DictionarySettings(hook, hook)


SITES = [
    *(_at(f"blocks.{layer}.hook_resid_pre") for layer in range(4)),
    _at("blocks.3.hook_resid_post"),
    _at("blocks.1.hook_mlp_out"),
    replace(_at("blocks.1.attn.hook_z"), k=16, samples=1_600_000),
    DictionarySettings("blocks.0.mlp.hook_in", "blocks.0.hook_mlp_out"),
]
"""Dictionaries that ship as `demo.saes`."""
TRANSCODERS = [DictionarySettings(f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out") for layer in (1, 2, 3)]
"""Transcoders of the other layers, `demo.transcoders`."""


def sample(
    model: TransformerBridge, seed: int, hooks: Sequence[str], *, rows: int, length: int, repeat: int
) -> list[torch.Tensor]:
    """Activations to train on at each of the hooks [words, width]; for `rows`, `length`, `repeat` see `DictionarySettings`."""
    ids, answers = packed(random.Random(f"dictionaries {seed}"), rows, length)
    decides = torch.zeros_like(answers)
    decides[:, :-1] = answers[:, 1:]
    often = decides[:, 1:].flatten().nonzero()[:, 0]
    chosen = torch.cat([torch.arange(ids[:, 1:].numel()), often.repeat(repeat - 1)])
    return [values.flatten(0, 1)[chosen] for values in activations(model, ids, list(hooks))]


def batches(seed: int, size: int, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Shuffled batches without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(tensors[0]), generator=generator)
        for part in order[: len(order) // size * size].split(size):
            yield tuple(tensor[part] for tensor in tensors)


def metadata(settings: DictionarySettings) -> SAEMetadata:
    """What sae-lens and TransformerLens need to know to use the dictionary."""
    transcoder = {} if settings.reads == settings.writes else {"hook_name_out": settings.writes}
    return SAEMetadata(
        model_name="featpatch-demo",
        model_class_name="TransformerBridge",
        hook_name=settings.reads,
        hook_head_index=None,
        context_size=settings.length,
        prepend_bos=True,
        dataset_path="synthetic",
        **transcoder,
    )


def train_autoencoder(x: torch.Tensor, seed: int, settings: DictionarySettings) -> BatchTopKTrainingSAE:
    """A BatchTopK autoencoder, trained by sae-lens."""
    config = BatchTopKTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=settings.width,
        k=float(settings.k),
        reshape_activations="hook_z" if settings.reads.endswith("hook_z") else "none",
        normalize_activations="expected_average_only_in",
        metadata=metadata(settings),
    )
    training = SAETrainerConfig(
        total_training_samples=settings.samples,
        train_batch_size_samples=settings.batch,
        lr=settings.rate,
        lr_end=settings.rate / 10,
        lr_warm_up_steps=50,
        lr_decay_steps=settings.samples // settings.batch // 3,
        dead_feature_window=200,
        feature_sampling_window=1000,
        n_batches_for_norm_estimate=50,
        logger=LoggingConfig(log_to_wandb=False),
    )
    provider = (x for (x,) in batches(seed, settings.batch, x))
    return SAETrainer(cfg=training, sae=BatchTopKTrainingSAE(config), data_provider=provider).fit()


def train(model_folder: Path, out: Path, seed: int, settings: DictionarySettings) -> None:
    """Trains one dictionary and saves it in sae-lens' format in `out`, with a record (training.json)."""
    torch.manual_seed(seed)
    start = time.process_time()
    hooks = list(dict.fromkeys([settings.reads, settings.writes]))
    amount = {"rows": settings.rows, "length": settings.length, "repeat": settings.repeat}
    tensors = sample(load_model(model_folder), seed, hooks, **amount)
    out.mkdir(parents=True, exist_ok=True)
    if settings.reads == settings.writes:
        train_autoencoder(tensors[0], seed, settings).save_inference_model(out)
    else:
        pairs = batches(seed, settings.batch, *tensors)
        steps = settings.samples // settings.batch
        coder = train_transcoder(
            pairs, width=settings.width, k=settings.k, steps=steps, rate=settings.rate, metadata=metadata(settings)
        )
        coder.save_model(out)
    record = {"seed": seed, "cpu_seconds": round(time.process_time() - start), "settings": asdict(settings)}
    write_json(out / "training.json", record)
