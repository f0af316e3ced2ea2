"""Many pairs: made from prompts, from token ids or from a JSON-lines file."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from jaxtyping import Int

from featpatch.errors import FeatpatchError
from featpatch.pairs.pair import Pair
from featpatch.pairs.tokens import Tokenizer, answer_id, prompt_ids, special_positions

Answers = str | Sequence[str]
T = TypeVar("T")


@dataclass(frozen=True)
class Pairs(Sequence[Pair]):
    """A sequence of pairs; lengths may differ from pair to pair, never within one."""

    pairs: tuple[Pair, ...]

    def __post_init__(self) -> None:
        if not self.pairs:
            raise FeatpatchError("there are no pairs: expected at least one clean and one corrupted prompt")

    @classmethod
    def from_prompts(
        cls,
        tokenizer: Tokenizer,
        *,
        clean: Sequence[str],
        corrupted: Sequence[str],
        correct: Sequence[Answers],
        wrong: Sequence[Answers],
        labels: Sequence[Mapping[str, int]] | None = None,
    ) -> "Pairs":
        """Pairs from texts.

        Args:
            tokenizer: a Hugging Face tokenizer (e.g. `model.tokenizer`), or a function from a text to ids. Special
                tokens that it adds to a prompt (BOS) belong to the prompt and are left out of swaps.
            clean, corrupted: prompts, equally many.
            correct, wrong: for each prompt an answer that is one token, or several such answers.
            labels: for each prompt names of token positions, e.g. `{"S2": 12}`.

        Raises:
            FeatpatchError: unequal lengths, an answer that is not one token, a label outside the prompt.
        """
        columns = [clean, corrupted, correct, wrong, labels if labels is not None else [{}] * len(clean)]
        _equally_many(["clean", "corrupted", "correct", "wrong", "labels"], columns)

        def make(clean: str, corrupted: str, correct: Answers, wrong: Answers, labels: Mapping[str, int]) -> Pair:
            ids, other = prompt_ids(tokenizer, clean), prompt_ids(tokenizer, corrupted)
            return Pair(
                clean=ids,
                corrupted=other,
                correct=_answer_ids(tokenizer, correct),
                wrong=_answer_ids(tokenizer, wrong),
                labels=dict(labels),
                special=special_positions(tokenizer, ids, other),
            )

        return cls(_each(make, *columns))

    @classmethod
    def from_tokens(
        cls,
        clean: Int[torch.Tensor, "pairs pos"],
        corrupted: Int[torch.Tensor, "pairs pos_corrupted"],
        correct: Int[torch.Tensor, " pairs"] | Int[torch.Tensor, "pairs answers"],
        wrong: Int[torch.Tensor, " pairs"] | Int[torch.Tensor, "pairs wrong_answers"],
        labels: Sequence[Mapping[str, int]] | None = None,
        *,
        attention_mask: Int[torch.Tensor, "..."] | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> "Pairs":
        """Pairs from id tensors.

        Args:
            attention_mask: 1 for tokens and 0 for the padding on either side, of both prompts of a pair. Padding is cut off,
                so that it plays no part in anything; labels are positions in the padded rows.
            tokenizer: one whose special tokens (BOS) are left out of swaps; without it no position counts as special.

        Raises:
            FeatpatchError: unequal lengths, no pairs, a label outside the prompt, padding between tokens.
        """
        if attention_mask is not None and not attention_mask.shape == clean.shape == corrupted.shape:
            raise FeatpatchError(
                f"clean is {tuple(clean.shape)}, corrupted {tuple(corrupted.shape)} and attention_mask "
                f"{tuple(attention_mask.shape)}: expected equal shapes"
            )
        columns: list[Sequence[Any]] = [clean.tolist(), corrupted.tolist(), correct.reshape(len(correct), -1).tolist()]
        columns += [wrong.reshape(len(wrong), -1).tolist(), labels if labels is not None else [{}] * len(clean)]
        columns.append((torch.ones_like(clean) if attention_mask is None else attention_mask).tolist())
        _equally_many(["clean", "corrupted", "correct", "wrong", "labels", "attention_mask"], columns)

        def make(
            clean: list[int], corrupted: list[int], correct: list[int], wrong: list[int], labels: Any, mask: list[int]
        ) -> Pair:
            start, stop = _tokens(mask)
            ids = tuple(clean[start:stop])
            other = tuple(corrupted[start:stop] if attention_mask is not None else corrupted)
            return Pair(
                clean=ids,
                corrupted=other,
                correct=tuple(correct),
                wrong=tuple(wrong),
                labels={label: p - start if isinstance(p, int) else p for label, p in labels.items()},
                special=special_positions(tokenizer, ids, other) if tokenizer is not None else frozenset(),
            )

        return cls(_each(make, *columns))

    @classmethod
    def from_jsonl(cls, tokenizer: Tokenizer, path: str | Path) -> "Pairs":
        """Pairs from a file of JSON lines `{"clean", "corrupted", "correct", "wrong"}` and, if wanted, `"labels"`.

        Raises:
            FeatpatchError: the file is missing, or a line is not JSON or lacks a field.
        """
        path = Path(path)
        if not path.is_file():
            raise FeatpatchError(f"there is no pairs file {str(path)!r}: give the path of a JSON-lines file")
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise FeatpatchError(f"the pairs file {str(path)!r} is not UTF-8 ({error}): save it as UTF-8") from error
        rows = [row for row in _each(_parse, lines, what="line") if row]
        if not rows:
            raise FeatpatchError(f"the pairs file {str(path)!r} is empty: expected one JSON object per line")
        return cls.from_prompts(
            tokenizer,
            clean=[row["clean"] for row in rows],
            corrupted=[row["corrupted"] for row in rows],
            correct=[row["correct"] for row in rows],
            wrong=[row["wrong"] for row in rows],
            labels=[row.get("labels", {}) for row in rows],
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "Pairs": ...
    def __getitem__(self, index: int | slice) -> "Pair | Pairs":
        return Pairs(self.pairs[index]) if isinstance(index, slice) else self.pairs[index]

    def by_length(self) -> dict[int, list[int]]:
        """Indices of the pairs, grouped by the number of tokens."""
        groups: dict[int, list[int]] = {}
        for index, pair in enumerate(self.pairs):
            groups.setdefault(len(pair), []).append(index)
        return groups

    def digest(self) -> str:
        """SHA-256 of everything that decides a result: tokens, answers, labels, positions."""
        content = [{**asdict(pair), "special": sorted(pair.special)} for pair in self.pairs]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


FIELDS: dict[str, type | tuple[type, ...]] = {"clean": str, "corrupted": str, "correct": (str, list), "wrong": (str, list)}


def _parse(line: str) -> dict[str, Any] | None:
    """One pair; None for a blank line."""
    if not line.strip():
        return None
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise FeatpatchError(f"{line[:60]!r} is not JSON ({error}): expected one object per line") from error
    missing = [key for key in ("clean", "corrupted", "correct", "wrong") if not isinstance(row, dict) or key not in row]
    if missing:
        raise FeatpatchError(f"{line[:60]!r} lacks {', '.join(missing)}: expected clean, corrupted, correct and wrong")
    for field, wanted in {**FIELDS, "labels": dict}.items():
        if not isinstance(row.get(field, {}), wanted):
            raise FeatpatchError(
                f"{field} is {row[field]!r} in {line[:60]!r}: expected text, for answers a list too, for labels an object"
            )
    return row


def _tokens(mask: list[int]) -> tuple[int, int]:
    """Where tokens start and stop within padding."""
    kept = [position for position, keep in enumerate(mask) if keep]
    if not kept or kept != list(range(kept[0], kept[-1] + 1)):
        raise FeatpatchError(f"attention_mask is {mask}: expected ones side by side, with zeros before or after them")
    return kept[0], kept[-1] + 1


def _answer_ids(tokenizer: Tokenizer, answers: Answers) -> tuple[int, ...]:
    return tuple(answer_id(tokenizer, answer) for answer in ([answers] if isinstance(answers, str) else answers))


def _equally_many(names: Sequence[str], columns: Sequence[Sequence[Any]]) -> None:
    counts = {name: len(column) for name, column in zip(names, columns, strict=True)}
    if len(set(counts.values())) > 1:
        raise FeatpatchError(f"there are {counts}: expected equally many of each, one per pair")


def _each(make: Callable[..., T], *columns: Sequence[Any], what: str = "pair") -> tuple[T, ...]:
    """`make` for every row; an error says which row it is about."""
    made = []
    for index, row in enumerate(zip(*columns, strict=True)):
        try:
            made.append(make(*row))
        except FeatpatchError as error:
            raise FeatpatchError(f"{what} {index + (what == 'line')}: {error}") from error
    return tuple(made)
