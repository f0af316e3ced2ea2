"""A collection of pairs, made from prompts, token ids, files or tables."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, replace
from typing import Any, SupportsIndex, overload

import torch
from jaxtyping import Int

from featpatch.errors import FeatpatchError, check_kinds, counted
from featpatch.page.page import block
from featpatch.pairs import checklist
from featpatch.pairs.build import Answers, Prompt, warn_of_equal_prompts
from featpatch.pairs.checklist import Checklist, Status, check_by_position, without
from featpatch.pairs.fields import pairs_of
from featpatch.pairs.files import rows_of
from featpatch.pairs.labels import Label
from featpatch.pairs.pair import Pair
from featpatch.pairs.stored import PairsInFiles
from featpatch.pairs.tensors import Table, of_tensors
from featpatch.pairs.text import PairText
from featpatch.pairs.tokens import Tokenizer, by_length, chunks, plain_tokenizer
from featpatch.untrusted import visible

SHOWN = 8
"""The number of pairs that a notebook shows."""


@dataclass(frozen=True, repr=False)
class Pairs(PairsInFiles, Sequence[Pair]):
    """A sequence of pairs, which may have different lengths; `pairs + more` joins two of them.

    The two prompts of a pair differ in length only if they are patched label by label, see `align` of `from_prompts`.

    Attributes:
        pairs: the pairs.
        tokenizer: the tokenizer with which a notebook shows the pairs as text; without it, token ids are shown.

    Examples:
        >>> len(pairs), sorted(pairs[0].labels)
        (4, ['IO', 'S1', 'S2', 'end'])
        >>> short = fp.Pairs(tuple(pair for pair in pairs if len(pair) <= 24))
        >>> len(short)
        2
        >>> fp.Pairs.from_prompts(model, clean="Mary gave it to John . John gave it to", correct=" Mary")
        1 prompt of 11 tokens without a counterfactual, labels (none)
    """

    @classmethod
    def from_prompts(
        cls, tokenizer: Tokenizer, *,
        clean: str | Sequence[Prompt] | torch.Tensor, corrupted: str | Sequence[Prompt] | torch.Tensor | None = None,
        correct: str | Sequence[Answers] | torch.Tensor | None = None,
        wrong: str | Sequence[Answers] | torch.Tensor | None = None,
        labels: Mapping[str, Label] | Sequence[Mapping[str, Label]] | None = None,
        corrupted_labels: Mapping[str, Label] | Sequence[Mapping[str, Label]] | None = None,
        tags: Mapping[str, str] | Sequence[Mapping[str, str]] | None = None,
        align: str | None = None, filler: str | None = None, long_answers: bool = False,
    ) -> "Pairs":  # fmt: skip
        """Make pairs from prompts, each given as a text or as token ids.

        Args:
            tokenizer: the model, so that prompts get the ids that `model(text)` would use; or a Hugging Face tokenizer or a
                function from a text to ids, used as it is. Special tokens at the start of a prompt (BOS) belong to it and are
                left out of patches.
            clean, corrupted: equally many prompts, each a text or token ids such as `model.to_tokens(text)`; or a single text,
                with a single answer and one mapping of labels. Without `corrupted` the prompts have no counterfactual: they can
                be ablated with `fp.ablate` and patched with `fp.do`, and effects are in units of the metric.
            correct, wrong: for each pair, an answer that is one token, or several such answers; with `long_answers`, answers
                may be longer. Answers are tokenized as they continue the prompt: write `" Mary"`, with the space, for a
                separate word; an integer is the id of a token. Without `wrong`, or where it is empty or None, only metrics
                of the correct answers, such as `"log_prob"`, can be used. Prompts without a counterfactual may have no answers,
                for a metric that is a function of the logits alone.
            labels: for each clean prompt, names of positions. A position is a token index, `{"S2": 12}`, a text that occurs
                once in the prompt, `{"S2": "Mary"}`, or its characters, `{"S2": (34, 38)}`; a text stands for its last token.
                A label may also name a span, which is patched as one position: all tokens of a text,
                `{"subject": {"span": "Eiffel Tower"}}`, or a `range` of indices.
            corrupted_labels: the same for each corrupted prompt; by default the positions of the clean prompt.
            tags: for each pair, a description of how it was made, e.g. `{"template": "3", "corruption": "swap_s2"}`.
            align: `"labels"` to accept labels at other positions in the corrupted prompt, and prompts of unequal length, as
                they are. Such a pair is patched label by label: the value at a label in one prompt is written where the other
                prompt has that label. A span must have as many tokens in both prompts, and metrics are read at the ends.
            filler: a word that is one token, e.g. `" the"`, to change the prompts instead, so that all functions can use them:
                if they differ in length between two labels, copies of the filler are added to the shorter one after the first
                of these labels. A PairsWarning shows such a prompt. Positions given as labels are those in the prompts as
                given.
            long_answers: whether every answer is a sequence of one or more tokens, for the metric `"sequence_log_prob"`.

        Raises:
            FeatpatchError: the lengths are unequal, an answer is not one token (with `long_answers`: has no tokens), a label
                is outside the prompt or (without `align`) at another position of the corrupted prompt, or the labels can't be
                aligned.

        Examples:
            >>> pairs = fp.Pairs.from_prompts(
            ...     model,
            ...     clean=["When Mary and John went to the store, John gave a drink to"],
            ...     corrupted=["When Mary and John went to the store, Mary gave a drink to"],
            ...     correct=[" Mary"],
            ...     wrong=[" John"],
            ...     labels=[{"S2": 10}],
            ... )
            >>> pairs[0].first_difference
            10
        """
        if isinstance(clean, str):
            one: list[Any] = [None if given is None else [given] for given in (clean, corrupted, correct, wrong)]
            clean, corrupted, correct, wrong = one
            named: list[Any] = [[given] if isinstance(given, Mapping) else given for given in (labels, corrupted_labels, tags)]
            labels, corrupted_labels, tags = named
        given = {"corrupted_labels": corrupted_labels, "align": align, "filler": filler}
        if corrupted is None and any(value is not None for value in given.values()):
            names = ", ".join(name for name, value in given.items() if value is not None)
            raise FeatpatchError(f"{names} without corrupted: expected corrupted prompts too; add them, or leave out {names}")
        check_kinds(Sized, clean=clean, correct=[] if correct is None else correct, wrong=[] if wrong is None else wrong)
        for name, single in (("corrupted", corrupted), ("correct", correct), ("wrong", wrong)):
            if isinstance(single, str):
                raise FeatpatchError(
                    f"{name}={single!r} with a list of clean prompts: expected a list with an entry for each of them; "
                    f"write {name}=[{single!r}, ...]"
                )
        columns: dict[str, Any] = {"clean": clean, "corrupted": clean if corrupted is None else corrupted}
        for name, answers in (("correct", correct), ("wrong", wrong)):
            columns[name] = answers if answers is not None and len(answers) else [[]] * len(clean)
        for name, column in (("labels", labels), ("corrupted_labels", corrupted_labels), ("tags", tags)):
            if column is not None and not (isinstance(column, Sequence) and all(isinstance(of, Mapping) for of in column)):
                raise FeatpatchError(
                    f"{name}={str(column)[:60]}: expected a list with a mapping for each prompt, such as {name}=[{{...}}]"
                )
            columns[name] = column if column is not None else [{}] * len(clean)
        pairs = pairs_of(tokenizer, rows_of(columns), dict, align, filler, long_answers)
        if corrupted is not None:
            warn_of_equal_prompts(pairs)
        return cls(pairs, plain_tokenizer(tokenizer))

    @classmethod
    def from_tokens(
        cls,
        clean: Int[torch.Tensor, "pairs pos"] | Table,
        corrupted: Int[torch.Tensor, "pairs pos_corrupted"] | Table | None = None,
        correct: Int[torch.Tensor, " pairs"] | Int[torch.Tensor, "pairs answers"] | Table | None = None,
        wrong: Int[torch.Tensor, " pairs"] | Int[torch.Tensor, "pairs wrong_answers"] | Table | None = None,
        labels: Sequence[Mapping[str, SupportsIndex | Sequence[SupportsIndex]]] | None = None,
        *,
        attention_mask: Int[torch.Tensor, "..."] | Table | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> "Pairs":
        """Make pairs from token ids: tensors, arrays, or lists of rows, whose lengths may differ.

        Args:
            clean, corrupted: the token ids of the prompts, one row per pair; without `corrupted` they have no counterfactual.
            correct, wrong: the token ids of the answers; without `wrong`, or if it is empty, only metrics of the correct
                answers can be used.
            labels: for each pair, names of positions, or of spans as ranges or lists of positions, counted in the padded clean
                row.
            attention_mask: 1 for tokens and 0 for padding at either end, the same for both prompts of a pair. Padding is
                removed.
            tokenizer: a tokenizer whose special tokens (BOS) are left out of patches; without one, no position counts as
                special. Without `attention_mask`, its padding tokens at either end are removed with a PairsWarning.

        Raises:
            FeatpatchError: a table does not hold integers, lengths are unequal, there are no pairs, a label is outside the
                prompt, or padding is between tokens or can't be told from BOS or EOS.

        Examples:
            >>> pairs = fp.Pairs.from_tokens([[5, 6, 7]], [[5, 8, 7]], correct=[9], wrong=[10], labels=[{"subject": 1}])
            >>> pairs[0].first_difference
            1
        """
        plain = None if tokenizer is None else plain_tokenizer(tokenizer)
        return cls(of_tensors(clean, corrupted, correct, wrong, labels, attention_mask, tokenizer), plain)

    def __len__(self) -> int:
        return len(self.pairs)

    def __add__(self, other: "Pairs") -> "Pairs":
        """Return these pairs followed by others.

        Raises:
            FeatpatchError: the others are not Pairs.

        Examples:
            >>> len(pairs + fp.tasks.capitals(model, 4))
            12
        """
        return replace(self, pairs=self.pairs + check_pairs(other, by_label=True).pairs)

    def __repr__(self) -> str:
        lengths = sorted({size for pair in self for size in pair.lengths})
        labels = dict.fromkeys(label for pair in self for label in pair.labels)
        tokens = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]}"
        noun, alone = ("pair", "") if self.has_counterfactual else ("prompt", " without a counterfactual")
        apart = sum(pair.by_label for pair in self)
        how = f", {apart} of them patched label by label" if apart else ""
        said = f"{counted(len(self), noun)} of {tokens} tokens{alone}, labels {', '.join(labels) or '(none)'}{how}"
        return visible(said)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "Pairs": ...
    def __getitem__(self, index: SupportsIndex | slice) -> "Pair | Pairs":
        return replace(self, pairs=self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def __reduce__(self) -> tuple[Any, ...]:
        return Pairs, (self.pairs,)  # not every tokenizer can be pickled, and workers do not need it

    def _repr_html_(self) -> str:
        prompts = [PairText.of(pair, self.tokenizer) for pair in self[:SHOWN]]
        labels = [", ".join(f"{name} {position}" for name, position in pair.labels.items()) for pair in self]
        more = f", of which {SHOWN} are shown" if len(self) > SHOWN else ""
        shown = zip(prompts, labels, strict=False)
        return str(block("pairs.html", pairs=[{**vars(prompt), "labels": of} for prompt, of in shown], text=f"{self!r}{more}"))

    @property
    def has_counterfactual(self) -> bool:
        """Whether the corrupted prompt of any pair differs from the clean one."""
        return any(pair.has_counterfactual for pair in self)

    check = checklist.check

    def drop(self, found: Checklist, verdicts: Status | Sequence[Status] = "fail") -> "Pairs":
        """Return the pairs whose worst status in a checklist is not among `verdicts`.

        Args:
            found: the checklist of these pairs, from `check`.
            verdicts: one status or several: `"pass"`, `"warn"`, `"fail"`.

        Raises:
            FeatpatchError: a status is unknown, the checklist is of other pairs, or no pair is left.

        Examples:
            >>> good = pairs.drop(pairs.check(model), ["warn", "fail"])
            >>> good.check(model).ok
            True
        """
        if not isinstance(found, Checklist):
            raise FeatpatchError(
                f"found is of type {type(found).__name__}: expected the Checklist of these pairs; write "
                "pairs.drop(pairs.check(model), 'fail')"
            )
        return replace(self, pairs=without(self, found, verdicts))

    def by_length(self) -> dict[int, list[int]]:
        """Return the indices of the pairs, grouped by the number of tokens of the clean prompt.

        Examples:
            >>> sum(len(indices) for indices in pairs.by_length().values())
            4
        """
        return by_length(map(len, self.pairs))

    def chunks(self, tokens: int) -> Iterator[list[int]]:
        """Yield the indices of equally long pairs to run in one batch, of at most `tokens` tokens but at least one pair."""
        return chunks([pair.lengths for pair in self.pairs], tokens)

    def digest(self) -> str:
        """Return the SHA-256 hash of everything that determines a result: tokens, answers, labels, positions, tags.

        Examples:
            >>> pairs.digest() == demo.pairs("ioi", n=4).digest()
            True
        """
        content = [{**asdict(pair), "special": sorted(pair.special)} for pair in self.pairs]
        for fields in content:
            if not fields["corrupted_labels"]:
                del fields["corrupted_labels"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_pairs(pairs: Any, *, by_label: bool = False, **others: Any) -> Pairs:
    """Check that the argument is a `Pairs` object and return it.

    Args:
        by_label: whether the caller can patch pairs label by label.
        others: arguments beside which the pairs are given, for an error that says if two are swapped.

    Raises:
        FeatpatchError: it is not, or it has a pair that is patched label by label and the caller cannot.
    """
    swapped = next((name for name, value in others.items() if isinstance(value, Pairs)), None)
    if not isinstance(pairs, Pairs) and swapped is not None:
        raise FeatpatchError(
            f"pairs is a {type(pairs).__name__} and {swapped} is a Pairs: expected it the other way round; swap the two "
            f"arguments, or write pairs=..., {swapped}=..."
        )
    if not isinstance(pairs, Pairs):
        raise FeatpatchError(f"pairs is a {type(pairs).__name__}: expected fp.Pairs, such as fp.Pairs.from_prompts(...)")
    if not by_label:
        check_by_position(pairs)
    return pairs


def check_counterfactual(pairs: Any, *, by_label: bool = False) -> Pairs:
    """Check that the argument is a `Pairs` object in which each corrupted prompt differs from its clean one, and return it.

    Args:
        by_label: as in `check_pairs`.

    Raises:
        FeatpatchError: it is not.
    """
    checked = check_pairs(pairs, by_label=by_label)
    if not checked.has_counterfactual:
        raise FeatpatchError(
            f"{pairs!r}: expected corrupted prompts that differ from the clean ones, because values are taken from the "
            "corrupted run; pass corrupted=..., or use fp.ablate or fp.do, which need no counterfactual"
        )
    check_unmixed(checked)
    return checked


def check_unmixed(pairs: Pairs) -> None:
    """Raise a FeatpatchError unless all pairs have a counterfactual or none has."""
    without = [index for index, pair in enumerate(pairs) if not pair.has_counterfactual]
    if 0 < len(without) < len(pairs):
        raise FeatpatchError(
            f"{len(without)} of {len(pairs)} pairs have no counterfactual, the first of them pair {without[0]}: expected all "
            "or none, because effects are either shares of the gap or changes of the metric; measure them separately"
        )
