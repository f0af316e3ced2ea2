"""Do pairs fit the model: are their tokens and answers in its vocabulary, and their prompts short enough?"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from featpatch.errors import FeatpatchError
from featpatch.lens.lens import Lens
from featpatch.pairs import Pairs

Continuations = Mapping[int, Sequence[tuple[int, ...]]]
"""By pair the tokens that are put behind its prompts."""

NONE: Continuations = MappingProxyType({})


def check_tokens(pairs: Pairs, lens: Lens, continuations: Continuations = NONE) -> None:
    """Refuses tokens and answers that the model doesn't know, and prompts that are too long for it.

    Raises:
        FeatpatchError: one of these.
    """
    inputs, context = lens.d_vocab_in, lens.n_ctx
    for index, pair in enumerate(pairs):
        behind = continuations.get(index, ())
        answers = [token for side in pair.answers for answer in side for token in answer]
        tokens = (*pair.clean, *pair.corrupted, *(token for continuation in behind for token in continuation))
        length = len(pair) + max(map(len, behind), default=0)
        if not 0 <= min(answers) <= max(answers) < lens.d_vocab:
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
            with_answers = " with its answers" if length > len(pair) else ""
            raise FeatpatchError(
                f"pair {index} has {length} tokens{with_answers}: expected at most {context}, the model's context"
            )
