"""Train BatchTopK SAEs and transcoders on SmolLM2: `python -m examples.real_model.train`, after the model is prepared.

Text is found on this machine (see `text.py`) and written by the model (see `written.py`). Activations are read once and kept.
A step whose output exists is skipped, so an interrupted run continues; with other settings, give another folder with --work.
The card has what was measured on held-out documents. One million tokens take 1.2 GB on disk for each hook point.
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
from safetensors.torch import load_file, save_file

import featpatch as fp
from examples.train_demo.dictionaries import batches
from examples.train_demo.transcoder import train_transcoder
from featpatch.cli.app import clear_errors
from featpatch.errors import FeatpatchError

from . import text, written
from .activations import LENGTH, cache, cached, rows_of
from .prepare import LABEL, MODEL, load

WORK = Path("build/real_model/saes")
LAYERS, TRANSCODERS = "10,20,24", "10,20"
CHARACTERS = 6
"""Characters of text that are gathered for each token that is read; a token has about 4."""
ENCODED = 1024
"""Activations that are encoded together to count dead features."""
EXCERPT = 600
"""Characters of a held-out document on which losses are measured."""


@dataclass(frozen=True)
class Settings:
    """What determines the SAEs and transcoders.

    Attributes:
        layers: the layers after which SAEs read and write the residual stream.
        transcoders: the layers whose MLPs get a transcoder.
        tokens: the number of tokens whose activations are read.
        written: the number of files of text that the model writes, about 12,000 tokens each; the rest is text of the machine.
        width, k: the number of features, and of those that are active on a token on average.
        passes: how often training sees each activation.
        batch: the number of activations in one step of training.
        rate: the learning rate, which falls to a tenth in the last third.
        seed: the seed of initialisation and order.
    """

    layers: tuple[int, ...]
    transcoders: tuple[int, ...]
    tokens: int
    written: int
    width: int
    k: int
    passes: int
    batch: int = 512
    rate: float = 1e-3
    seed: int = 0

    @property
    def hooks(self) -> list[tuple[str, str]]:
        """The hook points that each SAE or transcoder reads and writes."""
        saes = [f"blocks.{layer}.hook_resid_post" for layer in self.layers]
        transcoders = [(f"blocks.{layer}.mlp.hook_in", f"blocks.{layer}.hook_mlp_out") for layer in self.transcoders]
        return [*zip(saes, saes, strict=True), *transcoders]

    @property
    def steps(self) -> int:
        """The number of steps of training."""
        return self.passes * self.tokens // self.batch


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


def train(folder: Path, reads: str, writes: str, out: Path, settings: Settings) -> None:
    """Train an SAE or a transcoder on cached activations, and save it in half precision with a record of the training."""
    torch.manual_seed(settings.seed)
    start = time.process_time()
    tensors = [cached(folder, hook) for hook in dict.fromkeys([reads, writes])]
    data = (tuple(each.float() for each in batch) for batch in batches(settings.seed, settings.batch, *tensors))
    metadata = SAEMetadata(
        model_name=LABEL,
        model_class_name="TransformerBridge",
        hook_name=reads,
        hook_head_index=None,
        context_size=LENGTH,
        prepend_bos=True,
        dataset_path="text of the machine and of the model, see README.md",
        **({} if reads == writes else {"hook_name_out": writes}),
    )
    if reads == writes:
        autoencoder((x for (x,) in data), tensors[0].shape[1], metadata, settings).save_inference_model(out)
    else:
        train_transcoder(
            data, width=settings.width, k=settings.k, steps=settings.steps, rate=settings.rate, metadata=metadata
        ).save_model(out)
    weights = out / "sae_weights.safetensors"
    save_file({name: value.half() for name, value in load_file(weights).items()}, weights)
    sae = SAE.load_from_disk(out)
    with torch.no_grad():
        active = torch.stack([(sae.encode(part.float()) > 0).any(0) for part in tensors[0].split(ENCODED)]).any(0)
    record = {"dead": int((~active).sum()), "cpu_seconds": round(time.process_time() - start)}
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def autoencoder(data: Iterator[torch.Tensor], d_in: int, metadata: SAEMetadata, settings: Settings) -> BatchTopKTrainingSAE:
    """Return a BatchTopK SAE that sae-lens has trained on batches of activations."""
    steps = settings.steps
    config = BatchTopKTrainingSAEConfig(
        d_in=d_in,
        d_sae=settings.width,
        k=float(settings.k),
        topk_threshold_lr=max(0.01, min(1.0, 10 / steps)),  # a running mean from 0, which few steps do not reach with 0.01
        normalize_activations="expected_average_only_in",
        metadata=metadata,
    )
    training = SAETrainerConfig(
        total_training_samples=steps * settings.batch,
        train_batch_size_samples=settings.batch,
        lr=settings.rate,
        lr_end=settings.rate / 10,
        lr_warm_up_steps=min(50, steps // 4),
        lr_decay_steps=steps // 3,
        dead_feature_window=min(200, max(1, steps // 4)),
        feature_sampling_window=1000,
        n_batches_for_norm_estimate=min(50, steps),
        logger=LoggingConfig(log_to_wandb=False),
    )
    return SAETrainer(cfg=training, sae=BatchTopKTrainingSAE(config), data_provider=data).fit()


def excerpts(model: Any, documents: Sequence[str], tokens: int) -> list[str]:
    """Return the beginnings of documents that have about so many tokens together."""
    chosen, count = list[str](), 0
    for document in documents:
        if count >= tokens:
            break
        chosen.append(document[:EXCERPT])
        count += len(model.tokenizer(chosen[-1], add_special_tokens=False).input_ids)
    return chosen


def card(settings: Settings, work: Path, files: Sequence[Path], measured: dict[str, Any]) -> str:
    """Return the README of the SAEs and transcoders: what they were trained on, and what was measured."""
    kinds = text.amounts(files)
    shares = ", ".join(f"{kind} {amount / sum(kinds.values()):.0%}" for kind, amount in sorted(kinds.items()))
    lines = [
        f"# SAEs and transcoders of {LABEL}",
        "",
        f"BatchTopK dictionaries (k = {settings.k}, {settings.width} features) in the format of sae-lens, with a fixed "
        f"threshold, stored in half precision. Trained by `python -m examples.real_model.train`: {settings.tokens:,} tokens, "
        f"{settings.passes} passes in batches of {settings.batch}, learning rate {settings.rate}, seed {settings.seed}.",
        "",
        f"Text, by characters: {shares}. One document in {text.HELD_OUT} is held out. Rows of {LENGTH} tokens begin with BOS, "
        "whose activation is left out. What the model wrote is a sample at temperature 0.7 from openings about everyday "
        "subjects; it is often untrue.",
        "",
        "| hook point | dead features (active on no token of training) | CPU seconds of training |",
        "|---|---|---|",
    ]
    for reads, _ in settings.hooks:
        record = json.loads((work / reads / "training.json").read_text(encoding="utf-8"))
        lines.append(f"| {reads} | {record['dead']} of {settings.width} | {record['cpu_seconds']} |")
    for kind, losses in measured.items():
        lines += [
            "",
            f"## On held-out text {kind}",
            "",
            f"{losses.positions:,} positions, {losses.predictions:,} predictions; the model's loss is "
            f"{losses.spliced[0].loss:.3f} nats per token. Loss recovered: 1 for a perfect reconstruction, 0 for zero ablation.",
            "",
            "| hook point | explained variance | L0 | loss recovered | loss with SAE | with zeros | with the mean |",
            "|---|---|---|---|---|---|---|",
        ]
        for (reads, _), each in zip(settings.hooks, losses.spliced, strict=True):
            lines.append(
                f"| {reads} | {each.explained_variance:.3f} | {each.l0:.1f} | {each.loss_recovered:.3f} | "
                f"{each.loss_sae:.3f} | {each.loss_zero:.3f} | {each.loss_mean:.3f} |"
            )
    return "\n".join(lines) + "\n"


def run(model_folder: Path, work: Path, settings: Settings, held_out: int) -> Path:
    """Carry out all steps whose output is missing, and return the card.

    Raises:
        FeatpatchError: the model is not prepared, the folder was begun with other settings, or there is too little text.
    """
    model = load(model_folder)
    check_settings(work, settings)
    found = work / "text.jsonl"
    from_machine = settings.tokens - settings.written * written.BATCH * written.LENGTH
    text.gather(found, CHARACTERS * max(from_machine, settings.tokens // 10))
    by_model = written.write(model_folder, work / "written", settings.written)
    rows = rows_of(model, text.documents([found, *by_model], held_out=False), settings.tokens)
    cache(model, rows, list(dict.fromkeys(hook for both in settings.hooks for hook in both)), work / "activations")
    for reads, writes in settings.hooks:
        if not (work / reads / "training.json").is_file():
            train(work / "activations", reads, writes, work / reads, settings)
    saes = [fp.load_sae(work / reads) for reads, _ in settings.hooks]
    measured = {
        kind: fp.loss_recovered(model, saes, excerpts(model, text.documents(files, held_out=True), held_out))
        for kind, files in (("of this machine", [found]), ("that the model wrote", by_model))
    }
    (work / "README.md").write_text(card(settings, work, [found, *by_model], measured), encoding="utf-8")
    return work / "README.md"


def layers_of(listed: str) -> tuple[int, ...]:
    """Return layers that are listed with commas.

    Raises:
        FeatpatchError: an entry is no number.
    """
    try:
        return tuple(int(each) for each in listed.split(",") if each.strip())
    except ValueError:
        raise FeatpatchError(f"layers {listed!r}: expected numbers separated by commas, e.g. 10,20") from None


def main(
    model: Annotated[Path, typer.Option(help="Folder of the prepared model.")] = MODEL,
    work: Annotated[Path, typer.Option(help="Folder for text, activations, dictionaries and their card.")] = WORK,
    tokens: Annotated[int, typer.Option(min=1000, help="Number of tokens to train on.")] = 1_000_000,
    files: Annotated[int, typer.Option("--written", min=1, help="Number of files of 64 documents that the model writes.")] = 20,
    layers: Annotated[str, typer.Option(help="Layers after which SAEs read the residual stream.")] = LAYERS,
    transcoders: Annotated[str, typer.Option(help="Layers whose MLPs get a transcoder.")] = TRANSCODERS,
    width: Annotated[int, typer.Option(min=1, help="Number of features of each dictionary.")] = 2048,
    k: Annotated[int, typer.Option(min=1, help="Number of features that are active on a token on average.")] = 32,
    passes: Annotated[int, typer.Option(min=1, help="How often training sees each activation.")] = 2,
    batch: Annotated[int, typer.Option(min=1, help="Number of activations in one step of training.")] = 512,
    held_out: Annotated[int, typer.Option(min=100, help="Number of held-out tokens of each kind to measure on.")] = 10_000,
    threads: Annotated[int, typer.Option(min=1, help="Number of threads of PyTorch.")] = 1,
) -> None:
    """Gather text, read activations, train SAEs and transcoders, measure them and write their card."""
    torch.set_num_threads(threads)
    with clear_errors():
        settings = Settings(layers_of(layers), layers_of(transcoders), tokens, files, width, k, passes, batch)
        print(f"wrote {run(model, work, settings, held_out)}")


if __name__ == "__main__":
    typer.run(main)
