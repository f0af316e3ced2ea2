"""Metrics of answers of several tokens, which are read at several positions.

The log-probability of such an answer is read before each of its tokens, teacher-forced: the earlier tokens of the answer follow
the prompt, in both the clean and the corrupted run.

    log p(a | prompt) = sum_i log p(a_i | prompt, a_1 ... a_(i-1))
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError
from featpatch.metrics import Measures, together
from featpatch.pairs.pair import Pair, Reading, check_answers

ByReading = Float[torch.Tensor, "readings patches engine_metrics"]
"""The values of the engine's metrics at each reading, for each patch."""


Combined = Float[torch.Tensor, "patches metrics"]
"""The values of the requested metrics for each patch, combined over readings."""


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
        """Return the correct answers and, if a metric needs them, the wrong ones; raise a FeatpatchError if it lacks these."""
        if "sequence_log_prob_diff" in self.names and not pair.answers[1]:
            raise FeatpatchError(
                "metric 'sequence_log_prob_diff' compares correct with wrong answers, and a pair has no wrong answers: "
                "expected at least one; give wrong=..., or use metric='sequence_log_prob'"
            )
        return pair.answers if "sequence_log_prob_diff" in self.names else pair.answers[:1]
