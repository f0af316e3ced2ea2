"""Tokenization of prompts and of the answers that follow them, and batches of prompts of equal length.

A tokenizer is a Hugging Face tokenizer, a function from a text to ids, or a TransformerLens model. Given a model, prompts get
the ids that `model(text)` would use, including BOS if the model prepends it; a tokenizer is called as it is.
"""

import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import index
from typing import Any, TypeVar

from featpatch.errors import FeatpatchError, FeatpatchWarning

Tokenizer = Callable[..., Any]
"""A Hugging Face tokenizer, a function from a text to a sequence of ids, or a TransformerLens model."""

Ids = tuple[int, ...]


UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "IDEOGRAPHIC", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
"""How the Unicode names of letters begin in scripts that are written without spaces between words."""


class PairsWarning(FeatpatchWarning):
    """A warning about prompts or answers that can be used, but are probably not what was meant."""


def prompt_ids(tokenizer: Tokenizer, text: str) -> Ids:
    """Return the ids of a prompt, including the special tokens at its start.

    BOS appears once, even if the text spells it out; a final EOS that the tokenizer appends is removed, because the answer
    follows the prompt.
    """
    plain, model = plain_tokenizer(tokenizer), _model(tokenizer)
    ids = _ids(plain, text) if model is None else _ids(model.to_tokens, text, truncate=False)
    bos, eos = (getattr(plain, name, None) for name in ("bos_token_id", "eos_token_id"))
    if bos is not None and ids[:2] == (bos, bos):
        warnings.warn(
            f"a prompt begins with {plain.bos_token!r}, which the tokenizer also adds: the second one is dropped; leave it "
            "out of the text",
            PairsWarning,
            stacklevel=2,
        )
        ids = ids[1:]
    appended = len(ids) > 1 and ids[-1] == eos and eos != getattr(plain, "sep_token_id", None)
    return ids[:-1] if appended and bare_ids(tokenizer, text)[-1:] != (eos,) else ids


def bare_ids(tokenizer: Tokenizer, text: str) -> Ids:
    """Return the ids of a text without the special tokens that are put around a prompt."""
    plain = plain_tokenizer(tokenizer)
    return _ids(plain, text, **({"add_special_tokens": False} if hasattr(plain, "all_special_ids") else {}))


def first_token(model: Any) -> int | None:
    """Return the special token that the model puts before a text, or None if it puts none or has no tokenizer."""
    if _model(model) is None or model.tokenizer is None:
        return None
    ids = prompt_ids(model, "a")
    return ids[0] if 0 in special_positions(model, ids) else None


@dataclass(frozen=True)
class AnswerTokens:
    """A tokenizer of answers as continuations of one prompt.

    Attributes:
        tokenizer: a Hugging Face tokenizer, a function from a text to ids, or a model, see `Tokenizer`.
        prompt: the text that the answers follow; None if only its ids are known.
        remarks: messages about answers that are probably not what was meant, collected as answers are tokenized.
    """

    tokenizer: Tokenizer
    prompt: str | None
    remarks: list[str] = field(default_factory=list)

    def ids(self, text: str) -> Ids:
        """Return the token ids of an answer, one or more.

        These are the tokens that the answer adds to the prompt. If adding it changes the prompt's own tokens, the answer is
        tokenized by itself.

        Raises:
            FeatpatchError: the answer has no tokens, or one that the tokenizer does not know.
        """
        return self._known(text, self._any_ids(text))

    def one(self, text: str, *, instead: str = "") -> int:
        """Return the token id of an answer that is exactly one token.

        Args:
            text: the answer.
            instead: what the error suggests for an answer of several tokens, besides a shorter answer.

        Raises:
            FeatpatchError: the answer is not exactly one known token.
        """
        ids = self._any_ids(text)
        if len(ids) != 1:
            hint = f"; with a space in front, {f' {text}'!r}, it is one" if len(self._spaced(text) or ()) == 1 else ""
            after = f" after {self._end()}" if self.prompt is not None else ""
            raise FeatpatchError(
                f"answer {text!r} is {len(ids)} tokens {list(ids)}{after}: expected exactly one{hint}; choose a one-token "
                f"answer{instead}"
            )
        return self._known(text, ids)[0]

    def next_token(self, text: str) -> int | None:
        """Return the one known token that a text adds to the prompt, or None if it does not add exactly one."""
        ids = self._following(text)
        return ids[0] if ids is not None and len(ids) == 1 and self._unknown not in ids else None

    @property
    def _unknown(self) -> int | None:
        return getattr(plain_tokenizer(self.tokenizer), "unk_token_id", None)

    def _known(self, text: str, ids: Ids) -> Ids:
        if self._unknown in ids:
            raise FeatpatchError(
                f"answer {text!r} is not in the tokenizer's vocabulary: expected a word that is; choose another answer"
            )
        return ids

    def _any_ids(self, text: str) -> Ids:
        """Return the tokens of an answer, including unknown ones."""
        following, space_missing = self._following(text), self._space_missing(text)
        if following is not None and not space_missing:
            return following
        found = bare_ids(self.tokenizer, text) if following is None else following
        if not found:
            raise FeatpatchError(f"answer {text!r} has no tokens: expected at least one; give text that is not empty")
        spaced = self._spaced(text)
        if following is None and spaced == found:
            return found  # the tokenizer splits words at spaces and has no tokens for them
        if spaced is not None and spaced != found and len(spaced) <= len(found) and space_missing:
            self.remarks.append(
                f"answer {text!r} follows {self._end()} without a space and is tokenized as {self._pieces(found)}; with a "
                f"space, {f' {text}'!r} is tokenized as {self._pieces(spaced)}; write {f' {text}'!r} if it is a separate word"
            )
        elif following is None and self.prompt is not None:
            self.remarks.append(
                f"the tokens of {self._end()} change when {text!r} follows, so the answer is tokenized on its own, as "
                f"{self._pieces(found)}; end the prompt at the end of a token, for example without a final space"
            )
        return found

    @cached_property
    def _prompt_ids(self) -> Ids:
        return bare_ids(self.tokenizer, self.prompt or "")

    def _following(self, text: str) -> Ids | None:
        """Return the ids that a text adds to the prompt; None if the prompt's own tokens change or there is no prompt."""
        if self.prompt is None:
            return None
        before, longer = self._prompt_ids, bare_ids(self.tokenizer, self.prompt + text)
        return longer[len(before) :] or None if longer[: len(before)] == before else None

    def _spaced(self, text: str) -> Ids | None:
        """Return the ids that a text adds to the prompt with a space in front; None if it begins with one already."""
        return None if text[:1].isspace() else self._following(f" {text}")

    def _space_missing(self, text: str) -> bool:
        """Return whether the answer probably lacks a space after the last word of the prompt; digits may continue a number."""
        last, first = (self.prompt or "")[-1:], text[:1]
        if any(unicodedata.name(letter, "").startswith(UNSPACED) for letter in (last, first) if letter):
            return False
        words = first.isalpha() and (last.isalnum() or last in tuple(",.;:?!"))
        return words or (first.isdigit() and last.isalpha())

    def _end(self) -> str:
        assert self.prompt is not None
        return repr(self.prompt if len(self.prompt) <= 20 else f"...{self.prompt[-20:]}")

    def _pieces(self, ids: Ids) -> list[Any]:
        convert = getattr(plain_tokenizer(self.tokenizer), "convert_ids_to_tokens", list)
        return list(convert(list(ids)))


def by_itself(tokenizer: Tokenizer, token: int) -> Ids | None:
    """Tokenize the text of a token without a prompt in front; return None if the tokenizer can't turn ids into text."""
    decode = getattr(plain_tokenizer(tokenizer), "decode", None)
    return None if decode is None else bare_ids(tokenizer, str(decode([token])))


def unpadded(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, int]:
    """Find where the tokens of a row of ids start and stop within padding, by the tokenizer's padding token.

    Raises:
        FeatpatchError: padding can't be distinguished from BOS or EOS, or the row consists of padding only.
    """
    plain = plain_tokenizer(tokenizer)
    pad, bos, shared = _padding(tokenizer)
    kept = [position for position, token in enumerate(ids) if token != pad]
    at_most = 1 if pad == bos else 0  # one BOS at the start
    if pad is None or len(ids) == at_most or (kept and kept[0] <= at_most and kept[-1] == len(ids) - 1):
        return 0, len(ids)
    if shared or not kept:
        raise FeatpatchError(
            f"token ids {list(ids)} begin or end with {plain.pad_token!r} ({pad}), which "
            f"{'is both the padding token and BOS or EOS' if shared else 'is the padding token'}: expected prompts without "
            "padding, or attention_mask= with 1 for tokens and 0 for padding"
        )
    return kept[0], kept[-1] + 1


def is_padded(tokenizer: Tokenizer, *prompts: Sequence[int], surely: bool = False) -> bool:
    """Return whether one of the prompts begins or ends with padding.

    Args:
        tokenizer: the tokenizer that defines the padding token.
        prompts: the token ids of each prompt.
        surely: whether to ignore a single token at an end if the padding token is also BOS or EOS.
    """
    pad, _bos, shared = _padding(tokenizer)
    if surely and shared:
        return any(ids[:2] == (pad, pad) or ids[-2:] == (pad, pad) for ids in map(tuple, prompts))
    try:
        return any(unpadded(tokenizer, ids) != (0, len(ids)) for ids in prompts)
    except FeatpatchError:
        return True


def check_starts(tokenizer: Tokenizer, rows: Sequence[Sequence[int]]) -> None:
    """Raise a FeatpatchError if some rows of a batch begin with the padding token, which is also BOS, and others do not."""
    pad, bos, _shared = _padding(tokenizer)
    begin = sum(row[0] == pad for row in rows if row)
    if pad is not None and pad == bos and 0 < begin < len(rows):
        raise FeatpatchError(
            f"{begin} of {len(rows)} rows of token ids begin with {pad}, which is both the padding token and BOS, and the "
            "others do not: expected BOS in all rows or in none, or attention_mask= with 1 for tokens and 0 for padding"
        )


def _padding(tokenizer: Tokenizer) -> tuple[int | None, int | None, bool]:
    """Return the ids of the padding token and of BOS, and whether the padding token is also BOS or EOS."""
    pad, bos, eos = (getattr(plain_tokenizer(tokenizer), f"{name}_token_id", None) for name in ("pad", "bos", "eos"))
    return pad, bos, pad is not None and pad in (bos, eos)


def unmasked(mask: Sequence[int]) -> tuple[int, int]:
    """Find where tokens start and stop within padding, by a row of an attention mask.

    Raises:
        FeatpatchError: the mask is not one run of ones, with zeros before or after it.
    """
    kept = [position for position, keep in enumerate(mask) if keep]
    if not kept or kept != list(range(kept[0], kept[-1] + 1)) or not set(mask) <= {0, 1}:
        raise FeatpatchError(f"attention_mask is {list(mask)}: expected consecutive ones, with zeros before or after them")
    return kept[0], kept[-1] + 1


def special_positions(tokenizer: Tokenizer, *prompts: Sequence[int]) -> frozenset[int]:
    """Return the positions of special tokens (BOS, padding, ...) in any of the prompts; none for a plain function."""
    plain = plain_tokenizer(tokenizer)
    special = set(getattr(plain, "all_special_ids", ())) - {getattr(plain, "unk_token_id", None)}
    return frozenset(position for ids in prompts for position, token in enumerate(ids) if token in special)


def plain_tokenizer(tokenizer: Tokenizer) -> Any:
    """Return the tokenizer of a model, or the tokenizer itself.

    Raises:
        FeatpatchError: it is not a tokenizer, or the model has none.
    """
    model = _model(tokenizer)
    plain = tokenizer if model is None else model.tokenizer
    if not callable(plain):
        raise FeatpatchError(
            f"the tokenizer is a {type(plain).__name__}: expected a Hugging Face tokenizer, a function from text to token "
            "ids, or a model that has a tokenizer"
        )
    return plain


def check_tokenizer(tokenizer: Any, use: str) -> None:
    """Raise a FeatpatchError, which says what a tokenizer would be used for, if a model has none."""
    if tokenizer is None:
        raise FeatpatchError(f"the model has no tokenizer: expected one {use}; pass it when you load the model")


def _model(tokenizer: Any) -> Any:
    """Return the argument if it is a model, else None."""
    return tokenizer if callable(getattr(tokenizer, "to_tokens", None)) and hasattr(tokenizer, "tokenizer") else None


def _ids(tokenize: Callable[..., Any], text: str, **options: bool) -> Ids:
    given: Any = tokenize(text, **options)
    found = given["input_ids"] if isinstance(given, Mapping) and "input_ids" in given else getattr(given, "ids", given)
    ids = one_row(found)
    if ids is None:
        raise FeatpatchError(
            f"the tokenizer returns {str(given)[:60]!r} for the text {text[:40]!r}: expected its token ids, as a list of "
            "integers, a tensor [pos], or a mapping that has them as 'input_ids'"
        )
    return ids


def one_row(value: Any) -> Ids | None:
    """Convert token ids `[pos]` or `[1, pos]`, from a tensor, an array or lists, to a tuple; return None for anything else."""
    rows = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(rows, list | tuple) and len(rows) == 1 and isinstance(rows[0], list | tuple):
        rows = rows[0]
    ids = plain_integers(rows)
    return ids if isinstance(ids, tuple) else None


def plain_integers(value: Any) -> int | tuple[int, ...] | None:
    """Convert an integer of any type, such as NumPy's, or a list or range of integers to `int`; None for anything else."""
    if isinstance(value, list | tuple | range):
        every = [plain_integers(each) for each in value]
        plain = tuple(each for each in every if isinstance(each, int))
        return plain if len(plain) == len(every) else None
    try:
        return None if isinstance(value, bool) else index(value)
    except TypeError:
        return None


Length = TypeVar("Length", int, tuple[int, int], int | tuple[int, int])


def by_length(lengths: Iterable[Length]) -> dict[Length, list[int]]:
    """Return the indices of prompts or pairs, grouped by the number of tokens."""
    groups: dict[Length, list[int]] = {}
    for number, length in enumerate(lengths):
        groups.setdefault(length, []).append(number)
    return groups


def chunks(lengths: Sequence[int | tuple[int, int]], tokens: int) -> Iterator[list[int]]:
    """Yield the indices of equally long prompts or pairs to run in one batch, of at most `tokens` tokens but at least one.

    Args:
        lengths: the number of tokens of each prompt, or those of the clean and of the corrupted prompt of each pair.
        tokens: the largest number of tokens of the prompts of a batch.
    """
    for length, group in by_length(lengths).items():
        size = max(1, tokens // (max(length) if isinstance(length, tuple) else length))
        for start in range(0, len(group), size):
            yield group[start : start + size]
