"""What to measure: a metric sees logits only and returns one value per row, without a mean over rows.

Sign convention: larger means closer to the clean behaviour.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError

Metric = Callable[[Float[torch.Tensor, "rows d_vocab"], Sequence[int], Sequence[int]], Float[torch.Tensor, " rows"]]
"""`metric(logits, correct, wrong)`: logits at the answer position, ids of the right and of the wrong answers."""


def logit_diff(
    logits: Float[torch.Tensor, "rows d_vocab"], correct: Sequence[int], wrong: Sequence[int]
) -> Float[torch.Tensor, " rows"]:
    """Mean logit of the correct answers minus mean logit of the wrong ones (Wang et al. 2022, arXiv 2211.00593)."""
    return logits[:, list(correct)].mean(-1) - logits[:, list(wrong)].mean(-1)


@dataclass(frozen=True)
class Measure:
    """A metric with its name.

    Attributes:
        answers_only: whether it reads the logits of the answers alone, so that the others need not be computed.
    """

    name: str
    metric: Metric
    answers_only: bool

    def columns(self, correct: Sequence[int], wrong: Sequence[int]) -> tuple[int, ...] | None:
        """Ids whose logits are needed; None for the whole vocabulary."""
        return (*correct, *wrong) if self.answers_only else None

    def __call__(
        self, logits: Float[torch.Tensor, "rows columns"], correct: Sequence[int], wrong: Sequence[int]
    ) -> Float[torch.Tensor, " rows"]:
        """The metric of logits at the answer position, float64 on the CPU.

        Raises:
            FeatpatchError: the metric doesn't give one finite value per row.
        """
        if self.answers_only:
            n, total = len(correct), len(correct) + len(wrong)
            values = self.metric(logits, range(n), range(n, total))
        else:
            values = self.metric(logits, correct, wrong)
        if not isinstance(values, torch.Tensor):
            raise FeatpatchError(f"the metric gave a {type(values).__name__}: expected a tensor with one value per row")
        if values.shape != (len(logits),):
            raise FeatpatchError(
                f"the metric gave shape {tuple(values.shape)} for {len(logits)} rows: expected one value per row"
            )
        if not torch.isfinite(values).all():
            raise FeatpatchError(
                "the metric gave NaN or an infinite value: expected finite logits; check the model and the metric"
            )
        return values.detach().to("cpu", torch.float64)


MEASURES = {measure.name: measure for measure in (Measure("logit_diff", logit_diff, answers_only=True),)}


def find(metric: str | Metric) -> Measure:
    """The metric of this name, or a function as a metric.

    Raises:
        FeatpatchError: no metric has this name.
    """
    if callable(metric):
        return Measure(getattr(metric, "__name__", repr(metric)), metric, answers_only=False)
    if metric not in MEASURES:
        raise FeatpatchError(
            f"metric {metric!r} is unknown: expected one of {', '.join(MEASURES)}, "
            "or a function of (logits, correct, wrong) that returns one value per row"
        )
    return MEASURES[metric]
