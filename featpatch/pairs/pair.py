"""A pair of a clean and a corrupted prompt, with its answers, labels and token positions.

The two prompts have equal lengths, and a position is the same in both, unless a pair has `corrupted_labels`. Then each label
has a place in either prompt, and the prompts are patched label by label.

A prompt without a counterfactual is a pair whose corrupted prompt equals the clean one.

Positions are those that a request such as `"all"`, `"each"` or `["S2", 0]` stands for.
"""

import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from operator import index
from typing import Any, SupportsIndex, cast

from featpatch.errors import MAX_INTEGER, FeatpatchError, FeatpatchWarning, check_kinds, errors_about, is_integer, listed
from featpatch.nodes import Position
from featpatch.pairs.tokens import plain_integers
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
        clean, corrupted: the token ids of both prompts, which have the same length unless there are `corrupted_labels`, and
            are equal if the prompt has no counterfactual.
        correct, wrong: the token ids of the right answers to the clean prompt (one or several) and of the wrong ones, which may
            be left out for metrics that need none, such as `log_prob`. Both are `()` if answers are sequences, or if a prompt
            without a counterfactual has no answers, for a metric of the logits alone.
        labels: names of token positions, e.g. `{"S2": 12}`, or of spans, e.g. `{"subject": (3, 4)}`.
        answer_position: the position at which the metric is read; the last token by default, and always with
            `corrupted_labels`.
        special: the positions of BOS and other special tokens, which are never patched by default.
        tags: a description of how the pair was made, e.g. `{"template": "3", "corruption": "swap_s2"}`.
        correct_sequences, wrong_sequences: the token ids of each right and each wrong answer, e.g. `((5, 9), (7,))`.
        corrupted_labels: the places of the same labels in the corrupted prompt, if they differ from those in the clean prompt,
            e.g. because the lengths differ. Such a pair is patched only at its labels. Empty if the places are the same.

    Examples:
        >>> pair = fp.Pair(clean=(5, 6, 7), corrupted=(5, 8, 7), correct=(9,), wrong=(10,), labels={"subject": 1})
        >>> pair.first_difference
        1
        >>> longer = fp.Pair((5, 6, 7), (5, 8, 8, 7), (9,), (10,), labels={"end": 2}, corrupted_labels={"end": 3})
        >>> longer.by_label
        True
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
    corrupted_labels: Mapping[str, LabelPosition] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted", "correct", "wrong"):
            _check_tokens(name, getattr(self, name))
        for name in ("correct_sequences", "wrong_sequences"):
            check_kinds(tuple, **{name: getattr(self, name)})
            for answer in getattr(self, name):
                _check_tokens(name, answer)
        check_kinds(Mapping, labels=self.labels, tags=self.tags, corrupted_labels=self.corrupted_labels)
        check_kinds(Set, special=self.special)
        if not is_integer(self.answer_position):
            raise FeatpatchError(f"answer_position={self.answer_position!r}: expected an integer, a position of the prompt")
        n = len(self.clean)
        if n == 0:
            raise FeatpatchError("the clean prompt has no tokens: expected at least one")
        if len(self.corrupted) != n and (not self.corrupted_labels or not self.corrupted):
            raise FeatpatchError(
                f"clean has {n} tokens and corrupted has {len(self.corrupted)}: expected equal lengths, because activations "
                "are patched position by position; replace words with words of the same number of tokens, or see align= of "
                "fp.Pairs.from_prompts"
            )
        self._check_answers()
        if not -n <= self.answer_position < n:
            raise FeatpatchError(
                f"answer_position {self.answer_position} is outside a prompt of {n} tokens: expected 0 to {n - 1}"
            )
        object.__setattr__(self, "answer_position", int(self.answer_position) % n)
        if self.correct_sequences and self.answer_position != n - 1:
            raise FeatpatchError(
                f"answer_position is {self.answer_position} and the answers have several tokens: expected the last position, "
                f"{n - 1}, because such answers follow the prompt; cut the prompts off at the answer position"
            )
        for name, tokens in (("labels", self.clean), ("corrupted_labels", self.corrupted)):
            object.__setattr__(self, name, _checked_labels(getattr(self, name), len(tokens)))
        self._check_corrupted_labels()

    def __len__(self) -> int:
        return len(self.clean)

    def __repr__(self) -> str:
        size = f"{len(self)} tokens, of which {len(differing(self))} differ"
        if self.by_label:
            size = f"{len(self)} and {len(self.corrupted)} tokens, patched label by label"
        right, wrong = map(_shown, self.answers)
        labels = ", ".join(map(self._label, self.labels)) or "(none)"
        tags = "".join(f", {name} {tag}" for name, tag in self.tags.items())
        what = f"pair of {size}" if self.has_counterfactual else f"prompt of {len(self)} tokens without a counterfactual"
        said = f"{what}, answer ids {right} (right) and {wrong} (wrong), labels {labels}{tags}"
        return visible(said if len(said) <= LONG else f"{said[:LONG]}...")

    @property
    def answers(self) -> tuple[Sequences, Sequences]:
        """The right and the wrong answers, each answer given as a tuple of one or more token ids."""
        if self.correct_sequences or self.wrong_sequences:
            return self.correct_sequences, self.wrong_sequences
        return tuple((token,) for token in self.correct), tuple((token,) for token in self.wrong)

    @property
    def has_counterfactual(self) -> bool:
        """Whether the corrupted prompt differs from the clean one."""
        return self.clean != self.corrupted

    @property
    def first_difference(self) -> int:
        """The first position at which the prompts differ; the number of tokens if they are equal."""
        return next(iter(differing(self)), min(self.lengths))

    @property
    def by_label(self) -> bool:
        """Whether the places of labels in the two prompts differ, so that the prompts are patched only at labels."""
        return bool(self.corrupted_labels)

    @property
    def lengths(self) -> tuple[int, int]:
        """The number of tokens of the clean and of the corrupted prompt."""
        return len(self.clean), len(self.corrupted)

    def places(self, label: Position) -> list[tuple[int, int]]:
        """Return the positions of a label or an index in the clean prompt, each with its position in the corrupted prompt.

        Raises:
            FeatpatchError: the pair has no such label or position.

        Examples:
            >>> pairs[0].places("S2") == [(position, position) for position in pairs[0].positions("S2")]
            True
        """
        here = self.positions(label)
        there = positions_of(self.corrupted_labels[label]) if isinstance(label, str) and self.by_label else here
        return list(zip(here, there, strict=True))

    def positions(self, position: Position) -> list[int]:
        """Return the token positions that `"all"`, an index or a label stands for in the clean prompt.

        `"all"` leaves out special tokens, and an index below 0 counts from the end: -1 is the last token.

        Raises:
            FeatpatchError: the pair has no such position or label.

        Examples:
            >>> pair = fp.Pair(clean=(5, 6, 7), corrupted=(5, 8, 7), correct=(9,), wrong=(10,), labels={"subject": 1})
            >>> pair.positions("subject"), pair.positions("all"), pair.positions(-1)
            ([1], [0, 1, 2], [2])
        """
        if position == "all":
            return [p for p in range(len(self)) if p not in self.special]
        if isinstance(position, str):
            if position not in self.labels:
                raise FeatpatchError(
                    f"a pair has no label {position!r}: expected one of {sorted(self.labels) or '(it has no labels)'}; give "
                    "labels=[{...}, ...] when you make the pairs, or use a token index, such as -1 for the last token"
                )
            return list(positions_of(self.labels[position]))
        return [token_index(position, len(self))]

    def _label(self, name: str) -> str:
        """Return a label and its place as text, with the places in both prompts if the pair is patched label by label."""
        elsewhere = f" / {self.corrupted_labels[name]}" if self.by_label else ""
        return f"{name} {self.labels[name]}{elsewhere}"

    def _check_corrupted_labels(self) -> None:
        """Check that the labels of the corrupted prompt match those of the clean prompt; forget them if they are the same.

        Raises:
            FeatpatchError: the labels or the lengths of their spans differ, or the answer is not read at the end.
        """
        here, there = self.labels, self.corrupted_labels
        if not there:
            return
        if len(self.clean) == len(self.corrupted) and there == here:
            object.__setattr__(self, "corrupted_labels", {})
            return
        if set(there) != set(here):
            raise FeatpatchError(
                f"the labels are {sorted(here)} in the clean and {sorted(there)} in the corrupted prompt: expected the same "
                "names; give each label in labels and in corrupted_labels"
            )
        for name in here:
            one, other = len(positions_of(here[name])), len(positions_of(there[name]))
            if one != other:
                raise FeatpatchError(
                    f"label {name!r} is at {here[name]} in the clean and at {there[name]} in the corrupted prompt, {one} and "
                    f"{other} tokens: expected spans of equal length, which are patched token by token; label one token of "
                    "each, such as the last"
                )
        if self.answer_position != len(self) - 1:
            raise FeatpatchError(
                f"answer_position is {self.answer_position} in a pair with corrupted_labels: expected the last position, "
                f"{len(self) - 1}, because the metric is read at the end of both prompts; cut the prompts off there"
            )

    def _check_answers(self) -> None:
        """Check that answers are tokens or sequences, that at least one is right, and that none is both right and wrong."""
        given = f"correct={self.correct}, wrong={self.wrong}"
        sequences = (*self.correct_sequences, *self.wrong_sequences)
        if sequences:
            given = f"correct_sequences={self.correct_sequences}, wrong_sequences={self.wrong_sequences}"
            if self.correct or self.wrong:
                raise FeatpatchError(
                    f"correct={self.correct}, wrong={self.wrong} together with {given}: expected tokens or sequences, not "
                    "both; give one-token answers as sequences of one token"
                )
            if not all(sequences):
                raise FeatpatchError(f"{given}: expected at least one token in each answer")
        if self.answers[1] and not self.answers[0]:
            raise FeatpatchError(f"{given}: expected at least one correct answer")
        if set(self.answers[0]) & set(self.answers[1]):
            raise FeatpatchError(f"{given}: expected no answer to be both correct and wrong; remove it from one of the two")


def _checked_labels(labels: Mapping[str, Any], n: int) -> dict[str, LabelPosition]:
    """Return the labels of a prompt of `n` tokens with plain integers as positions, counted from the start.

    Raises:
        FeatpatchError: a label has no valid name or place.
    """
    checked: dict[str, LabelPosition] = {}
    for label, position in labels.items():
        plain = plain_integers(position)
        span = positions_of(position if plain is None else plain)
        if not isinstance(label, str) or label in ("all", "each") or not span or plain is None:
            raise FeatpatchError(
                f"label {label!r} is at {position!r}: expected an integer position or a tuple of them, and a name other "
                "than 'all' and 'each'"
            )
        with errors_about(f"label {label!r}"):
            span = tuple(token_index(each, n) for each in span)
        if span != tuple(range(span[0], span[-1] + 1)):
            raise FeatpatchError(f"label {label!r} is at positions {position}: expected consecutive positions")
        checked[label] = span if isinstance(plain, tuple) else span[0]
    return checked


def _shown(answers: Sequences) -> str:
    """Return the token ids of the first three answers as text."""
    return listed([" ".join(map(str, ids)) for ids in answers], 3) or "none"


def check_answers(pair: Pair, metrics: Sequence[str]) -> None:
    """Raise a FeatpatchError if a pair has no answers, and any metrics, given by name, read them."""
    if metrics and not pair.answers[0]:
        raise FeatpatchError(
            f"a prompt has no answers, and {', '.join(metrics)} reads them: expected correct=..., or a metric that is a "
            "function of the logits alone, such as metric=lambda logits: logits[0, -1, 5]"
        )


def _check_tokens(name: str, tokens: object) -> None:
    """Raise a FeatpatchError unless tokens are a tuple of integers from 0 on that are small enough for arrays."""
    check_kinds(tuple, **{name: tokens})
    for token in tokens if isinstance(tokens, tuple) else ():
        if type(token) is not int or not 0 <= token <= MAX_INTEGER:
            what = f"a {type(token).__name__}" if type(token) is not int else repr(token)[:20]
            raise FeatpatchError(f"{name} holds {what}: expected token ids, integers from 0 on such as (464, 3290)")


def token_index(position: int, length: int) -> int:
    """Return a token index of a prompt, counted from 0; indices below 0 count from the end.

    Raises:
        FeatpatchError: the prompt has no such token.
    """
    if not -length <= position < length:
        raise FeatpatchError(
            f"position {position} is outside a prompt of {length} tokens: expected 0 to {length - 1}, or -1 to {-length} from "
            "the end"
        )
    return position % length


def differing(pair: Pair) -> list[int]:
    """Return the positions at which the tokens of the two prompts differ; what exceeds the shorter prompt does not count."""
    return [p for p, (one, other) in enumerate(zip(pair.clean, pair.corrupted, strict=False)) if one != other]


def positions_of(label: LabelPosition) -> tuple[int, ...]:
    """Return the token positions that a label names, one or those of a span."""
    return label if isinstance(label, tuple) else (label,)


Positions = str | Sequence[Position]
"""`"all"`, `"each"`, or a list of labels and indices; indices below 0 count from the end of each prompt."""


Wanted = Mapping[Position, list[int]]
"""The token positions of one pair that each requested position stands for."""


def spans(pair: Pair, positions: Positions) -> dict[Position, list[int]]:
    """Return the token positions of a pair that each requested label or index stands for.

    Raises:
        FeatpatchError: the pair has no such position, or the request is not valid.
    """
    if positions not in ("all", "each") if isinstance(positions, str) else not isinstance(positions, Sequence):
        several = positions.split(",") if isinstance(positions, str) else [positions]
        advice = f"; write positions={several}" if isinstance(positions, (str, int)) else ""
        raise FeatpatchError(
            f"positions={positions!r}: expected 'all', 'each' or a list of labels and indices such as ['S2', 0]{advice}"
        )
    if positions == "all":
        return {"all": pair.positions("all")}
    wanted: Sequence[Position] = pair.positions("all") if positions == "each" else [_plain(entry) for entry in positions]
    if not wanted:
        raise FeatpatchError("positions is empty: expected 'all', 'each' or a list of labels and indices")
    return {position: pair.positions(position) for position in wanted}


def spans_of(pairs: Sequence[Pair], positions: Positions) -> list[dict[Position, list[int]]]:
    """Return the token positions of each pair that each requested label or index stands for, see `spans`.

    Raises:
        FeatpatchError: a pair has no such position, or the request is not valid.
    """
    several = positions if isinstance(positions, Sequence) and not isinstance(positions, str) else ()
    for label in (entry for entry in several if isinstance(entry, str) and entry != "all"):
        lacking = [number for number, pair in enumerate(pairs) if label not in pair.labels]
        if 0 < len(lacking) < len(pairs):
            raise FeatpatchError(
                f"pair {lacking[0]} has no label {label!r}, like {len(lacking)} of {len(pairs)} pairs: expected it in every "
                "pair; add it, choose another position, or keep the pairs that have it, with "
                f"fp.Pairs(tuple(pair for pair in pairs if {label!r} in pair.labels))"
            )
    return [spans(pair, positions) for pair in pairs]


def lengths_if_pooled(pairs: Sequence[Pair], positions: Positions) -> dict[str, list[int]]:
    """Return the number of tokens of each pair as metadata, with a warning, if `"each"` pools different words of the pairs.

    That is so if the pairs have different lengths, or a label at different indices.
    """
    lengths, labels = [len(pair) for pair in pairs], dict.fromkeys(label for pair in pairs for label in pair.labels)
    places = {label: sorted({str(pair.labels[label]) for pair in pairs if label in pair.labels}) for label in labels}
    moving = next((label for label, at in places.items() if len(at) > 1), None)
    if positions != "each" or not (moving or len(set(lengths)) > 1):
        return {}
    several = (
        f"label {moving!r} is at {' and '.join(places[moving][:2])}, ..." if moving else "their ends are at different ones"
    )
    warnings.warn(
        f"positions='each' pools token indices over pairs of {min(lengths)} to {max(lengths)} tokens, in which the same index "
        f"is not the same word ({several}): the column `pairs` says how many pairs have an index; use labels instead, such as "
        f"positions={list(labels)[:2] or ['S2']}",
        FeatpatchWarning,
        stacklevel=5,
    )
    return {"lengths": lengths}


def _plain(entry: object) -> Position:
    """Return a label unchanged, or an index as a plain int.

    Raises:
        FeatpatchError: the entry is neither.
    """
    try:
        if not isinstance(entry, bool):
            return entry if isinstance(entry, str) else index(cast(SupportsIndex, entry))
    except TypeError:
        pass
    raise FeatpatchError(f"position {entry!r} is a {type(entry).__name__}: expected a label or an index")
