"""Describe what a feature fires on, measured over all words of a text rather than guessed from a few examples.

A feature is compared with simple labels of every position: "the word is w" and "the next word is w". The label with the
best F1 (harmonic mean of precision and recall of `activation > 0` as a detector of the label) describes it; a low F1 says
that no such word does.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary, Lens, dictionaries, wrap
from featpatch.pairs import PairsWarning
from featpatch.pairs.tokens import Tokenizer, prompt_ids, special_positions
from featpatch.patch import Node

CONTEXT = 5
"""Words before the one on which a feature fires that are shown."""
MANY = 10
"""How many places are looked at for each context that is shown, so that the contexts differ."""


@dataclass(frozen=True)
class Description:
    """What a feature fires on in a text.

    Attributes:
        label: `"on"` for the word itself, `"before"` for the next word.
        word: the word of the best label; empty where the feature never fires.
        f1: how well the feature detects the label, 0 to 1.
        share: share of all positions on which it fires.
        contexts: where it fires most, strongest first, each text once, the word itself in brackets.
    """

    label: str
    word: str
    f1: float
    share: float
    contexts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.label} {self.word!r} (F1 {self.f1:.2f})" if self.word else "never fires in the text"


@torch.no_grad()
def describe(
    model: Any, saes: Any, nodes: Sequence[Node], texts: Sequence[str], *, contexts: int = 3
) -> dict[Node, Description]:
    """A description of every feature among the nodes; its position plays no part.

    Args:
        model: a TransformerBridge or a HookedTransformer with a tokenizer.
        saes: the sae-lens objects that the nodes name.
        texts: documents; one that exceeds the model's context is truncated, with a PairsWarning.
        contexts: how many examples to keep.

    Raises:
        FeatpatchError: no tokenizer, no texts, none with a word, or a node of a dictionary that is not among the SAEs.
    """
    lens = wrap(model)
    if getattr(model, "tokenizer", None) is None:
        raise FeatpatchError("the model has no tokenizer: expected one, to read the texts with; pass it when the model is made")
    if not texts:
        raise FeatpatchError("there are no texts: expected documents to look for what a feature fires on")
    found = {dictionary.name: dictionary for dictionary in dictionaries(lens, saes)}
    text = [_Words.of(model.tokenizer, rows) for rows in _by_length(model, texts, lens.n_ctx)]
    if not any(part.usable.any() for part in text):
        raise FeatpatchError(
            "the texts have no words: expected tokens that are not special, to look for what a feature fires on"
        )
    features = [node for node in dict.fromkeys(nodes) if node.kind == "feature"]
    described = {}
    for name in dict.fromkeys(node.sae for node in features):
        if name not in found:
            raise FeatpatchError(
                f"a node names dictionary {name!r}: expected one of {', '.join(found)}, the SAEs that you pass"
            )
        of_sae = [node for node in features if node.sae == name]
        indices = torch.tensor([node.index for node in of_sae])
        values = [_activations(lens, found[name], part.tokens, indices)[part.usable] for part in text]
        for node, column in zip(of_sae, torch.cat(values).T, strict=True):
            described[node] = _describe(model.tokenizer, text, column, contexts)
    return described


@dataclass(frozen=True)
class _Words:
    """Documents of equal length, with a mask of the words that are not special tokens."""

    tokens: Int[torch.Tensor, "docs pos"]
    usable: Bool[torch.Tensor, "docs pos"]

    @property
    def followed(self) -> Bool[torch.Tensor, " words"]:
        """Whether each usable word is followed by another token, in order."""
        return (torch.arange(self.tokens.shape[1]) < self.tokens.shape[1] - 1).expand_as(self.usable)[self.usable]

    @classmethod
    def of(cls, tokenizer: Tokenizer, rows: list[tuple[int, ...]]) -> "_Words":
        usable = torch.ones(len(rows), len(rows[0]), dtype=torch.bool)
        for row, ids in zip(usable, rows, strict=True):
            row[list(special_positions(tokenizer, ids))] = False
        return cls(torch.tensor(rows), usable)


def _by_length(tokenizer: Tokenizer, texts: Sequence[str], context: int | None) -> list[list[tuple[int, ...]]]:
    """Return the token ids of the texts, truncated to the model's context and grouped by length."""
    groups: dict[int, list[tuple[int, ...]]] = {}
    every = [prompt_ids(tokenizer, text) for text in texts]
    longer = sum(context is not None and len(ids) > context for ids in every)
    if longer:
        warnings.warn(
            f"{longer} of {len(texts)} texts are longer than the model's context of {context} tokens and are truncated to it; "
            "split them to use all of their words",
            PairsWarning,
            stacklevel=3,
        )
    for ids in every:
        groups.setdefault(len(ids[:context]), []).append(ids[:context])
    return list(groups.values())


def _activations(
    lens: Lens, dictionary: Dictionary, tokens: Int[torch.Tensor, "docs pos"], indices: Int[torch.Tensor, " n"]
) -> Float[torch.Tensor, "docs pos n"]:
    activations = lens.read(tokens, sorted({dictionary.reads, dictionary.writes}))
    return dictionary.split(activations[dictionary.reads], activations[dictionary.writes]).features[..., indices].cpu()


def _describe(tokenizer: Any, text: list[_Words], values: Float[torch.Tensor, " words"], contexts: int) -> Description:
    fires = values > 0
    words = torch.cat([part.tokens[part.usable] for part in text])
    following = torch.cat([part.tokens.roll(-1, 1)[part.usable] for part in text])
    followed = torch.cat([part.followed for part in text])
    on, before = _best_word(words, fires), _best_word(following[followed], fires[followed])
    f1, word, label = max((*on, "on"), (*before, "before"))
    places = [(part.tokens[document], position) for part in text for document, position in part.usable.nonzero().tolist()]
    alike = (values / values.amax().clamp(min=1e-30)).round(decimals=4)  # else rounding would order what the same words give
    strongest = alike.masked_fill(~fires, -1).argsort(descending=True, stable=True)[: int(fires.sum())].tolist()
    distinct = dict.fromkeys(_context(tokenizer, *places[index]) for index in strongest[: MANY * contexts])
    return Description(
        label=label,
        word=tokenizer.decode([word]).strip() if f1 else "",
        f1=f1,
        share=float(fires.double().mean()),
        contexts=tuple(distinct)[:contexts],
    )


def _best_word(words: torch.Tensor, fires: torch.Tensor) -> tuple[float, int]:
    count = torch.bincount(words, minlength=1)  # of no words: texts of one word have no next one
    hits = torch.bincount(words[fires], minlength=len(count))
    f1 = 2 * hits / (count + fires.sum()).clamp(min=1)
    return float(f1.max()), int(f1.argmax())


def _context(tokenizer: Any, tokens: torch.Tensor, position: int) -> str:
    ids = tokens.tolist()
    before = tokenizer.decode(ids[max(0, position - CONTEXT) : position], skip_special_tokens=True)
    return f"{before} [{tokenizer.decode([ids[position]])}] {tokenizer.decode(ids[position + 1 : position + 2])}".strip()
