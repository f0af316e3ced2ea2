"""Where in a prompt's tokens a character is."""

from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.pairs.tokens import Tokenizer, prompt_ids


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
