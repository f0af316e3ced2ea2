"""One pair out of its prompts, answers and labels."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.align import aligned
from featpatch.pairs.pair import Pair, Sequences
from featpatch.pairs.positions import label_positions
from featpatch.pairs.tokens import Tokenizer, answer_id, answer_ids, prompt_ids, special_positions

Prompt = str | Sequence[int]
"""A text, or its token ids."""
Answers = str | Sequence[str] | Sequence[int]
"""An answer, several, or the ids of one-token answers."""
INSTEAD = ", or give long_answers=True (from_prompts, from_jsonl, from_csv, from_pandas) with metric='sequence_log_prob'"
"""What else to do about an answer of several tokens."""
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
    long_answers: bool = False,
) -> Pair:
    """The pair; the corrupted prompt's labels are where the clean one's are if they are not given.

    Args:
        filler: the id of the token that makes up for a difference in length, see `aligned`; None: lengths must be equal.
        long_answers: makes a sequence of every answer, of one token or more; else each is one token.

    Raises:
        FeatpatchError: unequal lengths, an answer that is not one token (with `long_answers`: not one or more), a label that
            is nowhere or at two positions.
    """
    ids, other = token_ids(tokenizer, clean), token_ids(tokenizer, corrupted)
    here = label_positions(tokenizer, clean, labels)
    there = label_positions(tokenizer, corrupted, corrupted_labels)
    if filler is not None and (there or len(ids) != len(other)):
        ids, other, here, there = aligned(ids, other, here, there, filler)
    pair = Pair(
        clean=ids,
        corrupted=other,
        **_answers(tokenizer, correct, wrong, long_answers),
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


def _answers(tokenizer: Tokenizer, correct: Answers, wrong: Answers, long_answers: bool) -> dict[str, Any]:
    """The fields of a pair that hold its answers."""
    if not long_answers:
        return {"correct": _tokens(tokenizer, correct), "wrong": _tokens(tokenizer, wrong)}
    sequences = {"correct_sequences": _sequences(tokenizer, correct), "wrong_sequences": _sequences(tokenizer, wrong)}
    return {"correct": (), "wrong": (), **sequences}


def _tokens(tokenizer: Tokenizer, answers: Answers) -> tuple[int, ...]:
    several = [answers] if isinstance(answers, str) else answers
    return tuple(answer if isinstance(answer, int) else answer_id(tokenizer, answer, instead=INSTEAD) for answer in several)


def _sequences(tokenizer: Tokenizer, answers: Answers) -> Sequences:
    several = [answers] if isinstance(answers, str) else answers
    return tuple((answer,) if isinstance(answer, int) else answer_ids(tokenizer, answer) for answer in several)
