"""What the language model can do, and in which steps it does it.

A step is measured by patching: the difference of an activation between the clean and the corrupted prompt is added to
the corrupted run (denoising) or taken from the clean run (noising), at one place.

    recovery = (metric of the patched run - corrupted) / (clean - corrupted)      denoising
               (clean - metric of the patched run) / (clean - corrupted)          noising

The metric is the logit of the right answer minus that of the wrong one, for years the difference of probabilities.
Both are averaged over the pairs before dividing.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import GPT2LMHeadModel

from .activations import load_model
from .pairs import TASKS, PromptPair, draw
from .questions import answer_questions
from .vocabulary import encode, vocabulary

PAIRS = 64
"""Pairs per task that are patched."""
Place = tuple[str, str]
"""A hook, and a label of a position, "head 3" or "all"."""


@dataclass(frozen=True)
class Group:
    """Pairs of equal length, ready to run: token ids [pairs, words], label positions and answer ids per pair."""

    clean: torch.Tensor
    corrupted: torch.Tensor
    labels: dict[str, torch.Tensor]
    correct: list[list[int]]
    wrong: list[list[int]]


def measure_model(folder: Path) -> dict[str, Any]:
    """Accuracy on held-out questions, and the steps of every task."""
    plain, model = GPT2LMHeadModel.from_pretrained(folder).eval(), load_model(folder)
    return {
        "parameters": sum(weights.numel() for weights in plain.parameters()),
        "accuracy": answer_questions(plain),
        "steps": {task: measure_steps(model, task) for task in TASKS},
    }


@torch.no_grad()
def measure_steps(model: TransformerBridge, task: str) -> dict[str, Any]:
    """Clean and corrupted metric of a task, and [denoising, noising] recovery at each place."""
    sums: dict[Place, torch.Tensor] = defaultdict(lambda: torch.zeros(2))
    total = torch.zeros(2)
    for group in _groups(draw(task, PAIRS, "steps")):
        clean_logits, clean = model.run_with_cache(group.clean)
        corrupted_logits, corrupted = model.run_with_cache(group.corrupted)
        ends = torch.stack([_metric(task, logits, group) for logits in (clean_logits, corrupted_logits)])
        total += ends
        for hook, where in places(model, group.labels):
            delta = _restrict(clean[hook] - corrupted[hook], group.labels, where)
            denoised = model.run_with_hooks(group.corrupted, fwd_hooks=[(hook, _adder(delta))])
            noised = model.run_with_hooks(group.clean, fwd_hooks=[(hook, _adder(-delta))])
            patched = torch.stack([_metric(task, logits, group) for logits in (denoised, noised)])
            sums[hook, where] += (patched - ends.flip(0)) * torch.tensor([1.0, -1.0])
    effect = (total[0] - total[1]).item()
    recovery: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for (hook, where), value in sums.items():
        recovery[hook][where] = [round(v, 3) for v in (value / effect).tolist()]
    clean_mean, corrupted_mean = (round(v, 3) for v in (total / PAIRS).tolist())
    return {"clean": clean_mean, "corrupted": corrupted_mean, "recovery": recovery}


def places(model: TransformerBridge, labels: Iterable[str]) -> list[Place]:
    """The residual stream before every layer and at the end by position, every head, every MLP."""
    layers, heads = range(model.cfg.n_layers), range(model.cfg.n_heads)
    residual = [f"blocks.{layer}.hook_resid_pre" for layer in layers] + [f"blocks.{layers[-1]}.hook_resid_post"]
    found = [(hook, label) for hook in residual for label in labels]
    found += [(f"blocks.{layer}.attn.hook_z", f"head {head}") for layer in layers for head in heads]
    return found + [(f"blocks.{layer}.hook_mlp_out", "all") for layer in layers]


def _groups(pairs: Iterable[PromptPair]) -> list[Group]:
    """Pairs by length."""
    by_length: dict[int, list[PromptPair]] = defaultdict(list)
    for pair in pairs:
        by_length[len(encode(pair.clean))].append(pair)
    return [
        Group(
            torch.tensor([encode(pair.clean) for pair in same]),
            torch.tensor([encode(pair.corrupted) for pair in same]),
            {label: torch.tensor([pair.labels[label] for pair in same]) for label in same[0].labels},
            [_ids(pair.correct) for pair in same],
            [_ids(pair.wrong) for pair in same],
        )
        for same in by_length.values()
    ]


def _ids(answers: str | list[str]) -> list[int]:
    words = vocabulary()
    return [words[answer] for answer in ([answers] if isinstance(answers, str) else answers)]


def _metric(task: str, logits: torch.Tensor, group: Group) -> torch.Tensor:
    """The metric summed over the pairs of a group."""
    last = logits[:, -1]
    scores = last.softmax(-1) if task == "greater_than" else last
    return sum(
        (row[correct].sum() - row[wrong].sum() for row, correct, wrong in zip(scores, group.correct, group.wrong, strict=True)),
        torch.zeros(()),
    )


def _restrict(delta: torch.Tensor, labels: dict[str, torch.Tensor], where: str) -> torch.Tensor:
    """The difference at one position or in one head only."""
    if where == "all":
        return delta
    mask = torch.zeros_like(delta)
    if where.startswith("head "):
        mask[:, :, int(where.removeprefix("head "))] = 1
    else:
        mask[torch.arange(len(delta)), labels[where]] = 1
    return delta * mask


def _adder(delta: torch.Tensor) -> Any:
    return lambda activation, hook: activation + delta
