"""Check that pairs fit a model: known tokens and answers, prompts that begin and end correctly and are not too long."""

import warnings
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from featpatch.errors import FeatpatchError
from featpatch.model.lens import Lens
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import PairsWarning, first_token, is_padded

Continuations = Mapping[int, Sequence[tuple[int, ...]]]
"""The continuations of each pair's prompts, by the index of the pair."""

NONE: Continuations = MappingProxyType({})


def check_tokens(pairs: Pairs, lens: Lens, continuations: Continuations = NONE) -> None:
    """Check that a model accepts the tokens of pairs, and warn if prompts lack the BOS that it puts before a text.

    Raises:
        FeatpatchError: the model does not know a token or an answer, or a prompt is padded, begins with two BOS or is too long.
    """
    inputs, context = lens.d_vocab_in, lens.n_ctx
    _check_ends(pairs, getattr(lens.model, "tokenizer", None))
    _compare_start(pairs, lens)
    for index, pair in enumerate(pairs):
        following = continuations.get(index, ())
        answers = [token for side in pair.answers for answer in side for token in answer]
        tokens = (*pair.clean, *pair.corrupted, *(token for continuation in following for token in continuation))
        length = max(pair.lengths) + max(map(len, following), default=0)
        if answers and not 0 <= min(answers) <= max(answers) < lens.d_vocab:
            raise FeatpatchError(
                f"pair {index}: answers {answers} are outside the model's vocabulary of {lens.d_vocab} "
                "tokens: expected ids of the model's own tokenizer"
            )
        if not 0 <= min(tokens) <= max(tokens) < inputs:
            raise FeatpatchError(
                f"pair {index} has token ids from {min(tokens)} to {max(tokens)}: expected 0 to {inputs - 1}, ids of "
                "the model's own tokenizer"
            )
        if context is not None and length > context:
            with_answers = " with its answers" if length > max(pair.lengths) else ""
            raise FeatpatchError(
                f"pair {index} has {length} tokens{with_answers}: expected at most {context}, the model's context"
            )


def _check_ends(pairs: Pairs, tokenizer: Any) -> None:
    """Check that prompts do not begin or end with padding or begin with two BOS; warn if padding may also be BOS or EOS.

    Raises:
        FeatpatchError: a prompt begins with two BOS, or certainly begins or ends with padding.
    """
    if tokenizer is None:
        return
    bos = getattr(tokenizer, "bos_token_id", None)
    for index, pair in enumerate(pairs):
        if bos is not None and (bos, bos) in (pair.clean[:2], pair.corrupted[:2]):
            raise FeatpatchError(
                f"pair {index} begins with {tokenizer.bos_token!r} ({bos}) twice: expected it once; leave it out of the text, "
                "since the tokenizer adds it"
            )
        if is_padded(tokenizer, pair.clean, pair.corrupted, surely=True):
            raise FeatpatchError(
                f"pair {index} begins or ends with the padding token {tokenizer.pad_token!r}: expected prompts without "
                "padding; make pairs with Pairs.from_tokens(..., attention_mask=...)"
            )
    perhaps = sum(is_padded(tokenizer, pair.clean, pair.corrupted) for pair in pairs)
    if perhaps:
        warnings.warn(
            f"{perhaps} of {len(pairs)} pairs begin or end with {tokenizer.pad_token!r}, which is BOS or EOS and also the "
            "padding token: it is treated as part of the prompt; if it is padding, make the pairs with "
            "Pairs.from_tokens(..., attention_mask=...)",
            PairsWarning,
            stacklevel=2,
        )


def _compare_start(pairs: Pairs, lens: Lens) -> None:
    """Warn if prompts lack the special token that the model puts before a text."""
    first = first_token(lens.model)
    lacking = sum(first is not None and pair.clean[0] != first for pair in pairs)
    if lacking:
        warnings.warn(
            f"{lacking} of {len(pairs)} pairs lack {lens.model.tokenizer.decode([first])!r} ({first}), which model(text) adds "
            "at the start: to add it too, pass the model instead of a tokenizer to Pairs.from_prompts",
            PairsWarning,
            stacklevel=2,
        )
