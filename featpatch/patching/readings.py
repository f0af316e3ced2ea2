"""Where metrics are read: once, at the answer position, or before each token of answers of several tokens.

The log-probability of an answer of several tokens is teacher-forced: the earlier tokens of the answer follow the prompt, in
both the clean and the corrupted run.

    log p(a | prompt) = sum_i log p(a_i | prompt, a_1 ... a_(i-1))

So each reading is a pair with one-token answers: the pair itself, or the pair with earlier tokens of an answer at its end.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError, each
from featpatch.metrics import SEQUENCES, Measures
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens
from featpatch.pairs.pair import Pair, check_answers
from featpatch.pairs.pairs import Pairs


def readings_of(measures: Measures, pairs: Pairs, lens: Lens) -> dict[int, list[Pair]]:
    """Return the readings of every pair, by its index, after checking that the model accepts its tokens.

    Raises:
        FeatpatchError: the metrics do not read answers of this kind, a token is unknown, a prompt is too long, or an answer
            would follow the prompt of a model that attends in both directions.
    """
    found = dict(enumerate(each(partial(readings, measures), list(pairs))))
    following = {index: [continuation(read, pairs[index]) for read in of_pair] for index, of_pair in found.items()}
    check_tokens(pairs, lens, following)
    if any(any(of_pair) for of_pair in following.values()) and not lens.causal:
        raise FeatpatchError(
            f"metric {', '.join(measures.names)} reads answers that follow the prompt, but {lens.name!r} has bidirectional "
            "attention: expected a causal model, or one-token answers"
        )
    return found


def readings(measures: Measures, pair: Pair) -> list[Pair]:
    """Return the pair itself, or the pair of each token of each answer that the metrics read.

    Raises:
        FeatpatchError: a metric reads one token and the pair's answers have several, or the pair lacks answers.
    """
    if measures.by_token:
        return [
            _before(pair, answer, token) for side in _sides(measures, pair) for answer in side for token in range(len(answer))
        ]
    need = [part.name for part in measures.parts if part.of_answers]
    check_answers(pair, need)
    if need and not pair.correct:
        raise FeatpatchError(
            f"its answers {pair.answers} have several tokens, and {', '.join(need)} reads one: expected the metric "
            f"{' or '.join(SEQUENCES)}, or one-token answers"
        )
    return [pair]


def continuation(read: Pair, pair: Pair) -> tuple[int, ...]:
    """Return the tokens that follow the prompts of a pair in one of its readings."""
    return read.clean[len(pair.clean) :]


def combined(
    measures: Measures, pair: Pair, values: Float[torch.Tensor, "readings patches metrics"]
) -> Float[torch.Tensor, "patches metrics"]:
    """Return the metrics of a pair from their values at each reading.

    For answers of several tokens, values are summed over tokens; then come the logarithm of the sum of probabilities over
    answers and, for a difference, that of the wrong answers.
    """
    if not measures.by_token:
        return values[0]
    sides = []
    for answers in _sides(measures, pair):
        tokens = [len(answer) for answer in answers]
        parts, values = values[: sum(tokens)].split(tokens), values[sum(tokens) :]
        sides.append(torch.stack([part.sum(0) for part in parts]).logsumexp(0))
    found = {"sequence_log_prob": sides[0], "sequence_log_prob_diff": sides[0] - sides[-1]}
    return torch.stack([found[name][:, column] for column, name in enumerate(measures.names)], dim=1)


def _before(pair: Pair, answer: tuple[int, ...], token: int) -> Pair:
    """Return a pair with the tokens of an answer before one of its tokens, which is the answer of the new pair."""
    before = answer[:token]
    return replace(
        pair,
        clean=pair.clean + before,
        corrupted=pair.corrupted + before,
        correct=(answer[token],),
        wrong=(),
        answer_position=pair.answer_position + token,
        correct_sequences=(),
        wrong_sequences=(),
    )


def _sides(measures: Measures, pair: Pair) -> tuple[Sequence[tuple[int, ...]], ...]:
    """Return the correct answers and, if a metric needs them, the wrong ones; raise a FeatpatchError if there are none."""
    check_answers(pair, measures.names)
    if "sequence_log_prob_diff" not in measures.names:
        return pair.answers[:1]
    if not pair.answers[1]:
        raise FeatpatchError(
            "metric 'sequence_log_prob_diff' compares correct with wrong answers, and a pair has no wrong answers: "
            "expected at least one; give wrong=..., or use metric='sequence_log_prob'"
        )
    return pair.answers
