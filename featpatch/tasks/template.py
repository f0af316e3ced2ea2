"""Pairs of a built-in task: as words, filled into a template, and as tokens, if a tokenizer makes valid pairs of them."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from featpatch.errors import FeatpatchError, check_kinds, check_numbers
from featpatch.pairs.labels import token_at
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import AnswerTokens, Tokenizer, plain_tokenizer, prompt_ids, special_positions

SLOT = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Draft:
    """A clean and a corrupted prompt as text, with the words that may follow.

    Attributes:
        clean, corrupted: the texts of both prompts.
        correct, wrong: right and wrong words after the clean prompt, preceded by a space unless `glued`.
        ends: for each label, the character index at which its word ends in the clean and in the corrupted prompt.
        tags: a description of how the pair was made: task, template, corruption.
        glued: whether the answer follows without a space, as the rest of a year does.
    """

    clean: str
    corrupted: str
    correct: Sequence[str]
    wrong: Sequence[str]
    ends: Mapping[str, tuple[int, int]]
    tags: Mapping[str, str]
    glued: bool = False


def draft(
    template: str,
    clean: Mapping[str, str],
    corrupted: Mapping[str, str],
    *,
    correct: Sequence[str],
    wrong: Sequence[str],
    labels: Sequence[str],
    tags: Mapping[str, str],
    glued: bool = False,
) -> Draft:
    """Fill a template such as `"When {IO} and {S1} left, {S2} waved at"` with the words of both prompts.

    Args:
        template: a text with slots in braces.
        clean, corrupted: the word for each slot of the two prompts.
        correct, wrong, tags, glued: as in `Draft`.
        labels: the slots that become labels of the pair.
    """
    (one, here), (other, there) = fill(template, clean), fill(template, corrupted)
    ends = {label: (here[label], there[label]) for label in labels}
    return Draft(one, other, correct, wrong, ends, tags, glued)


def fill(template: str, words: Mapping[str, str]) -> tuple[str, dict[str, int]]:
    """Return the filled template, and the character index at which each slot ends in it."""
    text, ends, last = "", {}, 0
    for slot in SLOT.finditer(template):
        text += template[last : slot.start()] + words[slot[1]]
        ends[slot[1]], last = len(text), slot.end()
    return text + template[last:], ends


TRIES = 200
"""The largest number of drafts that are made per requested pair."""

REPEATS = 20
"""The number of repeated drafts in a row, per different draft, after which all drafts have been seen (but for 1 in 10^8)."""


def check_templates(templates: Any, slots: Sequence[str], labels: Sequence[str]) -> None:
    """Raise a FeatpatchError unless templates are texts that hold each of the labels as a slot once, and no unknown slot.

    Args:
        slots: the slots of the task.
        labels: those of them that become labels of the pair.
    """
    if isinstance(templates, str) or not isinstance(templates, Sequence) or not templates:
        raise FeatpatchError(f"templates={templates!r:.60}: expected a list of at least one text")
    for template in templates:
        found = SLOT.findall(template) if isinstance(template, str) else []
        wrong = [f"has {{{name}}} {found.count(name)} times" for name in labels if found.count(name) != 1]
        wrong += [f"has {{{name}}}" for name in found if name not in slots]
        if wrong:
            needed, known = (", ".join(f"{{{name}}}" for name in names) for names in (labels, slots))
            raise FeatpatchError(
                f"template {template!r:.80} {wrong[0]}: expected a text with {needed}, each once, and no slots but {known}"
            )


def draw(tokenizer: Tokenizer, make: Callable[[Random], Draft], *, n: int, seed: int) -> Pairs:
    """Draw `n` different pairs, the same for the same seed and tokenizer.

    A draft is dropped if its prompts have different numbers of tokens or a token that the tokenizer does not know, if an
    answer is not exactly one token, or if a label's word is at different positions in the two prompts.

    Args:
        tokenizer: the model or its tokenizer.
        make: a function that makes one random draft.
        n: the number of pairs.
        seed: the seed of the random numbers.

    Raises:
        FeatpatchError: fewer than `n` pairs were found.
    """
    check_numbers(1, n=n)
    check_numbers(0, seed=seed)
    random = Random(int(seed))
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Pair] = {}
    seen, repeated = set[tuple[str, str]](), 0
    for attempt in (make(random) for _ in range(TRIES * n)):
        repeated = repeated + 1 if (attempt.clean, attempt.corrupted) in seen else 0
        if repeated > REPEATS * len(seen):
            break
        if repeated:
            continue
        seen.add((attempt.clean, attempt.corrupted))
        pair = pair_of(tokenizer, attempt)
        if pair is not None:
            found.setdefault((pair.clean, pair.corrupted), pair)
        if len(found) == n:
            return Pairs(tuple(found.values()), plain_tokenizer(tokenizer))
    if not found:
        raise FeatpatchError(
            f"none of the {len(seen)} pairs that were tried fits this tokenizer: expected words that are one known token each, "
            "in prompts of equal length; give templates of your own"
        )
    tried = f"of the {len(seen)} different ones there are" if repeated else f"after {TRIES * n} attempts"
    raise FeatpatchError(
        f"only {len(found)} of {n} pairs fit this tokenizer, {tried}: expected n={len(found)} at most with these templates and "
        "words, which must be one known token each in prompts of equal length; ask for fewer pairs, or give templates of "
        "your own"
    )


def pair_of(tokenizer: Tokenizer, draft: Draft) -> Pair | None:
    """Convert a draft to a pair, or return None if the tokenizer does not make a valid pair of it."""
    clean, corrupted = prompt_ids(tokenizer, draft.clean), prompt_ids(tokenizer, draft.corrupted)
    unknown = getattr(plain_tokenizer(tokenizer), "unk_token_id", None)
    if len(clean) != len(corrupted) or clean == corrupted or unknown in clean or unknown in corrupted:
        return None
    glue = "" if draft.glued else " "
    after = AnswerTokens(tokenizer, draft.clean)
    answers = [[after.next_token(glue + word) for word in words] for words in (draft.correct, draft.wrong)]
    correct, wrong = ([token for token in tokens if token is not None] for tokens in answers)
    if not correct or not wrong or set(correct) & set(wrong) or (not draft.glued and None in answers[0] + answers[1]):
        return None
    labels = {}
    for label, (here, there) in draft.ends.items():
        position = token_at(tokenizer, draft.clean, here - 1)
        if position != token_at(tokenizer, draft.corrupted, there - 1):
            return None
        labels[label] = position
    return Pair(
        clean=clean,
        corrupted=corrupted,
        correct=tuple(correct),
        wrong=tuple(wrong),
        labels={**labels, "end": len(clean) - 1},
        special=special_positions(tokenizer, clean, corrupted),
        tags=dict(draft.tags),
    )


def usable(tokenizer: Tokenizer, words: Sequence[str], least: int) -> list[str]:
    """Return the words that are one known token in the middle of a sentence.

    Raises:
        FeatpatchError: there are fewer than `least`, or they are no list.
    """
    if isinstance(words, str) or not isinstance(words, Sequence) or not all(isinstance(word, str) for word in words):
        raise FeatpatchError(f"words {words!r:.60}: expected a list of texts")
    after = AnswerTokens(tokenizer, "Then")
    kept = [word for word in words if after.next_token(f" {word}") is not None]
    if len(kept) < least:
        count = f"only {', '.join(map(repr, kept))} of the words" if kept else "none of the words"
        raise FeatpatchError(
            f"{count} {', '.join(map(repr, words))} {'are' if len(kept) > 1 else 'is'} one token of this tokenizer: expected "
            f"at least {least}; give words of your own"
        )
    return kept


def chosen(wanted: str | Sequence[str], known: Sequence[str]) -> list[str]:
    """Return the requested corruptions, one or several, as a list after checking that they are known.

    Raises:
        FeatpatchError: a corruption is unknown or of the wrong type, or none is given.
    """
    check_kinds((str, Sequence), corruptions=wanted)
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise FeatpatchError(f"corruption {', '.join(map(str, unknown)) or names}: expected some of {', '.join(known)}")
    return names
