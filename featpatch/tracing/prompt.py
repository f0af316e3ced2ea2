"""The prompt of an attribution graph or a query-key attribution: a text, token ids or a pair."""

from collections.abc import Sequence
from typing import Any

from featpatch.errors import FeatpatchError, is_integer
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs
from featpatch.pairs.tokens import prompt_ids, special_positions


def prompt_of(lens: Lens, prompt: Any) -> tuple[tuple[int, ...], frozenset[int]]:
    """Return the token ids of a prompt, that of a pair up to the answer, and the positions of special tokens.

    Raises:
        FeatpatchError: it is not a text, token ids or a pair, or the model does not know a token.
    """
    if hasattr(prompt, "tolist") and prompt.shape[:-1] in ((), (1,)):  # such as model.to_tokens(text)
        prompt = prompt.reshape(-1).tolist()
    if isinstance(prompt, str):
        if not prompt or lens.tokenizer is None:
            missing = "the model has no tokenizer" if prompt else "it is empty"
            raise FeatpatchError(f"prompt={prompt!r:.60}, and {missing}: expected a text, or the token ids of one as a list")
        prompt = prompt_ids(lens.model, prompt)
    elif not isinstance(prompt, Pair) and (
        not isinstance(prompt, (list, tuple)) or not prompt or not all(map(is_integer, prompt))
    ):
        raise FeatpatchError(f"prompt={prompt!r:.60}: expected a text, token ids of one prompt, or a pair such as pairs[0]")
    ids = () if isinstance(prompt, Pair) else tuple(map(int, prompt))
    pair = prompt if isinstance(prompt, Pair) else Pair(ids, ids, (), ())
    if lens.n_ctx is not None and len(ids) > lens.n_ctx:
        raise FeatpatchError(
            f"the prompt has {len(ids)} tokens: expected at most {lens.n_ctx}, the model's context; shorten it"
        )
    check_tokens(Pairs((pair,)), lens)
    ids = pair.clean[: (pair.answer_position % len(pair.clean)) + 1]
    special = pair.special
    if lens.tokenizer is not None:
        special = special | special_positions(lens.tokenizer, ids)
    return ids, frozenset(at for at in special if at < len(ids))


def words_of(lens: Lens, ids: Sequence[int]) -> tuple[str, ...]:
    """Return the text of each token, or its id if the model has no tokenizer."""
    return tuple(str(token) if lens.tokenizer is None else lens.tokenizer.decode([token]) for token in ids)
