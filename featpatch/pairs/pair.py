"""A pair of a clean and a corrupted prompt, with its answers, labels and token positions.

The two prompts have equal lengths, and a position is the same in both, unless a pair has `corrupted_labels`. Then each label
has a place in either prompt, and the prompts are patched label by label.

A prompt without a counterfactual is a pair whose corrupted prompt equals the clean one.

Positions are those of characters, spans and words in a prompt, and those that a request such as `"all"`, `"each"` or
`["S2", 0]` stands for.
"""

import warnings
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from operator import index
from typing import Any, SupportsIndex, cast

from featpatch.errors import MAX_INTEGER, FeatpatchError, FeatpatchWarning, check_kinds, is_integer
from featpatch.nodes import Position
from featpatch.pairs.tokens import Tokenizer, bare_ids, plain_integers, plain_tokenizer, prompt_ids, special_positions
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
        differing = sum(one != other for one, other in zip(self.clean, self.corrupted, strict=False))
        size = f"{len(self)} tokens, of which {differing} differ"
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
        if self.correct_sequences:
            return self.correct_sequences, self.wrong_sequences
        return tuple((token,) for token in self.correct), tuple((token,) for token in self.wrong)

    @property
    def has_counterfactual(self) -> bool:
        """Whether the corrupted prompt differs from the clean one."""
        return self.clean != self.corrupted

    @property
    def first_difference(self) -> int:
        """The first position at which the prompts differ; the number of tokens if they are equal."""
        differing = (p for p, (one, other) in enumerate(zip(self.clean, self.corrupted, strict=False)) if one != other)
        return next(differing, min(len(self), len(self.corrupted)))

    @property
    def by_label(self) -> bool:
        """Whether the places of labels in the two prompts differ, so that the prompts are patched only at labels."""
        return bool(self.corrupted_labels)

    @property
    def lengths(self) -> tuple[int, int]:
        """The number of tokens of the clean and of the corrupted prompt."""
        return len(self.clean), len(self.corrupted)

    def places(self, label: str) -> list[tuple[int, int]]:
        """Return the positions of a label in the clean prompt, each with its position in the corrupted prompt.

        Raises:
            FeatpatchError: the pair has no such label.

        Examples:
            >>> pairs[0].places("S2") == [(position, position) for position in pairs[0].positions("S2")]
            True
        """
        here = self.positions(label)
        return list(zip(here, positions_of(self.corrupted_labels[label]) if self.by_label else here, strict=True))

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
                    f"labels=[{{...}}, ...] when you make the pairs"
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
        if not self.answers[0] and (self.answers[1] or self.has_counterfactual):
            raise FeatpatchError(f"{given}: expected at least one correct answer")
        if set(self.answers[0]) & set(self.answers[1]):
            raise FeatpatchError(f"{given}: expected no answer to be both correct and wrong; remove it from one of the two")


@dataclass(frozen=True)
class Reading:
    """One position at which logits are read.

    Attributes:
        continuation: tokens that follow the prompt; the logits after the last of them are read.
        correct, wrong: token ids of the answers at that position.
    """

    continuation: tuple[int, ...]
    correct: tuple[int, ...]
    wrong: tuple[int, ...]


def _checked_labels(labels: Mapping[str, Any], n: int) -> dict[str, LabelPosition]:
    """Return the labels of a prompt of `n` tokens with plain integers as positions.

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
        if not 0 <= span[0] <= span[-1] < n:
            raise FeatpatchError(f"label {label!r} is at position {position}: expected 0 to {n - 1}")
        if span != tuple(range(span[0], span[-1] + 1)):
            raise FeatpatchError(f"label {label!r} is at positions {position}: expected consecutive positions")
        checked[label] = plain
    return checked


def _shown(answers: Sequences) -> str:
    """Return the token ids of the first three answers as text."""
    more = f" and {len(answers) - 3} more" if len(answers) > 3 else ""
    return ", ".join(" ".join(map(str, ids)) for ids in answers[:3]) + more or "none"


def check_answers(pair: Pair, metrics: Sequence[str]) -> None:
    """Check that a pair has answers if any metrics, given by name, read them.

    Raises:
        FeatpatchError: it has none.
    """
    if metrics and not pair.answers[0]:
        raise FeatpatchError(
            f"a prompt has no answers, and {', '.join(metrics)} reads them: expected correct=..., or a metric that is a "
            "function of the logits alone, such as metric=lambda logits: logits[0, -1, 5]"
        )


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


def check_by_position(pairs: Sequence[Pair]) -> None:
    """Check that no pair is patched label by label.

    Raises:
        FeatpatchError: one is.
    """
    for number, pair in enumerate(pairs):
        if pair.by_label:
            raise FeatpatchError(
                f"pair {number} is patched label by label ({pair!r}): expected prompts that correspond position by position; "
                "use rank_features, rank_components or ablate with method='exact' and without screen, or make the pairs with "
                "align='labels' and a filler="
            )


def positions_of(label: LabelPosition) -> tuple[int, ...]:
    """Return the token positions that a label names, one or those of a span."""
    return label if isinstance(label, tuple) else (label,)


@dataclass(frozen=True)
class PairText:
    """A pair as text.

    Attributes:
        clean, corrupted: the text of each token; `corrupted` is empty if the prompt has no counterfactual.
        differs: for each token of the clean and of the corrupted prompt, whether it is not in the other prompt.
        titles: for each token of both prompts, a tooltip with its position and labels.
        correct, wrong: the texts of the right and wrong answers.
    """

    clean: Sequence[str]
    corrupted: Sequence[str]
    differs: tuple[Sequence[bool], Sequence[bool]]
    titles: tuple[Sequence[str], Sequence[str]]
    correct: Sequence[str]
    wrong: Sequence[str]

    @classmethod
    def of(cls, pair: Pair, tokenizer: Any) -> "PairText":
        """Decode a pair; token ids stand for its tokens if the tokenizer is None or can't decode."""
        decode = getattr(tokenizer, "decode", None) or (lambda ids: " ".join(map(str, ids)))
        correct, wrong = ([decode(list(answer)) for answer in side] for side in pair.answers)
        return cls(
            clean=[decode([token]) for token in pair.clean],
            corrupted=[decode([token]) for token in pair.corrupted] if pair.has_counterfactual else [],
            differs=_differing(pair),
            titles=(_titles(len(pair.clean), pair.labels), _titles(len(pair.corrupted), pair.corrupted_labels or pair.labels)),
            correct=correct,
            wrong=wrong,
        )


def _differing(pair: Pair) -> tuple[list[bool], list[bool]]:
    """Return for each token of both prompts whether it differs; tokens of unequal prompts are matched in their order."""
    if not pair.by_label:
        differs = [one != other for one, other in zip(pair.clean, pair.corrupted, strict=True)]
        return differs, differs
    here, there = [True] * len(pair.clean), [True] * len(pair.corrupted)
    for block in SequenceMatcher(None, pair.clean, pair.corrupted, autojunk=False).get_matching_blocks():
        here[block.a : block.a + block.size] = there[block.b : block.b + block.size] = [False] * block.size
    return here, there


def _titles(length: int, labels: Mapping[str, LabelPosition]) -> list[str]:
    """Return for each token of a prompt its position and labels as text."""
    names: dict[int, list[str]] = {}
    for label, position in labels.items():
        for p in positions_of(position):
            names.setdefault(p, []).append(label)
    return [", ".join([f"position {position}", *names.get(position, [])]) for position in range(length)]


Label = SupportsIndex | range | str | Sequence[SupportsIndex] | Mapping[str, Any]
"""The place of a label: a token position; a text that occurs once in the prompt, or its characters (start, end), both of which
stand for the last token; or a span, given as a range of token positions or as `{"span": text or characters}`."""


def token_at(tokenizer: Tokenizer, text: str, character: int, *, first: bool = False) -> int:
    """Return the position of the token that holds a character of the text.

    A fast Hugging Face tokenizer gives the offsets of tokens. With any other tokenizer, the text up to the character is
    tokenized, and its tokens are counted.

    Args:
        first: whether to return the first or the last position if several tokens hold the character, such as its bytes.

    Raises:
        FeatpatchError: the character is outside the text, or in no token.
    """
    if not 0 <= character < len(text):
        raise FeatpatchError(f"character {character} is outside {text[:40]!r}: expected 0 to {len(text) - 1}")
    plain, whole = plain_tokenizer(tokenizer), bare_ids(tokenizer, text)
    ids = prompt_ids(tokenizer, text)
    last = len(ids) - len(whole)
    begin = next((start for start in range(len(ids)) if ids[start : start + len(whole)] == whole), last)
    if begin < 0 or ids[begin + 1 : begin + len(whole)] != whole[1:]:  # the first may change with BOS in front
        raise FeatpatchError(
            f"the tokens of {text[:40]!r} change when special tokens are added: expected the same tokens; give labels as "
            "token positions"
        )
    if getattr(plain, "is_fast", False):
        offsets: Any = plain(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
        holding = [position for position, (start, stop) in enumerate(offsets) if start <= character < stop]
        if not holding:
            raise FeatpatchError(f"character {character} of {text[:40]!r} is in no token: expected one inside a word")
        return begin + holding[0 if first else -1]
    until = (text[:character], text[:character].rstrip(" ")) if first else (text[: character + 1],)
    before = next((ids for ids in (bare_ids(tokenizer, part) for part in until) if whole[: len(ids)] == ids), None)
    if before is None:
        raise FeatpatchError(
            f"the tokens of {until[0][-30:]!r} change with the text that follows: expected labels that start and end with a "
            "word"
        )
    return begin + len(before) - (0 if first else 1)


def label_positions(tokenizer: Tokenizer, prompt: str | Sequence[int], labels: Mapping[str, Any]) -> dict[str, LabelPosition]:
    """Return the token position of each label, or its positions if the label is a span.

    A text, or characters [start, end], stands for its last token, and with `{"span": ...}` for all its tokens. Spaces at its
    ends do not count. A range of token positions is a span too.

    Raises:
        FeatpatchError: a label is not a position, text or span, or its text does not occur exactly once in the prompt.
    """
    positions = {}
    for name, label in labels.items():
        try:
            positions[name] = _position(tokenizer, prompt, label)
        except FeatpatchError as error:
            raise FeatpatchError(f"label {name!r}: {error}") from error
    return positions


def after_special(tokenizer: Tokenizer, ids: Sequence[int], labels: Mapping[str, int]) -> dict[str, int]:
    """Convert positions that do not count the special tokens (BOS) at the start of the prompt to positions that do."""
    special = special_positions(tokenizer, ids)
    shift = next((position for position in range(len(ids)) if position not in special), 0)
    return {name: position + shift for name, position in labels.items()}


def _position(tokenizer: Tokenizer, prompt: str | Sequence[int], label: Any) -> LabelPosition:
    """Return the token position of one label, or the positions of a span."""
    plain = plain_integers(label)
    if plain is not None and (isinstance(plain, int) or isinstance(label, range) or not isinstance(prompt, str)):
        return plain
    if isinstance(prompt, str):
        whole = isinstance(label, Mapping) and set(label) == {"span"}
        start, end = _characters(prompt, label["span"] if whole else label)
        if prompt[start:end].strip(" "):  # a space can be part of the next word's token
            end -= len(prompt[start:end]) - len(prompt[start:end].rstrip(" "))
            start += len(prompt[start:end]) - len(prompt[start:end].lstrip(" "))
        last = token_at(tokenizer, prompt, end - 1)
        return tuple(range(token_at(tokenizer, prompt, start, first=True), last + 1)) if whole else last
    raise FeatpatchError(f"{label!r} does not apply to a prompt of token ids: expected a position or a range of positions")


def _characters(prompt: str, label: Any) -> tuple[int, int]:
    """Return where a text starts and ends in the prompt, given the text or its characters [start, end]."""
    if isinstance(label, str) and label:
        start = prompt.find(label)
        if start < 0 or prompt.find(label, start + 1) >= 0:
            found = "is not" if start < 0 else "is more than once"
            raise FeatpatchError(
                f"{label!r} {found} in {prompt[:60]!r}: expected text that occurs exactly once; give more of it, or its "
                "character range [start, end]"
            )
        return start, start + len(label)
    edges = plain_integers(label)
    if isinstance(edges, tuple) and len(edges) == 2:
        start, end = edges
        if not 0 <= start < end <= len(prompt):
            raise FeatpatchError(
                f"the characters {list(label)} are outside {prompt[:60]!r} or empty: expected 0 <= start < end <= {len(prompt)}"
            )
        return start, end
    raise FeatpatchError(
        f"{label!r} is not a valid label: expected a token position, text that occurs once, a character range [start, end], "
        '{"span": text or character range} for all its tokens, or a range of token positions'
    )


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
        raise FeatpatchError(
            f"positions={positions!r}: expected 'all', 'each' or a list of labels and indices such as ['S2', 0]"
        )
    if positions == "all":
        return {"all": pair.positions("all")}
    wanted: Sequence[Position] = pair.positions("all") if positions == "each" else [_plain(entry) for entry in positions]
    if not wanted:
        raise FeatpatchError("positions is empty: expected 'all', 'each' or a list of labels and indices")
    return {position: pair.positions(position) for position in wanted}


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
