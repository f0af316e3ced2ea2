"""Text to token ids with any tokenizer, given as a callable."""

from collections.abc import Callable, Sequence
from typing import Any

from featpatch.errors import FeatpatchError

Tokenizer = Callable[..., Any]
"""A Hugging Face tokenizer, or any function from a text to a sequence of ids."""


def prompt_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of a prompt, with whatever special tokens the tokenizer adds."""
    return _ids(tokenizer, text)


def answer_id(tokenizer: Tokenizer, text: str, *, instead: str = "") -> int:
    """The one id of an answer.

    Args:
        instead: what else can be done about an answer of several tokens, for the error.

    Raises:
        FeatpatchError: the answer is not exactly one known token.
    """
    ids = _bare_ids(tokenizer, text)
    if len(ids) != 1:
        raise FeatpatchError(
            f"answer {text!r} is {len(ids)} tokens {list(ids)}: expected exactly one; choose a one-token answer, "
            f"with the leading space if the tokenizer wants it (' Mary'){instead}"
        )
    return _known(tokenizer, text, ids)[0]


def answer_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """The ids of an answer of one or more tokens, as they follow a prompt.

    Raises:
        FeatpatchError: the answer has no tokens, or one that the tokenizer does not know.
    """
    ids = _bare_ids(tokenizer, text)
    if not ids:
        raise FeatpatchError(f"answer {text!r} has no tokens: expected at least one; give a text")
    return _known(tokenizer, text, ids)


def next_token(tokenizer: Tokenizer, prompt: str, continuation: str, *, among: Sequence[int]) -> int | None:
    """The one known id by which the continuation lengthens the prompt, None where it is not one.

    Args:
        among: the ids of the prompt.
    """
    longer = prompt_ids(tokenizer, prompt + continuation)
    if len(longer) != len(among) + 1 or longer[:-1] != tuple(among):
        return None
    return longer[-1] if longer[-1] != getattr(tokenizer, "unk_token_id", None) else None


def special_positions(tokenizer: Tokenizer, *prompts: Sequence[int]) -> frozenset[int]:
    """Positions of the tokenizer's special tokens (BOS, padding, ...) in any of the prompts; none for a plain function."""
    special = set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "unk_token_id", None)}
    return frozenset(position for ids in prompts for position, token in enumerate(ids) if token in special)


def _bare_ids(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids without the special tokens that the tokenizer puts around a prompt."""
    bare = {"add_special_tokens": False} if hasattr(tokenizer, "all_special_ids") else {}
    return _ids(tokenizer, text, **bare)


def _known(tokenizer: Tokenizer, text: str, ids: tuple[int, ...]) -> tuple[int, ...]:
    if getattr(tokenizer, "unk_token_id", None) in ids:
        raise FeatpatchError(f"answer {text!r} is not in the tokenizer's vocabulary: choose a word that it knows")
    return ids


def _ids(tokenizer: Tokenizer, text: str, **options: bool) -> tuple[int, ...]:
    if not callable(tokenizer):
        raise FeatpatchError(f"the tokenizer is a {type(tokenizer).__name__}: expected a Hugging Face tokenizer, or a function")
    tokens: Any = tokenizer(text, **options)
    return tuple(int(token) for token in getattr(tokens, "input_ids", tokens))
