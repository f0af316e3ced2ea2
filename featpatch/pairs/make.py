"""One pair out of its prompts, answers and labels."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.align import aligned
from featpatch.pairs.pair import Pair
from featpatch.pairs.positions import label_positions
from featpatch.pairs.tokens import Tokenizer, answer_id, prompt_ids, special_positions

Prompt = str | Sequence[int]
"""A text, or its token ids."""
Answers = str | Sequence[str] | Sequence[int]
"""An answer that is one token, several such answers, or their token ids."""
NOTHING: Mapping[str, Any] = MappingProxyType({})


def make(
    tokenizer: Tokenizer,
    *,
    clean: Prompt,
    corrupted: Prompt,
    correct: Answers,
    wrong: Answers,
    labels: Mapping[str, Any] = NOTHING,
    corrupted_labels: Mapping[str, Any] = NOTHING,
    tags: Mapping[str, str] = NOTHING,
    filler: int | None = None,
) -> Pair:
    """The pair; the corrupted prompt's labels are where the clean one's are if they are not given.

    Args:
        filler: the id of the token that makes up for a difference in length, see `aligned`; None: lengths must be equal.

    Raises:
        FeatpatchError: unequal lengths, an answer that is not one token, a label that is nowhere or at two positions.
    """
    ids, other = token_ids(tokenizer, clean), token_ids(tokenizer, corrupted)
    here = label_positions(tokenizer, clean, labels)
    there = label_positions(tokenizer, corrupted, corrupted_labels)
    if filler is not None and (there or len(ids) != len(other)):
        ids, other, here, there = aligned(ids, other, here, there, filler)
    pair = Pair(
        clean=ids,
        corrupted=other,
        correct=_answer_ids(tokenizer, correct),
        wrong=_answer_ids(tokenizer, wrong),
        labels=here,
        special=special_positions(tokenizer, ids, other),
        tags=dict(tags),
    )
    for label, position in there.items():
        if label not in here:
            raise FeatpatchError(
                f"label {label!r} is in corrupted_labels alone: expected it in labels too; labels has {sorted(here)}"
            )
        if here[label] != position:
            raise FeatpatchError(
                f"label {label!r} is at position {here[label]} of the clean prompt and at {position} of the corrupted one: "
                "expected the same position, because values are swapped position by position; reword one of the prompts, or "
                "give align='labels'"
            )
    return pair


def token_ids(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, ...]:
    """The ids of a prompt that is a text or ids already."""
    return prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt)


def _answer_ids(tokenizer: Tokenizer, answers: Answers) -> tuple[int, ...]:
    several = [answers] if isinstance(answers, str) else answers
    return tuple(answer if isinstance(answer, int) else answer_id(tokenizer, answer) for answer in several)
