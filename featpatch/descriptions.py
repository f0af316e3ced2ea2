"""Descriptions of features: the word that a feature detects, measured over all words of a text, and max-activating examples.

A feature is compared with simple labels of every position: "the word is w" and "the next word is w". The label with the
best F1 (harmonic mean of precision and recall of `activation > 0` as a detector of the label) describes it; a low F1 means
that no single word describes it.
"""

import warnings
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch.nn.utils.rnn import pad_sequence

from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, FeatpatchWarning, check_numbers, listed
from featpatch.model.lens import Lens
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Node
from featpatch.page.page import block
from featpatch.pairs.likelihood import TOKENS
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import PairsWarning, Tokenizer, check_tokenizer, prompt_ids, special_positions
from featpatch.sae.dictionary import Dictionary, dictionaries
from featpatch.sae.nodes import with_owner
from featpatch.untrusted import visible

CONTEXT = 5
"""The number of tokens shown before the one on which a feature is active."""
MANY = 10
"""The number of positions considered for each max-activating example, so that the examples differ."""
ACTIVE = 10
"""The number of active positions below which a warning is given: the share of them on a given word is then uncertain by more
than 0.3 (two standard errors)."""
POSITIONS = 300
"""The number of positions below which a warning is given: most words then occur once or twice, so a feature seems to detect
whichever word it happens to be active on."""
READ = 256
"""The largest number of pairs whose prompts are read to describe features, if there are no texts."""
NAMED = 5
"""The largest number of features that a warning names."""


@dataclass(frozen=True)
class Example:
    """A max-activating example, the tokens around the one on which the feature is active.

    Attributes:
        tokens: the text of each token.
        values: the activation on each token.
        value: the activation on the token for which the example was chosen.
    """

    tokens: tuple[str, ...]
    values: tuple[float, ...]
    value: float


@dataclass(frozen=True, repr=False)
class Description:
    """A description of the positions of a text at which a feature is active.

    Attributes:
        label: the kind of label that fits best: `"on"` for the word itself, `"before"` for the next word.
        word: the word of the best label; empty if the feature is never active.
        f1: how well the feature detects the label, from 0 to 1.
        fired, positions: the number of positions at which the feature is active, and of all positions, without special tokens.
        contexts: max-activating examples, strongest first and without duplicates, with the active token in brackets.
        examples: the same examples as tokens with their activations.

    Examples:
        >>> (description,) = fp.max_activating(model, saes, effects.top(1).nodes, demo.text()[:60]).values()
        >>> description.fired < description.positions
        True
    """

    label: str
    word: str
    f1: float
    fired: int
    positions: int
    contexts: tuple[str, ...]
    examples: tuple[Example, ...] = ()

    @property
    def share(self) -> float:
        """The share of all positions at which the feature is active."""
        return self.fired / self.positions

    @property
    def best(self) -> str:
        """The label and its F1, for a narrow column."""
        return f"{self.label} {self.word!r} (F1 {self.f1:.2f})" if self.word else "never active in the text"

    @property
    def count(self) -> str:
        """The number of positions at which the feature is active, as a phrase."""
        return f"active at {self.fired:,} of {self.positions:,} positions"

    def __repr__(self) -> str:
        return visible(f"{self.best}, {self.count}")

    def _repr_html_(self) -> str:
        return _html({"": self})


class Descriptions(dict[Node, Description]):
    """Descriptions by node; they print with activations, and a notebook shows the examples with tokens shaded by activation."""

    def __repr__(self) -> str:
        lines = []
        for node, found in self.items():
            examples = zip(found.examples, found.contexts, strict=True)
            lines += [f"{node}: {found}", *(f"  {example.value:.3g}  {context}" for example, context in examples)]
        return visible("\n".join(lines))

    def _repr_html_(self) -> str:
        return _html({str(node): found for node, found in self.items()})


def _html(descriptions: Mapping[str, Description]) -> str:
    """Return descriptions as HTML, with each token of an example shaded by the activation."""
    features = [
        {
            "title": title,
            "description": repr(found),
            "examples": found.examples,
            "largest": max([1e-12, *(abs(value) for example in found.examples for value in example.values)]),
        }
        for title, found in descriptions.items()
    ]
    return str(block("examples.html", features=features))


@torch.no_grad()
def max_activating(
    model: Any, saes: Any, nodes: Sequence[Node] | Effects, texts: Sequence[str], *, contexts: int = 3
) -> Descriptions:
    """Describe every feature among the nodes by the word that it detects and its max-activating examples.

    Every description says at how many positions of the text the feature is active. A FeatpatchWarning names the features for
    which there is too little text: those that are active at fewer than 10 positions, or all of them if the text has fewer than
    300 positions.

    Args:
        model: a TransformerBridge or a HookedTransformer with a tokenizer.
        saes: the SAEs that the nodes name.
        nodes: nodes, such as `effects.top().nodes`, or a table of effects; those that are not features are skipped, and their
            positions are ignored.
        texts: documents; one that exceeds the model's context is truncated, with a PairsWarning.
        contexts: the number of max-activating examples per feature.

    Returns:
        A description of each feature among the nodes, a dictionary by node. In a notebook, its examples are shown with each
        token shaded by the activation.

    Raises:
        FeatpatchError: the model has no tokenizer, there are no texts or none with a word, or a node names a feature or an SAE
            that does not exist.

    Examples:
        >>> nodes = effects.top(1).nodes
        >>> described = fp.max_activating(model, saes, nodes, demo.text()[:60])
        >>> described[nodes[0]].label, described[nodes[0]].fired >= 10, len(described[nodes[0]].contexts)
        ('before', True, 3)
    """
    check_numbers(1, contexts=contexts)
    lens = wrap(model)
    check_tokenizer(lens.tokenizer, "to tokenize the texts")
    check_texts(texts)
    nodes = getattr(nodes, "nodes", nodes)
    if not isinstance(nodes, (list, tuple)) or not all(isinstance(node, Node) for node in nodes):
        raise FeatpatchError(
            f"nodes={nodes!r:.80}: expected a list of fp.Node, such as effects.top().nodes, or a table of effects"
        )
    found = dictionaries(lens, saes)
    ids = ids_of(model, texts, lens.n_ctx)
    features = [node for node in dict.fromkeys(nodes) if node.kind == "feature"]
    named = [with_owner(lens, node, found) for node in features]
    for node, owner in named:
        if owner is not None and node.index is not None and node.index >= owner.per_group:
            raise FeatpatchError(f"node {str(node)!r}: expected a feature of {owner.name!r}, from 0 to {owner.per_group - 1}")
    described = descriptions_of(lens, found, [node for node, _ in named], ids, contexts)
    descriptions = Descriptions(zip(features, described, strict=True))
    _warn(descriptions)
    return descriptions


def descriptions_of(
    lens: Lens, found: Sequence[Dictionary], features: Sequence[Node], prompts: Sequence[tuple[int, ...]], contexts: int
) -> list[Description]:
    """Describe features of some dictionaries from tokenized texts, see `max_activating`.

    Raises:
        FeatpatchError: the texts hold only special tokens.
    """
    tokenizer = lens.tokenizer
    text = [Document.of(tokenizer, ids) for ids in prompts]
    if not any(part.usable.any() for part in text):
        raise FeatpatchError(
            "the texts hold only special tokens: expected words, to find what activates the features; give other texts"
        )
    columns = read_words(lens, found, features, text)
    return [_describe(tokenizer, text, column, contexts) for column in columns.T]


def read_words(
    lens: Lens, found: Sequence[Dictionary], features: Sequence[Node], text: "Sequence[Document]"
) -> Float[torch.Tensor, "words features"]:
    """Return the activations of the features on all tokens of the documents that are not special."""
    every = read_features(lens, found, features, [part.tokens for part in text])
    return torch.cat([values[part.usable] for values, part in zip(every, text, strict=True)])


def _warn(descriptions: Mapping[Node, Description]) -> None:
    """Issue a warning if descriptions are based on too little text."""
    positions = next((found.positions for found in descriptions.values()), POSITIONS)
    few = [node for node, found in descriptions.items() if found.fired < ACTIVE or positions < POSITIONS]
    if few:
        named = listed([f"{node.sae} feature {node.index} ({descriptions[node].fired})" for node in few], NAMED, "; ")
        warnings.warn(
            f"there is too little text to describe {len(few)} of {len(descriptions)} features reliably: it has {positions:,} "
            f"positions, and these features are active at the number of positions in brackets: {named}; expected at "
            f"least {ACTIVE} active positions per feature and {POSITIONS} positions in all; give more text that resembles "
            "the pairs",
            FeatpatchWarning,
            stacklevel=4,
        )


@dataclass(frozen=True)
class Document:
    """The tokens of a text.

    Attributes:
        tokens: the token ids, `[pos]`.
        usable: a mask of the tokens that are not special, `[pos]`.
    """

    tokens: Int[torch.Tensor, " pos"]
    usable: Bool[torch.Tensor, " pos"]

    @property
    def followed(self) -> Bool[torch.Tensor, " words"]:
        """A mask of the usable tokens that are followed by another token, `[words]`."""
        return (torch.arange(len(self.tokens)) < len(self.tokens) - 1)[self.usable]

    @classmethod
    def of(cls, tokenizer: Tokenizer | None, ids: tuple[int, ...]) -> "Document":
        """Return the tokens of a text with a mask of the special ones; without a tokenizer, none are."""
        usable = torch.ones(len(ids), dtype=torch.bool)
        usable[list(() if tokenizer is None else special_positions(tokenizer, ids))] = False
        return cls(torch.tensor(ids), usable)


def check_texts(texts: Any) -> None:
    """Raise a FeatpatchError unless texts are a list of documents, or a column of a table of them."""
    several = isinstance(texts, Iterable) and isinstance(texts, Sized) and not isinstance(texts, str)
    if not several or not len(texts) or not all(isinstance(text, str) for text in texts):
        raise FeatpatchError(
            f"texts is a {type(texts).__name__}: expected a list of at least one text, to find what activates the features"
        )


def ids_of(tokenizer: Tokenizer, texts: Sequence[str], context: int | None) -> list[tuple[int, ...]]:
    """Return the token ids of the texts, truncated to the model's context."""
    every = [prompt_ids(tokenizer, text) for text in texts]
    longer = sum(context is not None and len(ids) > context for ids in every)
    if longer:
        warnings.warn(
            f"{longer} of {len(texts)} texts are longer than the model's context of {context} tokens and are truncated to it; "
            "split them to use their full text",
            PairsWarning,
            stacklevel=4,
        )
    return [ids[:context] for ids in every]


def documents_of(lens: Lens, source: Sequence[str] | Pairs) -> list[tuple[int, ...]]:
    """Return the token ids of texts, truncated to the model's context, or of the prompts of pairs, each once."""
    if not isinstance(source, Pairs):
        return ids_of(lens.model, source, lens.n_ctx)
    every = dict.fromkeys(ids for pair in source for ids in (pair.clean, pair.corrupted))
    return [ids for ids in every if ids]


def together(lengths: Sequence[int], *, causal: bool) -> list[list[int]]:
    """Group the indices of documents that share a forward pass.

    They have similar lengths in a causal model, in which padding at the end changes nothing before it, else equal lengths.
    """
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        longest = lengths[groups[-1][0]] if groups else 0
        alike = 2 * lengths[index] > longest if causal else lengths[index] == longest
        if groups and alike and (len(groups[-1]) + 1) * longest <= TOKENS:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


def read_features(
    lens: Lens, found: Sequence[Dictionary], features: Sequence[Node], prompts: Sequence[Int[torch.Tensor, " pos"]]
) -> list[Float[torch.Tensor, "pos features"]]:
    """Return the activations of the features on all tokens of each prompt; several prompts share a forward pass.

    In a causal model, prompts are padded to the longest of their group; padding does not change the features before it.
    """
    by_name = {dictionary.name: dictionary for dictionary in found}
    named = {name: [n for n, node in enumerate(features) if node.sae == name] for name in {node.sae for node in features}}
    hooks = sorted({hook for name in named for hook in by_name[name].hooks})
    values: dict[int, torch.Tensor] = {}
    for group in together(list(map(len, prompts)), causal=lens.causal):
        tokens = pad_sequence([prompts[index] for index in group], batch_first=True)
        read = lens.read(tokens, hooks)
        here = torch.zeros(*tokens.shape, len(features), dtype=torch.float64)
        for name, columns in named.items():
            numbers = [by_name[name].number(features[n]) for n in columns]
            here[..., columns] = by_name[name].split(read).features[..., numbers].to(here)
        values |= {index: of_prompt[: len(prompts[index])] for index, of_prompt in zip(group, here, strict=True)}
    return [values[index] for index in range(len(prompts))]


def _describe(tokenizer: Any, text: list[Document], values: Float[torch.Tensor, " words"], contexts: int) -> Description:
    active = values > 0
    words = torch.cat([part.tokens[part.usable] for part in text])
    following = torch.cat([part.tokens.roll(-1)[part.usable] for part in text])
    followed = torch.cat([part.followed for part in text])
    on, before = _best_word(words, active), _best_word(following[followed], active[followed])
    f1, word, label = max((*on, "on"), (*before, "before"))
    places = [(part.tokens, position) for part in text for (position,) in part.usable.nonzero().tolist()]
    alike = (values / values.amax().clamp(min=1e-30)).round(decimals=4)  # else rounding errors would order equal activations
    strongest = alike.masked_fill(~active, -1).argsort(descending=True, stable=True)[: int(active.sum())].tolist()
    distinct: dict[str, int] = {}
    for index in strongest[: MANY * contexts]:
        distinct.setdefault(_context(tokenizer, *places[index]), index)
    return Description(
        label=label,
        word=tokenizer.decode([word]).strip() if f1 else "",
        f1=f1,
        fired=int(active.sum()),
        positions=len(active),
        contexts=tuple(distinct)[:contexts],
        examples=tuple(_example(tokenizer, places, values, index) for index in list(distinct.values())[:contexts]),
    )


def _example(
    tokenizer: Any, places: Sequence[tuple[torch.Tensor, int]], values: Float[torch.Tensor, " words"], index: int
) -> Example:
    """Return the tokens around an active one, without special tokens, and their activations."""
    document = places[index][0]
    around = range(max(0, index - CONTEXT), min(len(places), index + 2))
    shown = [n for n in around if places[n][0] is document]
    tokens = tuple(tokenizer.decode([int(document[places[n][1]])]) for n in shown)
    return Example(tokens, tuple(values[shown].tolist()), float(values[index]))


def _best_word(words: torch.Tensor, active: torch.Tensor) -> tuple[float, int]:
    count = torch.bincount(words, minlength=1)  # there may be no words, because a text of one word has no next word
    hits = torch.bincount(words[active], minlength=len(count))
    f1 = 2 * hits / (count + active.sum()).clamp(min=1)
    return float(f1.max()), int(f1.argmax())


def _context(tokenizer: Any, tokens: torch.Tensor, position: int) -> str:
    ids = tokens.tolist()
    before = tokenizer.decode(ids[max(0, position - CONTEXT) : position], skip_special_tokens=True)
    return f"{before} [{tokenizer.decode([ids[position]])}] {tokenizer.decode(ids[position + 1 : position + 2])}".strip()
