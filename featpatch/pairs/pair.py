"""A pair of a clean and a corrupted prompt of equal length, with their answers."""

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from operator import index
from typing import Any

from featpatch.errors import MAX_INTEGER, FeatpatchError, check_kinds
from featpatch.nodes import Position
from featpatch.untrusted import visible

Sequences = tuple[tuple[int, ...], ...]
"""Several answers, each given by its token ids."""

LONG = 150
"""The number of characters after which the text form of a pair is truncated."""

LabelPosition = int | tuple[int, ...]
"""The place of a label: a token position, or the consecutive positions of a span, which are patched together."""


@dataclass(frozen=True, repr=False)
class Pair:
    """A clean and a corrupted prompt as token ids.

    Answers are either single tokens, which are alternatives, or sequences of tokens that follow the prompt, for the metrics
    `sequence_log_prob` and `sequence_log_prob_diff`.

    Attributes:
        clean, corrupted: the token ids of both prompts, which have the same length.
        correct, wrong: the token ids of the right answers to the clean prompt (one or several) and of the wrong ones, which may
            be left out for metrics that need none, such as `log_prob`. Both are `()` if answers are sequences.
        labels: names of token positions, e.g. `{"S2": 12}`, or of spans, e.g. `{"subject": (3, 4)}`.
        answer_position: the position at which the metric is read; the last token by default.
        special: the positions of BOS and other special tokens, which are never patched by default.
        tags: a description of how the pair was made, e.g. `{"template": "3", "corruption": "swap_s2"}`.
        correct_sequences, wrong_sequences: the token ids of each right and each wrong answer, e.g. `((5, 9), (7,))`.

    Example:
        >>> pair = fp.Pair(clean=(5, 6, 7), corrupted=(5, 8, 7), correct=(9,), wrong=(10,), labels={"subject": 1})
        >>> pair.first_difference
        1
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    correct: tuple[int, ...]
    wrong: tuple[int, ...]
    labels: Mapping[str, LabelPosition] = field(default_factory=dict)
    answer_position: int = -1
    special: frozenset[int] = frozenset()
    tags: Mapping[str, str] = field(default_factory=dict)
    correct_sequences: Sequences = ()
    wrong_sequences: Sequences = ()

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted", "correct", "wrong"):
            _check_tokens(name, getattr(self, name))
        for name in ("correct_sequences", "wrong_sequences"):
            check_kinds(tuple, **{name: getattr(self, name)})
            for answer in getattr(self, name):
                _check_tokens(name, answer)
        check_kinds(Mapping, labels=self.labels, tags=self.tags)
        check_kinds(Set, special=self.special)
        if type(self.answer_position) is not int:
            raise FeatpatchError(f"answer_position={self.answer_position!r}: expected an integer, a position of the prompt")
        n = len(self.clean)
        if n == 0:
            raise FeatpatchError("the clean prompt has no tokens: expected at least one")
        if len(self.corrupted) != n:
            raise FeatpatchError(
                f"clean has {n} tokens and corrupted has {len(self.corrupted)}: expected equal lengths, because values are "
                "swapped position by position; change words for words of as many tokens, or see align= of fp.Pairs.from_prompts"
            )
        self._check_answers()
        if not -n <= self.answer_position < n:
            raise FeatpatchError(f"answer_position {self.answer_position} is outside a prompt of {n} tokens")
        object.__setattr__(self, "answer_position", self.answer_position % n)
        if self.correct_sequences and self.answer_position != n - 1:
            raise FeatpatchError(
                f"answer_position is {self.answer_position} and the answers are sequences: expected the last position, "
                f"{n - 1}, because they follow the prompt; cut the prompts off there"
            )
        plain = {label: plain_integers(position) for label, position in self.labels.items()}
        object.__setattr__(self, "labels", {k: self.labels[k] if p is None else p for k, p in plain.items()})
        for label, position in self.labels.items():
            span = positions_of(position)
            if not isinstance(label, str) or label in ("all", "each") or not span or not all(type(p) is int for p in span):
                raise FeatpatchError(
                    f"label {label!r} is at {position!r}: expected an integer position or a tuple of them, and a name other "
                    "than 'all' and 'each'"
                )
            if not 0 <= span[0] <= span[-1] < n:
                raise FeatpatchError(f"label {label!r} is at position {position}: expected 0 to {n - 1}")
            if span != tuple(range(span[0], span[-1] + 1)):
                raise FeatpatchError(f"label {label!r} is at positions {position}: expected consecutive positions")

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        differing = sum(one != other for one, other in zip(self.clean, self.corrupted, strict=True))
        right, wrong = map(_shown, self.answers)
        labels = ", ".join(f"{name} {position}" for name, position in self.labels.items()) or "(none)"
        tags = "".join(f", {name} {tag}" for name, tag in self.tags.items())
        said = (
            f"pair of {len(self)} tokens, {differing} of them different, answer ids {right} (right) and {wrong} (wrong), "
            f"labels {labels}{tags}"
        )
        return visible(said if len(said) <= LONG else f"{said[:LONG]}...")

    @property
    def answers(self) -> tuple[Sequences, Sequences]:
        """The right and the wrong answers, each answer given as a tuple of one or more token ids."""
        if self.correct_sequences:
            return self.correct_sequences, self.wrong_sequences
        return tuple((token,) for token in self.correct), tuple((token,) for token in self.wrong)

    @property
    def first_difference(self) -> int:
        """The first position at which the prompts differ; the number of tokens if they are equal."""
        differing = (p for p, (one, other) in enumerate(zip(self.clean, self.corrupted, strict=True)) if one != other)
        return next(differing, len(self))

    def positions(self, position: Position) -> list[int]:
        """Return the token positions that `"all"`, an index or a label stands for; `"all"` leaves out special tokens.

        Raises:
            FeatpatchError: the pair has no such position or label.

        Example:
            >>> pair = fp.Pair(clean=(5, 6, 7), corrupted=(5, 8, 7), correct=(9,), wrong=(10,), labels={"subject": 1})
            >>> pair.positions("subject"), pair.positions("all")
            ([1], [0, 1, 2])
        """
        if position == "all":
            return [p for p in range(len(self)) if p not in self.special]
        if isinstance(position, str):
            if position not in self.labels:
                raise FeatpatchError(
                    f"a pair has no label {position!r}: expected one of {sorted(self.labels) or '(it has no labels)'}; "
                    "give labels=[{...}, ...] when the pairs are made"
                )
            return list(positions_of(self.labels[position]))
        if not 0 <= position < len(self):
            raise FeatpatchError(
                f"position {position} is outside a prompt of {len(self)} tokens: expected 0 to {len(self) - 1}"
            )
        return [position]

    def _check_answers(self) -> None:
        """Check that answers are tokens or sequences, that at least one is right, and that none is both right and wrong."""
        given = f"correct={self.correct}, wrong={self.wrong}"
        sequences = (*self.correct_sequences, *self.wrong_sequences)
        if sequences:
            given = f"correct_sequences={self.correct_sequences}, wrong_sequences={self.wrong_sequences}"
            if self.correct or self.wrong:
                raise FeatpatchError(
                    f"correct={self.correct}, wrong={self.wrong} beside {given}: expected tokens or sequences, not both; an "
                    "answer of one token among longer ones is a sequence of one"
                )
            if not all(sequences):
                raise FeatpatchError(f"{given}: expected at least one token in each answer")
        if not self.answers[0]:
            raise FeatpatchError(f"{given}: expected at least one correct answer")
        if set(self.answers[0]) & set(self.answers[1]):
            raise FeatpatchError(f"{given}: an answer can't be both right and wrong")


def _shown(answers: Sequences) -> str:
    """Return the token ids of the first three answers as text."""
    more = f" and {len(answers) - 3} more" if len(answers) > 3 else ""
    return ", ".join(" ".join(map(str, ids)) for ids in answers[:3]) + more or "none"


def _check_tokens(name: str, tokens: object) -> None:
    """Check that tokens are a tuple of integers small enough for arrays.

    Raises:
        FeatpatchError: they are not.
    """
    check_kinds(tuple, **{name: tokens})
    for token in tokens if isinstance(tokens, tuple) else ():
        if type(token) is not int or abs(token) > MAX_INTEGER:
            what = type(token).__name__ if type(token) is not int else f"integer of {token.bit_length()} bits"
            raise FeatpatchError(f"{name} holds a {what}: expected token ids, integers such as (464, 3290)")


def plain_integers(value: Any) -> int | tuple[int, ...] | None:
    """Convert an integer of any type, such as NumPy's, or a list or range of integers to `int`; None for anything else."""
    if isinstance(value, list | tuple | range):
        every = [plain_integers(each) for each in value]
        plain = tuple(each for each in every if isinstance(each, int))
        return plain if len(plain) == len(every) else None
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


def positions_of(label: LabelPosition) -> tuple[int, ...]:
    """Return the token positions that a label names, one or those of a span."""
    return label if isinstance(label, tuple) else (label,)
