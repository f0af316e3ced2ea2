"""Alignment of prompts of different lengths by their labels, and a view of the tokens that differ between two prompts.

If the labels end at positions p_1 <= ... <= p_k in each prompt, they divide it into regions: the tokens up to p_1, from there
to p_2, ..., and after p_k. If one region differs in length, filler tokens are added to the prompt in which it is shorter,
directly after the label that precedes the region. All labels and the ends of both prompts are then at the same positions.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.pair import LabelPosition, Pair, positions_of
from featpatch.pairs.tokens import AnswerTokens, Tokenizer

Ids = tuple[int, ...]


def filler_id(tokenizer: Tokenizer, align: str | None, filler: str | None) -> int | None:
    """Return the token id of the filler, or None if prompts are not to be aligned.

    Raises:
        FeatpatchError: only one of `align` and `filler` is given, `align` is not "labels", or the filler is not one token.
    """
    if align not in (None, "labels"):
        raise FeatpatchError(f"align={align!r}: expected 'labels', or None to refuse prompts of unequal length")
    if (align is None) != (filler is None):
        raise FeatpatchError(
            f"align={align!r}, filler={filler!r}: expected both or neither; the filler is a word of one token, e.g. ' the'"
        )
    if filler is None:
        return None
    try:
        return AnswerTokens(tokenizer, None).one(filler)
    except FeatpatchError as error:
        raise FeatpatchError(f"filler={filler!r} does not serve: {error}") from error


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
            f"{len(corrupted)} tokens: expected the same names in the same order, to align by; give labels and corrupted_labels"
        )
    sizes, sizes_there = _sizes(clean, here), _sizes(corrupted, there)
    differing = [region for region, (one, other) in enumerate(zip(sizes, sizes_there, strict=True)) if one != other]
    if not differing:
        return clean, corrupted, dict(here), dict(there)
    region = differing[0]
    if len(differing) > 1:
        raise FeatpatchError(
            f"the prompts differ in length in {len(differing)} regions, before or after {order}: regions have {sizes} and "
            f"{sizes_there} tokens; expected one such region; reword one of the prompts"
        )
    if region == 0:
        raise FeatpatchError(
            f"the prompts differ in length before the first label, {order[0]!r} at {here[order[0]]} and {there[order[0]]}: "
            "expected a label in front of the words that differ; label one"
        )
    if 0 in (sizes[region], sizes_there[region]):
        raise FeatpatchError(
            f"after label {order[region - 1]!r} there are {sizes[region]} and {sizes_there[region]} tokens: expected at "
            "least one in both, because a label or the answer would be read at a filler; reword one of the prompts"
        )
    count, after = sizes_there[region] - sizes[region], order[region - 1]
    if count > 0:
        clean, here = _filled(clean, here, _end(here[after]) + 1, (filler,) * count)
    else:
        corrupted, there = _filled(corrupted, there, _end(there[after]) + 1, (filler,) * -count)
    return clean, corrupted, dict(here), dict(there)


def changed_span(pair: Pair, tokenizer: Tokenizer) -> str:
    """Return both prompts as text, with brackets around the span from the first to the last token that differs.

    Raises:
        FeatpatchError: the tokenizer can't turn ids into text.
    """
    decode = getattr(tokenizer, "decode", None)
    if decode is None:
        raise FeatpatchError(
            f"the tokenizer {tokenizer!r} has no decode: expected one that turns ids into text, e.g. Hugging Face's"
        )
    differing = [p for p, (one, other) in enumerate(zip(pair.clean, pair.corrupted, strict=True)) if one != other]
    if not differing:
        return f"no token differs\nboth      {decode(list(pair.clean))}"
    start, stop = differing[0], differing[-1] + 1
    title = f"positions {start} to {stop - 1} of {len(pair)} tokens"
    clean, corrupted = (_bracketed(decode, ids, start, stop) for ids in (pair.clean, pair.corrupted))
    return f"{title}\nclean     {clean}\ncorrupted {corrupted}"


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


def _bracketed(decode: Any, ids: Ids, start: int, stop: int) -> str:
    text = decode(list(ids))
    begin, end = (len(decode(list(ids[:n]))) for n in (start, stop))
    begin += len(text[begin:end]) - len(text[begin:end].lstrip())
    return f"{text[:begin]}[{text[begin:end]}]{text[end:]}"
