"""A pair made from its prompts, answers and labels."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.align import aligned
from featpatch.pairs.pair import Pair, Sequences
from featpatch.pairs.positions import label_positions
from featpatch.pairs.tokens import AnswerTokens, Tokenizer, prompt_ids, special_positions

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
    remarks: list[str] | None = None,
) -> Pair:
    """Make a pair; labels of the corrupted prompt are those of the clean one where they are not given.

    Args:
        filler: the id of the token that makes up for a difference in length, see `aligned`; None: lengths must be equal.
        long_answers: makes a sequence of every answer, of one token or more; else each is one token.
        remarks: a list to which the remarks about answers are added, see `AnswerTokens`.

    Raises:
        FeatpatchError: the lengths are unequal, an answer is not one token (with `long_answers`: has no tokens) or is tokenized
            differently after the corrupted prompt, or a label is nowhere or at two positions.
    """
    ids, other = token_ids(tokenizer, clean), token_ids(tokenizer, corrupted)
    answers = [AnswerTokens(tokenizer, prompt if isinstance(prompt, str) else None) for prompt in (clean, corrupted)]
    if _last_word(clean) == _last_word(corrupted):
        answers = answers[:1]
    here = label_positions(tokenizer, clean, labels)
    there = label_positions(tokenizer, corrupted, corrupted_labels)
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
                f"label {label!r} is in corrupted_labels alone: expected it in labels too; labels has {sorted(here)}"
            )
        if here[label] != position:
            raise FeatpatchError(
                f"label {label!r} is at position {here[label]} of the clean prompt and at {position} of the corrupted one: "
                "expected the same position, because values are swapped position by position; reword one of the prompts, or "
                "give align='labels'"
            )
    return pair


def _last_word(prompt: Prompt) -> Any:
    """The end of a prompt, the only part that can change how an answer is tokenized."""
    return prompt[len(prompt.rstrip().rpartition(" ")[0]) :] if isinstance(prompt, str) else None


def token_ids(tokenizer: Tokenizer, prompt: Prompt) -> tuple[int, ...]:
    """Return the token ids of a prompt, which is a text or ids already."""
    return prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt)


def _answer_fields(after: Sequence[AnswerTokens], correct: Answers, wrong: Answers, long_answers: bool) -> dict[str, Any]:
    """The fields of a pair that hold its answers.

    Args:
        after: tokenizes answers after the clean and after the corrupted prompt; one entry if the prompts end alike.
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
    several = [answers] if isinstance(answers, str) else answers
    return tuple(
        (answer,) if isinstance(answer, int) else after.ids(answer) if long_answers else (after.one(answer, instead=INSTEAD),)
        for answer in several
    )
