"""Construction of a pair from its prompts, answers and labels."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, SupportsIndex

import numpy as np
import torch

from featpatch.errors import FeatpatchError
from featpatch.pairs.align import aligned
from featpatch.pairs.pair import Pair, Sequences, plain_integers
from featpatch.pairs.positions import label_positions
from featpatch.pairs.tokens import AnswerTokens, Tokenizer, one_row, prompt_ids, special_positions

Prompt = str | Sequence[int] | torch.Tensor | np.ndarray
"""A text, or its token ids `[pos]` or `[1, pos]`."""
Answer = str | SupportsIndex
"""A text, or the id of a one-token answer."""
Answers = Answer | Sequence[Answer] | torch.Tensor | np.ndarray | None
"""One answer, several answers, or none."""
INSTEAD = ", or give long_answers=True (from_prompts, from_jsonl, from_csv, from_pandas) with metric='sequence_log_prob'"
"""The advice for an answer of several tokens, at the end of an error."""
EMPTY: Mapping[str, Any] = MappingProxyType({})


def make(
    tokenizer: Tokenizer,
    *,
    clean: Prompt,
    corrupted: Prompt,
    correct: Answers,
    wrong: Answers,
    labels: Mapping[str, Any] = EMPTY,
    corrupted_labels: Mapping[str, Any] = EMPTY,
    tags: Mapping[str, str] = EMPTY,
    filler: int | None = None,
    long_answers: bool = False,
    remarks: list[str] | None = None,
) -> Pair:
    """Make a pair; the corrupted prompt has the labels of the clean prompt unless it has its own.

    Args:
        filler: the id of the token that makes up for a difference in length, see `aligned`; None if lengths must be equal.
        long_answers: whether answers are sequences of one token or more, instead of single tokens.
        remarks: a list to which the remarks about answers are added, see `AnswerTokens`.

    Raises:
        FeatpatchError: the lengths are unequal, an answer is not one token (with `long_answers`: has no tokens) or is tokenized
            differently after the corrupted prompt, a label is not found, or it is at different positions in the two prompts.
    """
    ids, other = token_ids(tokenizer, clean), token_ids(tokenizer, corrupted)
    answers = [AnswerTokens(tokenizer, prompt if isinstance(prompt, str) else None) for prompt in (clean, corrupted)]
    if _last_word(clean) == _last_word(corrupted):
        answers = answers[:1]
    here = label_positions(tokenizer, clean if isinstance(clean, str) else ids, labels)
    there = label_positions(tokenizer, corrupted if isinstance(corrupted, str) else other, corrupted_labels)
    if filler is not None and (there or len(ids) != len(other)):
        ids, other, here, there = aligned(ids, other, here, there, filler)
    pair = Pair(
        clean=ids,
        corrupted=other,
        **_answer_fields(answers, correct, wrong, long_answers),
        labels=here,
        special=special_positions(tokenizer, ids, other),
        tags=dict(tags),
    )
    if remarks is not None:
        remarks.extend(dict.fromkeys(answers[0].remarks))
    for label, position in there.items():
        if label not in here:
            raise FeatpatchError(
                f"label {label!r} is only in corrupted_labels: expected it in labels too, which has {sorted(here)}"
            )
        if here[label] != position:
            raise FeatpatchError(
                f"label {label!r} is at position {here[label]} of the clean prompt and at {position} of the corrupted one: "
                "expected the same position, because values are swapped position by position; reword one of the prompts, or "
                "give align='labels'"
            )
    return pair


def _last_word(prompt: Prompt) -> Any:
    """Return the last word of a prompt, the only part that can change how an answer is tokenized; None for token ids."""
    return prompt[len(prompt.rstrip().rpartition(" ")[0]) :] if isinstance(prompt, str) else None


def token_ids(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, ...]:
    """Return the token ids of a prompt that is given as a text or as token ids.

    Raises:
        FeatpatchError: it is neither.
    """
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else one_row(prompt)
    if ids is None:
        raise FeatpatchError(f"a prompt is {str(prompt)[:60]!r}: expected a text, or the token ids [pos] of one prompt")
    return ids


def _answer_fields(after: Sequence[AnswerTokens], correct: Answers, wrong: Answers, long_answers: bool) -> dict[str, Any]:
    """Return the fields of a pair that hold its answers.

    Args:
        after: tokenizers of answers after the clean and after the corrupted prompt; a single one if both prompts end alike.
        correct, wrong: the answers as given.
        long_answers: whether answers are sequences of tokens.

    Raises:
        FeatpatchError: an answer is tokenized differently after the two prompts, or is not valid, see `_ids`.
    """
    sides = []
    for answers in (correct, wrong):
        found = [_ids(each, answers, long_answers) for each in after]
        if found[0] != found[-1]:
            raise FeatpatchError(
                f"answers {answers!r} are the tokens {found[0]} after the clean prompt and {found[1]} after the corrupted "
                "one: expected the same; end both prompts alike, or give the answers as token ids"
            )
        sides.append(found[0])
    if not long_answers:
        right, other = (tuple(token for (token,) in side) for side in sides)
        return {"correct": right, "wrong": other}
    return {"correct": (), "wrong": (), "correct_sequences": sides[0], "wrong_sequences": sides[1]}


def _ids(after: AnswerTokens, answers: Answers, long_answers: bool) -> Sequences:
    """Return the tokens of each answer, given one answer, several or none.

    Raises:
        FeatpatchError: an answer is neither a text nor a token id, or does not have the right number of tokens.
    """
    given: Any = answers.tolist() if isinstance(answers, torch.Tensor | np.ndarray) else answers
    several = [] if given is None else list(given) if isinstance(given, list | tuple | range) else [given]
    found: list[tuple[int, ...]] = []
    for answer in several:
        token = plain_integers(answer)
        if isinstance(token, int):
            found.append((token,))
        elif isinstance(answer, str):
            found.append(after.ids(answer) if long_answers else (after.one(answer, instead=INSTEAD),))
        else:
            raise FeatpatchError(
                f"answer {answer!r} is a {type(answer).__name__}: expected a text, the id of a token, or a list of these"
            )
    return tuple(found)
