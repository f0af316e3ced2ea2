"""Train BatchTopK SAEs on SmolLM2 with sae-lens: `python -m examples.real_model.train`, after the model is prepared.

The text comes from this machine (see `text.py`); activations are read once and kept. A step whose output exists is skipped, so
an interrupted run continues; with other settings, give another folder with --work. The card has what was measured on held-out
documents. One million tokens at three hook points take 3.5 GB on disk.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, SAETrainer
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata

import featpatch as fp
from featpatch.cli.app import clear_errors
from featpatch.errors import FeatpatchError

from . import text
from .activations import LENGTH, cache, cached, rows_of
from .capitals import load
from .prepare import LABEL, MODEL

WORK = Path("build/real_model/saes")
HOOKS = "blocks.10.hook_resid_post,blocks.20.hook_resid_post,blocks.24.hook_resid_post"
CHARACTERS = 6
"""Characters of text that are gathered for each token that is read; a token has about 4."""
ENCODED = 1024
"""Activations that are encoded together to count dead features."""
EXCERPT = 600
"""Characters of a held-out document on which losses are measured."""


@dataclass(frozen=True)
class Settings:
    """What determines the SAEs.

    Attributes:
        hooks: the hook points that the SAEs read and write.
        tokens: the number of tokens whose activations are read.
        width, k: the number of features, and of those that are active on a token on average.
        passes: how often training sees each activation.
        batch: the number of activations in one step of training.
        rate: the learning rate, which falls to a tenth in the last third.
        seed: the seed of initialisation and order.
    """

    hooks: tuple[str, ...]
    tokens: int
    width: int
    k: int
    passes: int
    batch: int = 512
    rate: float = 1e-3
    seed: int = 0


def check_settings(work: Path, settings: Settings) -> None:
    """Write the settings to the folder, or check that they are those with which it was begun.

    Raises:
        FeatpatchError: the folder was begun with other settings.
    """
    file, asked = work / "settings.json", json.loads(json.dumps(asdict(settings)))
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")
    before = json.loads(file.read_text(encoding="utf-8"))
    if other := {name: value for name, value in before.items() if asked[name] != value}:
        raise FeatpatchError(
            f"{str(work)!r} was begun with {other}: expected the same settings; pass them, or another folder with --work"
        )


def batches(x: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield shuffled batches in float32 without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator)
        for part in order[: len(x) // size * size].split(size):
            yield x[part].float()


def train(x: torch.Tensor, hook: str, out: Path, settings: Settings) -> None:
    """Train an SAE on activations `[token, width]`, and save it in the format of sae-lens with a record of the training."""
    torch.manual_seed(settings.seed)
    start, size, samples = time.process_time(), min(settings.batch, len(x)), settings.passes * len(x)
    steps = samples // size
    config = BatchTopKTrainingSAEConfig(
        d_in=x.shape[1],
        d_sae=settings.width,
        k=float(settings.k),
        topk_threshold_lr=max(0.01, min(1.0, 10 / steps)),  # a running mean from 0, which few steps do not reach with 0.01
        normalize_activations="expected_average_only_in",
        metadata=SAEMetadata(
            model_name=LABEL,
            model_class_name="TransformerBridge",
            hook_name=hook,
            hook_head_index=None,
            context_size=LENGTH,
            prepend_bos=True,
            dataset_path="text of the machine, see README.md",
        ),
    )
    training = SAETrainerConfig(
        total_training_samples=samples,
        train_batch_size_samples=size,
        lr=settings.rate,
        lr_end=settings.rate / 10,
        lr_warm_up_steps=min(50, steps // 4),
        lr_decay_steps=steps // 3,
        dead_feature_window=min(200, max(1, steps // 4)),
        feature_sampling_window=1000,
        n_batches_for_norm_estimate=50,
        logger=LoggingConfig(log_to_wandb=False),
    )
    trainer = SAETrainer(cfg=training, sae=BatchTopKTrainingSAE(config), data_provider=batches(x, size, settings.seed))
    trainer.fit().save_inference_model(out)
    sae = SAE.load_from_disk(out)
    with torch.no_grad():
        active = torch.stack([(sae.encode(part.float()) > 0).any(0) for part in x.split(ENCODED)]).any(0)
    record = {"dead": int((~active).sum()), "tokens": len(x), "cpu_seconds": round(time.process_time() - start)}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def excerpts(model: Any, documents: Sequence[str], tokens: int) -> list[str]:
    """Return the beginnings of documents that have about so many tokens together."""
    chosen, count = list[str](), 0
    for document in documents:
        if count >= tokens:
            break
        chosen.append(document[:EXCERPT])
        count += len(model.tokenizer(chosen[-1], add_special_tokens=False).input_ids)
    return chosen


def card(settings: Settings, work: Path, losses: Any) -> str:
    """Return the README of the SAEs: what they were trained on, and what was measured."""
    rows = []
    for hook, each in zip(settings.hooks, losses.spliced, strict=True):
        record = json.loads((work / hook / "training.json").read_text(encoding="utf-8"))
        rows.append(
            f"| {hook} | {each.explained_variance:.3f} | {each.l0:.1f} | {record['dead']} of {settings.width} | "
            f"{each.loss_recovered:.3f} | {each.loss_sae:.3f} | {each.loss_zero:.3f} | {each.loss_mean:.3f} | "
            f"{record['tokens']:,} | {record['cpu_seconds']} |"
        )
    kinds = text.amounts(work / "text.jsonl")
    shares = ", ".join(f"{kind} {amount / sum(kinds.values()):.0%}" for kind, amount in sorted(kinds.items()))
    return "\n".join(
        [
            f"# SAEs of {LABEL}",
            "",
            f"BatchTopK SAEs (k = {settings.k}, {settings.width} features), trained by `python -m examples.real_model.train` with "
            f"sae-lens: {settings.passes} passes over the activations in batches of {settings.batch}, learning rate {settings.rate}, seed {settings.seed}.",
            "",
            f"The text was found on the machine that trained them ({shares}, by characters); one document in {text.HELD_OUT} is "
            f"held out. Rows of {LENGTH} tokens begin with BOS, whose activation is left out.",
            "",
            f"Measured on held-out documents: {losses.positions:,} positions, {losses.predictions:,} predictions; the model's "
            f"loss there is {losses.spliced[0].loss:.3f} nats per token. Dead features are active on none of the tokens that "
            "were trained on. Loss recovered: 1 for a perfect reconstruction, 0 for zero ablation.",
            "",
            "| hook point | explained variance | L0 | dead features | loss recovered | loss with SAE | with zeros | with the mean | "
            "tokens | CPU seconds |",
            "|---|---|---|---|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def run(model_folder: Path, work: Path, settings: Settings, held_out: int) -> Path:
    """Carry out all steps whose output is missing, and return the card.

    Raises:
        FeatpatchError: the model is not prepared, the folder was begun with other settings, or there is too little text.
    """
    model = load(model_folder)
    check_settings(work, settings)
    text.gather(work / "text.jsonl", CHARACTERS * settings.tokens)
    rows = rows_of(model, text.documents(work / "text.jsonl", held_out=False), settings.tokens)
    cache(model, rows, settings.hooks, work / "activations")
    for hook in settings.hooks:
        if not (work / hook / "training.json").is_file():
            train(cached(work / "activations", hook), hook, work / hook, settings)
    saes = [fp.load_sae(work / hook) for hook in settings.hooks]
    held = excerpts(model, text.documents(work / "text.jsonl", held_out=True), held_out)
    losses = fp.loss_recovered(model, saes, held)
    (work / "README.md").write_text(card(settings, work, losses), encoding="utf-8")
    print(losses)
    return work / "README.md"


def main(
    model: Annotated[Path, typer.Option(help="Folder of the prepared model.")] = MODEL,
    work: Annotated[Path, typer.Option(help="Folder for text, activations, SAEs and their card.")] = WORK,
    tokens: Annotated[int, typer.Option(min=1000, help="Number of tokens to train on.")] = 1_000_000,
    hooks: Annotated[str, typer.Option(help="Hook points, separated by commas.")] = HOOKS,
    width: Annotated[int, typer.Option(min=1, help="Number of features of each SAE.")] = 4096,
    k: Annotated[int, typer.Option(min=1, help="Number of features that are active on a token on average.")] = 32,
    passes: Annotated[int, typer.Option(min=1, help="How often training sees each activation.")] = 4,
    batch: Annotated[int, typer.Option(min=1, help="Number of activations in one step of training.")] = 512,
    held_out: Annotated[int, typer.Option(min=100, help="Number of held-out tokens on which losses are measured.")] = 20_000,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of PyTorch.")] = 1,
) -> None:
    """Gather text, read activations, train an SAE at each hook point, measure them and write their card."""
    torch.set_num_threads(threads)
    with clear_errors():
        settings = Settings(tuple(hooks.split(",")), tokens, width, k, passes, batch)
        print(f"wrote {run(model, work, settings, held_out)}")


if __name__ == "__main__":
    typer.run(main)
