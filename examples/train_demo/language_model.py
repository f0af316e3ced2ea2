"""Trains the language model: a small GPT-2 that takes one step of a task per layer."""

import math
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel

from .files import write_json
from .vocabulary import MAX_LENGTH, rows, tokenizer, vocabulary


@dataclass(frozen=True)
class ModelSettings:
    """Sizes and training of the language model.

    Attributes:
        layers, width, heads, mlp: sizes.
        steps, batch, length: rows of `length` words, `batch` of them a step; no row is seen twice.
        rate, decay: of AdamW; the rate falls along a cosine to 5 %.
        answer_weight: weight of the answers in the loss, other words have 1.
        locality: weight of the penalty on far attention in the first layer from a word before an answer, summed over heads.
        near: how many words back attention is free of that penalty.
    """

    layers: int = 4
    width: int = 128
    heads: int = 8
    mlp: int = 256
    steps: int = 7000
    batch: int = 32
    length: int = 48
    rate: float = 1.5e-3
    decay: float = 0.05
    answer_weight: float = 5.0
    locality: float = 0.1
    near: int = 1


def build(settings: ModelSettings) -> GPT2LMHeadModel:
    """The model before training."""
    words = vocabulary()
    config = GPT2Config(
        vocab_size=len(words), n_positions=MAX_LENGTH, n_embd=settings.width, n_layer=settings.layers,
        n_head=settings.heads, n_inner=settings.mlp, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        initializer_range=0.05, bos_token_id=words["<bos>"], eos_token_id=words["<bos>"],
        pad_token_id=words["<pad>"], attn_implementation="eager",
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def far_attention(attention: torch.Tensor, ids: torch.Tensor, near: int) -> torch.Tensor:
    """Attention (batch, head, query, key) on far words, summed over the heads: (batch, query).

    <bos> and the same word as the query's are free. Without a price on it the first layer looks from the last word
    straight at everything, and the tasks lose their steps.
    """
    place = torch.arange(ids.shape[1])
    far = (place[:, None] - place > near) & (place > 0)
    other = ids[:, :, None] != ids[:, None, :]
    return (attention * (far & other)[:, None]).sum((1, 3))


def loss_of(
    model: GPT2LMHeadModel, ids: torch.Tensor, answers: torch.Tensor, settings: ModelSettings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, weighted towards the answers, and far attention of the first layer from the words before an answer."""
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, output_attentions=True)
    loss = F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    far = far_attention(out.attentions[0], ids, settings.near)[:, :-1].flatten()
    decides = answers[:, 1:].flatten().float()
    weight = 1 + (settings.answer_weight - 1) * decides
    return (loss * weight).sum() / weight.sum(), (far * decides).sum() / decides.sum()


def train(out: Path, seed: int, settings: ModelSettings) -> None:
    """Trains one seed and saves model, tokenizer and a record (training.json) in `out`."""
    torch.manual_seed(seed)
    corpus = random.Random(f"language model {seed}")
    model = build(settings).train()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": settings.decay},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 100) * (0.05 + 0.475 * (1 + math.cos(math.pi * k / settings.steps)))
    )
    start, bar = time.process_time(), tqdm(range(settings.steps), desc=f"model, seed {seed}", mininterval=5)
    for step in bar:
        ids, answers = rows(corpus, settings.batch, settings.length)
        loss, far = loss_of(model, ids, answers, settings)
        optimizer.zero_grad()
        (loss + settings.locality * far).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", far=f"{far.item():.3f}", refresh=False)
    seconds = time.process_time() - start
    model.eval().save_pretrained(out)
    tokenizer().save_pretrained(out)
    record = {"seed": seed, "cpu_seconds": round(seconds), "settings": asdict(settings)}
    write_json(out / "training.json", record)
