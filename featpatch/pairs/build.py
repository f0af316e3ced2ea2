"""Construction of a pair from its prompts, answers and labels, and alignment of prompts of different lengths.

With `align="labels"`, each label may have another place in the corrupted prompt, and the pair is patched label by label. With
a filler, the prompts themselves are changed instead, so that they can be patched position by position. If the labels end at
positions p_1 <= ... <= p_k in each prompt, they divide it into regions: the tokens up to p_1, from there to p_2, ..., and
after p_k. If one region differs in length, filler tokens are added to the prompt in which it is shorter, directly after the
label that precedes the region. All labels and the ends of both prompts are then at the same positions.
"""

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, SupportsIndex

import numpy as np
import torch

from featpatch.errors import FeatpatchError, check_kinds, errors_about
from featpatch.pairs.labels import label_positions
from featpatch.pairs.pair import LabelPosition, Pair, Sequences, positions_of
from featpatch.pairs.tokens import (
    AnswerTokens,
    Ids,
    PairsWarning,
    Tokenizer,
    one_row,
    plain_integers,
    plain_tokenizer,
    prompt_ids,
    special_positions,
)

Prompt = str | Sequence[int] | torch.Tensor | np.ndarray
"""A text, or its token ids `[pos]` or `[1, pos]`."""
Answer = str | SupportsIndex
"""A text, or the id of a one-token answer."""
Answers = Answer | Sequence[Answer] | torch.Tensor | np.ndarray | None
"""One answer, several answers, or none."""
INSTEAD = ", or pass long_answers=True (from_prompts, from_jsonl, from_csv, from_pandas) and metric='sequence_log_prob_diff'"
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
    by_label: bool = False,
    filler: int | None = None,
    long_answers: bool = False,
    remarks: list[str] | None = None,
) -> Pair:
    """Make a pair; the corrupted prompt has the labels of the clean prompt unless it has its own.

    Args:
        by_label: whether labels may be at different places in the two prompts, which may then differ in length.
        filler: the id of the token that makes up for a difference in length, see `aligned`; None to leave prompts unchanged.
        long_answers: whether answers are sequences of one token or more, instead of single tokens.
        remarks: a list to which remarks are added: about answers, see `AnswerTokens`, and about prompts with fillers.

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
    sizes = len(ids), len(other)
    if filler is not None and (there or sizes[0] != sizes[1]):
        ids, other, here, there = aligned(ids, other, here, there, filler)
    elif by_label and sizes[0] != sizes[1] and not there:
        raise FeatpatchError(
            f"clean has {len(ids)} tokens, corrupted has {len(other)}, and align='labels' without corrupted_labels: expected "
            f"the places of the labels {sorted(here) or '(there are none)'} in the corrupted prompt too; give labels and "
            "corrupted_labels"
        )
    pair = Pair(
        clean=ids,
        corrupted=other,
        **_answer_fields(answers, correct, wrong, long_answers),
        labels=here,
        special=special_positions(tokenizer, ids, other),
        tags=dict(tags),
        corrupted_labels=there if by_label and filler is None else {},
    )
    if remarks is not None:
        remarks.extend(dict.fromkeys(answers[0].remarks))
        if (len(ids), len(other)) != sizes:
            text = getattr(plain_tokenizer(tokenizer), "decode", str)(list(ids if len(ids) > sizes[0] else other))
            remarks.append(f"fillers change a prompt of unequal length, so that it is now {text!r}; without filler= it is kept")
    if pair.by_label:
        return pair
    for label, position in there.items():
        if label not in here:
            raise FeatpatchError(
                f"label {label!r} is only in corrupted_labels: expected it in labels too, which has {sorted(here)}"
            )
        if here[label] != position:
            raise FeatpatchError(
                f"label {label!r} is at position {here[label]} of the clean prompt and at {position} of the corrupted one: "
                "expected the same position, because activations are patched position by position; reword one of the "
                "prompts, or pass align='labels' to patch label by label"
            )
    return pair


def warn_of_equal_prompts(pairs: Sequence[Pair]) -> None:
    """Warn of pairs whose prompts are equal, for functions to which corrupted prompts are given."""
    equal = [number for number, pair in enumerate(pairs) if not pair.has_counterfactual]
    if equal:
        warnings.warn(
            f"pair {equal[0]}: the clean and the corrupted prompt are the same, which holds for {len(equal)} of {len(pairs)} "
            "pairs: expected prompts that differ, because equal ones leave nothing to patch; correct them, or leave corrupted= "
            "out for prompts without a counterfactual",
            PairsWarning,
            stacklevel=3,
        )


def _last_word(prompt: Prompt) -> Any:
    """Return the last word of a prompt, the only part that can change how an answer is tokenized; None for token ids."""
    return prompt[len(prompt.rstrip().rpartition(" ")[0]) :] if isinstance(prompt, str) else None


def token_ids(tokenizer: Tokenizer, prompt: Prompt) -> Ids:
    """Return the token ids of a prompt that is given as a text or as token ids.

    Raises:
        FeatpatchError: it is neither.
    """
    ids = prompt_ids(tokenizer, prompt) if isinstance(prompt, str) else one_row(prompt)
    if ids is None:
        raise FeatpatchError(f"a prompt is {str(prompt)[:60]!r}: expected a string, or the token ids [pos] of one prompt")
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
                "prompt: expected the same tokens; end both prompts in the same way, or give the answers as token ids"
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
                f"answer {answer!r} is a {type(answer).__name__}: expected a string, a token id, or a list of these"
            )
    return tuple(found)


def filler_id(tokenizer: Tokenizer, align: str | None, filler: str | None) -> int | None:
    """Return the token id of the filler, or None if there is none.

    Raises:
        FeatpatchError: there is a filler without `align`, `align` is not "labels", or the filler is not one token.
    """
    if align not in (None, "labels"):
        raise FeatpatchError(f"align={align!r}: expected 'labels', or None to refuse prompts of unequal length")
    if align is None and filler is not None:
        raise FeatpatchError(
            f"align={align!r}, filler={filler!r}: expected align='labels' with a filler, which is a word of one token that is "
            "added to the shorter prompt"
        )
    if filler is None:
        return None
    check_kinds(str, filler=filler)
    with errors_about(f"filler={filler!r} can't be used"):
        return AnswerTokens(tokenizer, None).one(filler)


def aligned(
    clean: Ids, corrupted: Ids, here: Mapping[str, LabelPosition], there: Mapping[str, LabelPosition], filler: int
) -> tuple[Ids, Ids, dict[str, LabelPosition], dict[str, LabelPosition]]:
    """Return both prompts and their labels after adding filler tokens to the region that is shorter in one of the prompts.

    Args:
        clean, corrupted: the token ids of both prompts.
        here, there: the labels of the clean and of the corrupted prompt.
        filler: the token id of the filler.

    Raises:
        FeatpatchError: the labels are not the same in the same order, or it is not clear where filler tokens belong.
    """
    order, order_there = (sorted(labels, key=lambda name: (_end(labels[name]), name)) for labels in (here, there))
    if order != order_there or not order:
        raise FeatpatchError(
            f"the labels are {order} in the clean and {order_there} in the corrupted prompt, of {len(clean)} and "
            f"{len(corrupted)} tokens: expected the same names in the same order, so that the prompts can be aligned; give "
            "labels and corrupted_labels"
        )
    sizes, sizes_there = _sizes(clean, here), _sizes(corrupted, there)
    differing = [region for region, (one, other) in enumerate(zip(sizes, sizes_there, strict=True)) if one != other]
    if not differing:
        return clean, corrupted, dict(here), dict(there)
    region = differing[0]
    if len(differing) > 1:
        raise FeatpatchError(
            f"the prompts differ in length in {len(differing)} of the regions between the labels {order}, which have {sizes} "
            f"and {sizes_there} tokens: expected a difference in one region only; reword one of the prompts"
        )
    if region == 0:
        raise FeatpatchError(
            f"the prompts differ in length before the first label, {order[0]!r} at {here[order[0]]} and {there[order[0]]}: "
            "expected a label in front of the words that differ; add one"
        )
    if 0 in (sizes[region], sizes_there[region]):
        raise FeatpatchError(
            f"after label {order[region - 1]!r} there are {sizes[region]} and {sizes_there[region]} tokens: expected at least "
            "one in both, because otherwise a label or the answer would fall on a filler; reword one of the prompts"
        )
    count, after = sizes_there[region] - sizes[region], order[region - 1]
    if count > 0:
        clean, here = _filled(clean, here, _end(here[after]) + 1, (filler,) * count)
    else:
        corrupted, there = _filled(corrupted, there, _end(there[after]) + 1, (filler,) * -count)
    return clean, corrupted, dict(here), dict(there)


def _end(label: LabelPosition) -> int:
    return positions_of(label)[-1]


def _sizes(ids: Ids, labels: Mapping[str, LabelPosition]) -> list[int]:
    """Return the number of tokens in each region: up to the end of the first label, between ends, and after the last one."""
    ends = [-1, *sorted(map(_end, labels.values())), len(ids) - 1]
    return [end - begin for begin, end in pairwise(ends)]


def _filled(ids: Ids, labels: Mapping[str, LabelPosition], at: int, filling: Ids) -> tuple[Ids, dict[str, LabelPosition]]:
    def moved(position: int) -> int:
        return position + len(filling) * (position >= at)

    here = {name: moved(label) if isinstance(label, int) else tuple(map(moved, label)) for name, label in labels.items()}
    return ids[:at] + filling + ids[at:], here
