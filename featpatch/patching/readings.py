"""Readings: the positions at which metrics are read in a run, and how several values are combined into one.

Most metrics are read once, at the answer position. The log-probability of an answer of several tokens is read before each of
its tokens, teacher-forced: the earlier tokens of the answer follow the prompt, in both the clean and the corrupted run.

    log p(a | prompt) = sum_i log p(a_i | prompt, a_1 ... a_(i-1))
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError, each
from featpatch.metric_functions import Metric
from featpatch.metrics import SEQUENCES, Measures, one_metric, together
from featpatch.model.facts import check_tokens
from featpatch.model.lens import Lens
from featpatch.pairs.pair import Pair, check_answers
from featpatch.pairs.pairs import Pairs

ByReading = Float[torch.Tensor, "readings patches engine_metrics"]
"""The values of the engine's metrics at each reading, for each patch."""

Combined = Float[torch.Tensor, "patches metrics"]
"""The values of the requested metrics for each patch, combined over readings."""


@dataclass(frozen=True)
class Reading:
    """One position at which logits are read.

    Attributes:
        continuation: tokens that follow the prompt; the logits after the last of them are read.
        correct, wrong: token ids of the answers at that position.
    """

    continuation: tuple[int, ...]
    correct: tuple[int, ...]
    wrong: tuple[int, ...]


@dataclass(frozen=True)
class AtAnswer:
    """Metrics that are read once, from the logits at the answer position.

    Attributes:
        measures: the metrics.
    """

    measures: Measures

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics."""
        return self.measures.names

    def readings(self, pair: Pair) -> list[Reading]:
        """Return a single reading, at the answer position.

        Raises:
            FeatpatchError: if a metric reads one token and the pair's answers have several.
        """
        need = [part.name for part in self.measures.parts if part.of_answers]
        check_answers(pair, need)
        if need and not pair.correct:
            raise FeatpatchError(
                f"its answers {pair.answers} have several tokens, and {', '.join(need)} reads one: expected the metric "
                f"{' or '.join(SEQUENCES)}, or one-token answers"
            )
        return [Reading((), pair.correct, pair.wrong)]

    def combine(self, pair: Pair, values: ByReading) -> Combined:
        """Return the values of the single reading unchanged."""
        return values[0]


@dataclass(frozen=True)
class OfSequences:
    """Teacher-forced log-probabilities of whole answers, which take one forward pass for each token of the answers.

    Attributes:
        names: the names of the metrics.
    """

    names: tuple[str, ...]

    @property
    def measures(self) -> Measures:
        """The metric of a single reading, the log-probability of one token."""
        return together("log_prob")

    def readings(self, pair: Pair) -> list[Reading]:
        """Return one reading for each token of each answer."""
        check_answers(pair, self.names)
        return [
            Reading(answer[:token], (answer[token],), ())
            for answers in self._sides(pair)
            for answer in answers
            for token in range(len(answer))
        ]

    def combine(self, pair: Pair, values: ByReading) -> Combined:
        """Sum the values over tokens, then return the logarithm of the sum of probabilities over answers."""
        left, sides = values[..., 0], []
        for answers in self._sides(pair):
            tokens = [len(answer) for answer in answers]
            parts, left = left[: sum(tokens)].split(tokens), left[sum(tokens) :]
            sides.append(torch.stack([part.sum(0) for part in parts]).logsumexp(0))
        found = {"sequence_log_prob": sides[0], "sequence_log_prob_diff": sides[0] - sides[-1]}
        return torch.stack([found[name] for name in self.names], dim=1)

    def _sides(self, pair: Pair) -> tuple[Sequence[tuple[int, ...]], ...]:
        """Return the correct answers and, if a metric needs them, the wrong answers.

        Raises:
            FeatpatchError: if wrong answers are needed and there are none.
        """
        if "sequence_log_prob_diff" in self.names and not pair.answers[1]:
            raise FeatpatchError(
                "metric 'sequence_log_prob_diff' compares correct with wrong answers, and a pair has no wrong answers: "
                "expected at least one; give wrong=..., or use metric='sequence_log_prob'"
            )
        return pair.answers if "sequence_log_prob_diff" in self.names else pair.answers[:1]


Metrics = str | Metric | Sequence[str | Metric]
"""A metric, by name or as a function, or several metrics."""

Readout = AtAnswer | OfSequences
"""A way to read one or several metrics."""


def readings_of(read: Readout, pairs: Pairs, lens: Lens) -> dict[int, list[Reading]]:
    """Return the readings of every pair, after checking that the model accepts its tokens.

    Raises:
        FeatpatchError: if the metric does not read answers of this kind, a token is unknown, a prompt is too long, or an answer
            would follow the prompt of a model that attends in both directions.
    """
    readings = dict(enumerate(each(read.readings, list(pairs))))
    continuations = {index: [reading.continuation for reading in of_pair] for index, of_pair in readings.items()}
    check_tokens(pairs, lens, continuations)
    if any(any(of_pair) for of_pair in continuations.values()) and not lens.causal:
        raise FeatpatchError(
            f"metric {', '.join(read.names)} reads answers that follow the prompt, but {lens.name!r} has bidirectional "
            "attention: expected a causal model, or one-token answers"
        )
    return readings


def leading(metric: Metrics) -> str | Metric:
    """Return the first of several metrics, whose table is the main one."""
    readout(metric)
    return metric if isinstance(metric, str) or callable(metric) else metric[0]


def readout(metric: Metrics | Readout, refused: Collection[str] = (), use: str = "here", *, single: bool = False) -> Readout:
    """Return how to read one metric or several together.

    Args:
        metric: the metric or metrics; a readout is returned unchanged.
        refused, use: as in `metrics.find`.
        single: whether only one metric is accepted.

    Raises:
        FeatpatchError: if a metric is unknown, there is none, two have the same name, or sequence metrics come with others.
    """
    if isinstance(metric, Readout):
        return metric
    metric = one_metric(metric) if single else metric
    names = [metric] if isinstance(metric, str) or callable(metric) else list(metric) if isinstance(metric, Sequence) else []
    if not names or not all(isinstance(name, str) or callable(name) for name in names):
        raise FeatpatchError(f"metric={metric!r}: expected at least one metric, each the name of a metric or a function")
    whole = [name for name in names if name in SEQUENCES and name not in refused]
    if not whole:
        return AtAnswer(together(names, refused, use))
    if len(whole) < len(names) or len(set(names)) < len(names):
        raise FeatpatchError(
            f"metric={names}: expected each name once, and metrics of answers of several tokens ({', '.join(SEQUENCES)}) on "
            "their own, because the others read one token; rank twice"
        )
    return OfSequences(tuple(str(name) for name in whole))
