"""Where in a prompt's tokens a character, a span of characters or a word is."""

from collections.abc import Mapping, Sequence
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.tokens import Tokenizer, prompt_ids, special_positions

Label = int | str | Sequence[int]
"""Where a label is: a token position, a text that occurs once in the prompt, or the characters (start, end) of a span."""


def token_at(tokenizer: Tokenizer, text: str, character: int) -> int:
    """The position of the token that holds a character of the text.

    By the offsets that a fast Hugging Face tokenizer gives; with any other, by the number of tokens of the text up to there.

    Raises:
        FeatpatchError: the character is outside the text, or in no token.
    """
    if not 0 <= character < len(text):
        raise FeatpatchError(f"character {character} is outside {text[:40]!r}: expected 0 to {len(text) - 1}")
    if getattr(tokenizer, "is_fast", False):
        offsets: Any = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
        holding = [position for position, (start, stop) in enumerate(offsets) if start <= character < stop]
        if not holding:
            raise FeatpatchError(f"character {character} of {text[:40]!r} is in no token: expected one inside a word")
        return holding[-1]
    before, whole = prompt_ids(tokenizer, text[: character + 1]), prompt_ids(tokenizer, text)
    if whole[: len(before)] != before:
        raise FeatpatchError(
            f"the tokens of {text[: character + 1][-30:]!r} change with what follows: expected a position at the end of a word"
        )
    return len(before) - 1


def label_positions(tokenizer: Tokenizer, prompt: str | Sequence[int], labels: Mapping[str, Any]) -> dict[str, int]:
    """The token position of each label: of a text or a span, that of its last character.

    Raises:
        FeatpatchError: a label is no position, text or span, is not in the prompt, or is there several times.
    """
    positions = {}
    for name, label in labels.items():
        try:
            positions[name] = _position(tokenizer, prompt, label)
        except FeatpatchError as error:
            raise FeatpatchError(f"label {name!r}: {error}") from error
    return positions


def after_special(tokenizer: Tokenizer, ids: Sequence[int], labels: Mapping[str, int]) -> dict[str, int]:
    """Positions that were counted without the special tokens (BOS) that the prompt begins with, counted with them."""
    special = special_positions(tokenizer, ids)
    shift = next((position for position in range(len(ids)) if position not in special), 0)
    return {name: position + shift for name, position in labels.items()}


def _position(tokenizer: Tokenizer, prompt: str | Sequence[int], label: Any) -> int:
    if isinstance(label, int) and not isinstance(label, bool):
        return label
    if isinstance(prompt, str) and isinstance(label, str) and label:
        start = prompt.find(label)
        if start < 0 or prompt.find(label, start + 1) >= 0:
            found = "is not" if start < 0 else "is more than once"
            raise FeatpatchError(
                f"{label!r} {found} in {prompt[:60]!r}: expected a text that occurs once; give more of it, or its characters "
                "[start, end]"
            )
        return token_at(tokenizer, prompt, start + len(label) - 1)
    if isinstance(prompt, str) and isinstance(label, list | tuple) and [type(edge) for edge in label] == [int, int]:
        start, end = label
        if not 0 <= start < end <= len(prompt):
            raise FeatpatchError(
                f"the characters {list(label)} are outside {prompt[:60]!r} or none: expected 0 <= start < end <= {len(prompt)}"
            )
        return token_at(tokenizer, prompt, end - 1)
    raise FeatpatchError(
        f"{label!r} is no place in a prompt: expected a token position, a text that occurs once, or characters [start, end]"
    )
