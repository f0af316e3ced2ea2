"""Prompts of different lengths, made comparable at their labels; and what differs between two prompts.

With labels that end at positions p_1 <= ... <= p_k in each prompt, the regions are the tokens up to p_1, from there to p_2,
..., and after p_k. Where one region differs in length, the prompt in which it is shorter gets filler tokens directly after the
label in front of it: all labels and both ends then stand at the same positions.
"""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.pair import LabelPosition, Pair, positions_of
from featpatch.pairs.tokens import AnswerTokens, Tokenizer

Ids = tuple[int, ...]


def filler_id(tokenizer: Tokenizer, align: str | None, filler: str | None) -> int | None:
    """The id of the filler where alignment is asked for.

    Raises:
        FeatpatchError: one of the two without the other, another alignment than "labels", a filler that is not one token.
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
    """Both prompts and their labels, with filler where one region between labels is shorter in one of them.

    Raises:
        FeatpatchError: the labels are not the same in the same order, or it is not clear where filler would go.
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
    """Both prompts as text, with what lies between the first and the last token that differ in brackets.

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
    """How many tokens lie up to the end of the first label, from each end to the next, and after the last."""
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
