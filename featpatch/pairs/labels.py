"""Labels as a user gives them, as token positions, texts, characters or spans, and the token positions that they stand for."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

from featpatch.errors import FeatpatchError, errors_about
from featpatch.pairs.pair import LabelPosition
from featpatch.pairs.tokens import Tokenizer, bare_ids, plain_integers, plain_tokenizer, prompt_ids, special_positions

Label = SupportsIndex | range | str | Sequence[SupportsIndex] | Mapping[str, Any]
"""The place of a label: a token position; whole words that occur once in the prompt, or characters (start, end), both of which
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
        with errors_about(f"label {name!r}"):
            positions[name] = _position(tokenizer, prompt, label)
    return positions


def after_special(tokenizer: Tokenizer, ids: Sequence[int], labels: Mapping[str, int]) -> dict[str, int]:
    """Convert positions that do not count the special tokens (BOS) at the start of the prompt to positions that do."""
    special = special_positions(tokenizer, ids)
    shift = next((position for position in range(len(ids)) if position not in special), 0)
    return {name: position + shift if position >= 0 else position for name, position in labels.items()}


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
        begins, ends = (re.match("[A-Za-z]", edge) is not None for edge in (label[0], label[-1]))
        word = f"{'(?<![A-Za-z])' * begins}{re.escape(label)}{'(?![A-Za-z])' * ends}"
        starts = [found.start() for found in re.finditer(f"(?={word})", prompt)]
        if len(starts) != 1:
            found = "is more than once" if starts else "is only part of a word" if label in prompt else "is not"
            raise FeatpatchError(
                f"{label!r} {found} in {prompt[:60]!r}: expected text that occurs exactly once; give more of it, or its "
                "character range [start, end]"
            )
        return starts[0], starts[0] + len(label)
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
