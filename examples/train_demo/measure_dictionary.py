"""How faithful a dictionary is, and how well single features stand for single words.

    explained variance = 1 - sum |x - x'|^2 / sum |x - mean x|^2          x' the reconstruction
    loss recovered     = (loss without x - loss with x') / (loss without x - loss with x)
    F1 of a feature    = 2 hits / (words on which it fires + words with the property)

Everything is measured over all words of held-out documents, each read alone after <bos>.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sae_lens import SAE
from transformer_lens.model_bridge import TransformerBridge

from . import grammar as g
from .activations import load_model
from .corpus import document
from .vocabulary import MAX_LENGTH, split, vocabulary

DOCUMENTS = 4000
LOSS_DOCUMENTS = 1000
"""Documents for the losses."""
STRONG = 0.25
"""A feature fires strongly above this share of its largest value."""
RARE = 5
"""Words with a property in fewer places than this are not judged."""


@dataclass(frozen=True)
class Text:
    """Held-out documents as padded token ids [documents, words], and where their answers are."""

    ids: torch.Tensor
    answers: torch.Tensor

    @property
    def words(self) -> torch.Tensor:
        """Which entries are words: neither <bos> nor padding; [documents, words - 1], <bos> left out."""
        return self.ids[:, 1:] != vocabulary()["<pad>"]


def held_out_documents(n: int) -> list[str]:
    """Documents of the corpus that nothing was trained on; answers are marked."""
    r = random.Random("held-out text")
    return [document(r) for _ in range(n)]


def read(documents: list[str]) -> Text:
    """Documents as token ids."""
    words = vocabulary()
    ids = torch.full((len(documents), MAX_LENGTH), words["<pad>"])
    answers = torch.zeros(ids.shape, dtype=torch.bool)
    for k, text in enumerate(documents):
        row = ["<bos>", *split(text)]
        ids[k, : len(row)] = torch.tensor([words[word.lstrip("^")] for word in row])
        answers[k, : len(row)] = torch.tensor([word.startswith("^") for word in row])
    longest = int((ids != words["<pad>"]).sum(1).max())
    return Text(ids[:, :longest], answers[:, :longest])


@torch.no_grad()
def measure_dictionary(model_folder: Path, folder: Path) -> dict[str, Any]:
    """All measurements of a saved dictionary."""
    model, sae = load_model(model_folder), SAE.load_from_disk(folder)
    text = read(held_out_documents(DOCUMENTS))
    reads = sae.cfg.metadata.hook_name
    writes = sae.cfg.metadata.hook_name_out or reads
    features, true, made = [], [], []
    for ids, words in zip(text.ids.split(250), text.words.split(250), strict=True):
        _, cache = model.run_with_cache(ids, names_filter=[reads, writes], return_type=None)
        found = sae.encode(cache[reads][:, 1:])
        features.append(found[words])
        true.append(cache[writes][:, 1:].flatten(2)[words])
        made.append(sae.decode(found).flatten(2)[words])
    x, f = torch.cat(true), torch.cat(features)
    error = (x - torch.cat(made)).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
    return {
        "words": len(x),
        "features": f.shape[1],
        "l0": round((f > 0).float().sum(1).mean().item(), 2),
        "explained_variance": round(1 - error.item(), 4),
        "dead_features": int((f.amax(0) <= 0).sum()),
        **losses(model, sae, reads, writes, text),
        "best_features": {name: best_features(f, labels) for name, labels in properties(text).items()},
    }


def losses(model: TransformerBridge, sae: Any, reads: str, writes: str, text: Text) -> dict[str, float]:
    """Cross-entropy of the model as it is, with the dictionary in place, and with zero there; <bos> is left alone."""
    kept: dict[str, torch.Tensor] = {}

    def keep(activation: torch.Tensor, hook: Any) -> None:
        kept["read"] = activation

    def replace(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        return after_bos(activation, sae.decode(sae.encode(kept["read"])).reshape(activation.shape))

    clean = cross_entropy(model, text, [])
    with_sae = cross_entropy(model, text, [(reads, keep), (writes, replace)])
    return recovered(clean, with_sae, cross_entropy(model, text, [(writes, zero)]))


def cross_entropy(model: TransformerBridge, text: Text, hooks: list[tuple[str, Callable[..., Any]]]) -> float:
    """Cross-entropy of the model with hooks, over the words of the first documents."""
    ids, words = text.ids[:LOSS_DOCUMENTS], text.words[:LOSS_DOCUMENTS]
    logits = model.run_with_hooks(ids, fwd_hooks=hooks)
    return F.cross_entropy(logits[:, 1:-1][words[:, 1:]], ids[:, 2:][words[:, 1:]]).item()


def recovered(clean: float, replaced: float, without: float) -> dict[str, float]:
    """Losses of the model as it is, with reconstructions and with zeros in place, and the loss recovered."""
    return {
        "loss": round(clean, 4),
        "loss_with_dictionary": round(replaced, 4),
        "loss_without_activation": round(without, 4),
        "loss_recovered": round((without - replaced) / (without - clean), 4),
    }


def zero(activation: torch.Tensor, hook: Any) -> torch.Tensor:
    """A hook that removes an activation."""
    return after_bos(activation, torch.zeros_like(activation))


def after_bos(activation: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """The new activation, but on <bos> the old one."""
    return torch.cat([activation[:, :1], new[:, 1:]], dim=1)


def properties(text: Text) -> dict[str, dict[str, torch.Tensor]]:
    """For each kind of property and each word, which of all words of the text have it."""
    here, following = text.ids[:, 1:], F.pad(text.ids[:, 2:], (0, 1))
    decided = F.pad(text.answers[:, 2:], (0, 1))
    again = (here[:, :, None] == here[:, None, :]).tril(-1).any(-1)
    return {
        "name here": _labels(here, g.NAMES, text.words),
        "name here, for the second time": _labels(here, g.NAMES, text.words, again),
        "name follows": _labels(following, g.NAMES, text.words),
        "name follows and is decided": _labels(following, g.NAMES, text.words, decided),
        "country here": _labels(here, [row[0] for row in g.COUNTRIES], text.words),
        "capital follows": _labels(following, [row[1] for row in g.COUNTRIES], text.words),
        "capital follows and is decided": _labels(following, [row[1] for row in g.COUNTRIES], text.words, decided),
    }


def _labels(
    ids: torch.Tensor, words: list[str], real: torch.Tensor, also: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    numbers = vocabulary()
    condition = torch.ones_like(real) if also is None else also
    return {word: ((ids == numbers[word]) & condition)[real] for word in words}


def best_features(f: torch.Tensor, labels: dict[str, torch.Tensor]) -> dict[str, Any]:
    """For each word the feature whose firing matches the property best, and the medians over the words."""
    judged = {word: label for word, label in labels.items() if label.sum() >= RARE}
    wanted = torch.stack(list(judged.values()), dim=1).float()
    best, feature = _f1((f > 0).float(), wanted).max(0)
    strong, _ = _f1((f > STRONG * f.amax(0).clamp(min=1e-9)).float(), wanted).max(0)
    return {
        "median_f1": round(best.median().item(), 3),
        "median_f1_strong": round(strong.median().item(), 3),
        "over_0.8": int((best > 0.8).sum()),
        "words": {
            word: {"feature": int(feature[k]), "f1": round(best[k].item(), 3), "f1_strong": round(strong[k].item(), 3)}
            for k, word in enumerate(judged)
        },
    }


def _f1(fires: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """F1 [features, properties]."""
    hits = fires.T @ wanted
    return 2 * hits / (fires.sum(0)[:, None] + wanted.sum(0)).clamp(min=1)
