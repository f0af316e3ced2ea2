"""Token ids of prompts and of the answers that follow them.

A tokenizer is a Hugging Face tokenizer, a function from a text to ids, or a TransformerLens model. Of a model, prompts get
the ids that `model(text)` would use, with BOS where the model prepends it; a tokenizer is used as it is.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from featpatch.errors import FeatpatchError

Tokenizer = Callable[..., Any]
"""A Hugging Face tokenizer, a function from a text to a sequence of ids, or a model of TransformerLens."""

Ids = tuple[int, ...]


class PairsWarning(UserWarning):
    """Prompts or answers that can be used, but are probably not what was meant."""


def prompt_ids(tokenizer: Tokenizer, text: str) -> Ids:
    """Ids of a prompt, with the special tokens that begin it.

    BOS stands there once, also where the text spells it out; a final EOS that the tokenizer appends is removed, because the
    answer follows the prompt.
    """
    plain, model = plain_tokenizer(tokenizer), _model(tokenizer)
    ids = _ids(plain if model is None else model.to_tokens, text)
    bos, eos = (getattr(plain, name, None) for name in ("bos_token_id", "eos_token_id"))
    if bos is not None and ids[:2] == (bos, bos):
        warnings.warn(
            f"a prompt begins with {plain.bos_token!r}, which the tokenizer adds as well: the second one is left out; leave it "
            "out of the text",
            PairsWarning,
            stacklevel=2,
        )
        ids = ids[1:]
    appended = len(ids) > 1 and ids[-1] == eos and eos != getattr(plain, "sep_token_id", None)
    return ids[:-1] if appended and bare_ids(tokenizer, text)[-1:] != (eos,) else ids


def bare_ids(tokenizer: Tokenizer, text: str) -> Ids:
    """Ids of a text without the special tokens that are put around a prompt."""
    plain = plain_tokenizer(tokenizer)
    return _ids(plain, text, **({"add_special_tokens": False} if hasattr(plain, "all_special_ids") else {}))


def first_token(model: Any) -> int | None:
    """The special token that the model puts first when it is called with a text; None for none, or without a tokenizer."""
    if _model(model) is None or model.tokenizer is None:
        return None
    ids = prompt_ids(model, "a")
    return ids[0] if 0 in special_positions(model, ids) else None


@dataclass(frozen=True)
class AnswerTokens:
    """Turns answers into the tokens that the tokenizer puts behind a prompt.

    Attributes:
        tokenizer: see `Tokenizer`.
        prompt: the text that the answers follow; None where only its ids are known.
        remarks: what was odd about the answers, filled as they are turned into tokens.
    """

    tokenizer: Tokenizer
    prompt: str | None
    remarks: list[str] = field(default_factory=list)

    def ids(self, text: str) -> Ids:
        """The tokens of an answer, one or more.

        They are those by which the answer lengthens the prompt. Where the prompt itself is tokenized differently with the
        answer behind it, they are those of the answer by itself.

        Raises:
            FeatpatchError: the answer has no tokens, or one that the tokenizer does not know.
        """
        return self._known(text, self._any_ids(text))

    def one(self, text: str, *, instead: str = "") -> int:
        """The token of an answer that is exactly one.

        Args:
            instead: what else can be done about an answer of several tokens, for the error.

        Raises:
            FeatpatchError: the answer is not exactly one known token.
        """
        ids = self._any_ids(text)
        if len(ids) != 1:
            spaced = None if text[:1].isspace() else self._following(f" {text}")
            hint = f"; with a space in front, {f' {text}'!r}, it is one" if spaced is not None and len(spaced) == 1 else ""
            behind = f" after {self._end()}" if self.prompt is not None else ""
            raise FeatpatchError(
                f"answer {text!r} is {len(ids)} tokens {list(ids)}{behind}: expected exactly one{hint}; choose a one-token "
                f"answer{instead}"
            )
        return self._known(text, ids)[0]

    def next_token(self, text: str) -> int | None:
        """The one known id by which a text lengthens the prompt, None where it is not one."""
        ids = self._following(text)
        return ids[0] if ids is not None and len(ids) == 1 and self._unknown not in ids else None

    @property
    def _unknown(self) -> int | None:
        return getattr(plain_tokenizer(self.tokenizer), "unk_token_id", None)

    def _known(self, text: str, ids: Ids) -> Ids:
        if self._unknown in ids:
            raise FeatpatchError(f"answer {text!r} is not in the tokenizer's vocabulary: choose a word that it knows")
        return ids

    def _any_ids(self, text: str) -> Ids:
        """As `ids`, of unknown tokens too."""
        following, meant = self._following(text), self._meant_spaced(text)
        if following is not None and not meant:
            return following
        found = bare_ids(self.tokenizer, text) if following is None else following
        if not found:
            raise FeatpatchError(f"answer {text!r} has no tokens: expected at least one; give a text")
        spaced = None if text[:1].isspace() else self._following(f" {text}")
        if following is None and spaced == found:
            return found  # words are split at spaces, which are no tokens
        if spaced is not None and spaced != found and meant:
            self.remarks.append(
                f"answer {text!r} follows {self._end()} without a space, as {self._spelt(found)}; with one, {f' {text}'!r} is "
                f"{self._spelt(spaced)}; write {f' {text}'!r} if it is a word of its own"
            )
        elif following is None and self.prompt is not None:
            self.remarks.append(
                f"the tokens of {self._end()} change when {text!r} follows, so that those of the answer by itself are read, "
                f"{self._spelt(found)}; end the prompt where a token ends, for example without a final space"
            )
        return found

    @cached_property
    def _prompt_ids(self) -> Ids:
        return bare_ids(self.tokenizer, self.prompt or "")

    def _following(self, text: str) -> Ids | None:
        """The ids by which a text lengthens the prompt; None where its own tokens change or there is no prompt."""
        if self.prompt is None:
            return None
        before, longer = self._prompt_ids, bare_ids(self.tokenizer, self.prompt + text)
        return longer[len(before) :] or None if longer[: len(before)] == before else None

    def _meant_spaced(self, text: str) -> bool:
        """Whether prompt and answer run together as words of a text do not; two numbers may be meant to."""
        last, first = (self.prompt or "")[-1:], text[:1]
        words = first.isalpha() and (last.isalnum() or last in tuple(",.;:?!"))
        return words or (first.isdigit() and last.isalpha())

    def _end(self) -> str:
        assert self.prompt is not None
        return repr(self.prompt if len(self.prompt) <= 20 else f"...{self.prompt[-20:]}")

    def _spelt(self, ids: Ids) -> str:
        return str(_pieces(self.tokenizer, ids))


def by_itself(tokenizer: Tokenizer, token: int) -> Ids | None:
    """The ids of a token's text without a prompt in front; None where the tokenizer can't turn ids into text."""
    decode = getattr(plain_tokenizer(tokenizer), "decode", None)
    return None if decode is None else bare_ids(tokenizer, str(decode([token])))


def padding(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[int, int]:
    """Where the tokens of a row of ids start and stop within padding, by the tokenizer's padding token.

    Raises:
        FeatpatchError: padding can't be told from BOS or EOS, or there is nothing else.
    """
    plain = plain_tokenizer(tokenizer)
    pad = getattr(plain, "pad_token_id", None)
    kept = [position for position, token in enumerate(ids) if token != pad]
    shared = pad in (getattr(plain, "bos_token_id", None), getattr(plain, "eos_token_id", None))
    at_most = 1 if shared else 0  # one BOS at the start
    if pad is None or len(ids) == at_most or (kept and kept[0] <= at_most and kept[-1] == len(ids) - 1):
        return 0, len(ids)
    if shared or not kept:
        raise FeatpatchError(
            f"token ids {list(ids)} begin or end with {plain.pad_token!r} ({pad}), which "
            f"{'is the padding token and also BOS or EOS' if shared else 'is the padding token'}: expected prompts without "
            "padding, or attention_mask= with 1 for tokens and 0 for padding"
        )
    return kept[0], kept[-1] + 1


def is_padded(tokenizer: Tokenizer, *prompts: Sequence[int]) -> bool:
    """Whether one of the prompts begins or ends with padding."""
    try:
        return any(padding(tokenizer, ids) != (0, len(ids)) for ids in prompts)
    except FeatpatchError:
        return True


def masked(mask: Sequence[int]) -> tuple[int, int]:
    """Where tokens start and stop within padding, by a row of an attention mask.

    Raises:
        FeatpatchError: tokens are not side by side.
    """
    kept = [position for position, keep in enumerate(mask) if keep]
    if not kept or kept != list(range(kept[0], kept[-1] + 1)) or not set(mask) <= {0, 1}:
        raise FeatpatchError(f"attention_mask is {list(mask)}: expected ones side by side, with zeros before or after them")
    return kept[0], kept[-1] + 1


def special_positions(tokenizer: Tokenizer, *prompts: Sequence[int]) -> frozenset[int]:
    """Positions of the tokenizer's special tokens (BOS, padding, ...) in any of the prompts; none for a plain function."""
    plain = plain_tokenizer(tokenizer)
    special = set(getattr(plain, "all_special_ids", ())) - {getattr(plain, "unk_token_id", None)}
    return frozenset(position for ids in prompts for position, token in enumerate(ids) if token in special)


def plain_tokenizer(tokenizer: Tokenizer) -> Any:
    """The tokenizer of a model; any other tokenizer itself.

    Raises:
        FeatpatchError: it is none.
    """
    model = _model(tokenizer)
    plain = tokenizer if model is None else model.tokenizer
    if not callable(plain):
        raise FeatpatchError(
            f"the tokenizer is a {type(plain).__name__}: expected a Hugging Face tokenizer, a function, or a model with one"
        )
    return plain


def _model(tokenizer: Any) -> Any:
    """The model, if it is one."""
    return tokenizer if callable(getattr(tokenizer, "to_tokens", None)) and hasattr(tokenizer, "tokenizer") else None


def _pieces(tokenizer: Tokenizer, ids: Ids) -> list[Any]:
    convert = getattr(plain_tokenizer(tokenizer), "convert_ids_to_tokens", list)
    return list(convert(list(ids)))


def _ids(tokenize: Callable[..., Any], text: str, **options: bool) -> Ids:
    tokens: Any = tokenize(text, **options)
    tokens = getattr(tokens, "input_ids", tokens)
    return tuple(int(token) for token in (tokens[0] if getattr(tokens, "ndim", 1) == 2 else tokens))
