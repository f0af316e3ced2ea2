"""From drafts to pairs: kept is what a tokenizer makes one clean contrast of."""

from collections.abc import Callable, Sequence
from random import Random

from featpatch.drafts.draft import Draft
from featpatch.errors import FeatpatchError, check_numbers
from featpatch.pairs import Pair, Pairs
from featpatch.pairs.positions import token_at
from featpatch.pairs.tokens import AnswerTokens, Tokenizer, plain_tokenizer, prompt_ids, special_positions

TRIES = 200
"""Drafts that are made for each pair that is wanted, at most."""


def draw(tokenizer: Tokenizer, make: Callable[[Random], Draft], *, n: int, seed: int) -> Pairs:
    """`n` different pairs, the same for the same seed and tokenizer.

    A draft is dropped where its prompts have different numbers of tokens or a token that the tokenizer does not know, where
    an answer is not exactly one token, or where a label's word is at different positions in the two prompts.

    Raises:
        FeatpatchError: there are too few.
    """
    check_numbers(1, n=n)
    check_numbers(0, seed=seed)
    random = Random(seed)
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], Pair] = {}
    for attempt in (make(random) for _ in range(TRIES * n)):
        pair = pair_of(tokenizer, attempt)
        if pair is not None:
            found.setdefault((pair.clean, pair.corrupted), pair)
        if len(found) == n:
            return Pairs(tuple(found.values()))
    raise FeatpatchError(
        f"only {len(found)} pairs of {n} fit this tokenizer, of {TRIES * n} tried: the others had words of several or unknown "
        "tokens, or prompts of unequal length; ask for fewer, or give templates and words of your own"
    )


def pair_of(tokenizer: Tokenizer, draft: Draft) -> Pair | None:
    """The pair, or None where the tokenizer makes none of it."""
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
    """The words that are one known token in the middle of a sentence.

    Raises:
        FeatpatchError: there are fewer than `least`.
    """
    after = AnswerTokens(tokenizer, "Then")
    kept = [word for word in words if after.next_token(f" {word}") is not None]
    if len(kept) < least:
        raise FeatpatchError(
            f"only {kept} of {list(words)} are one token of this tokenizer: expected at least {least}; give words of your own"
        )
    return kept


def chosen(wanted: str | Sequence[str], known: Sequence[str], what: str) -> list[str]:
    """Names that exist.

    Raises:
        FeatpatchError: one does not.
    """
    names = [wanted] if isinstance(wanted, str) else list(wanted)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise FeatpatchError(f"{what} {unknown or names}: expected some of {', '.join(known)}")
    return names
