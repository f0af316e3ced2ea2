"""What to measure: a metric sees logits only and returns one value per row, without a mean over rows.

Sign convention: larger means closer to the clean behaviour. So distances and ranks are negative.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError

Logits = Float[torch.Tensor, "rows d_vocab"]
Values = Float[torch.Tensor, " rows"]

Metric = Callable[[Logits, Sequence[int], Sequence[int]], Values]
"""`metric(logits, correct, wrong)`: logits at the answer position, ids of the right and of the wrong answers."""

FromClean = Callable[[Logits, Float[torch.Tensor, "1 d_vocab"]], Values]
"""`metric(logits, clean)`: with the logits of the pair's clean run."""

Needs = Literal["answers", "vocabulary", "clean"]
"""Which logits a metric reads: those of the answers, all, or all and those of the clean run."""


def logit_diff(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Mean logit of the correct answers minus mean logit of the wrong ones (Wang et al. 2022, arXiv 2211.00593)."""
    return logits[:, list(correct)].mean(-1) - logits[:, list(wrong)].mean(-1)


def prob_diff(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Probability of all correct answers together minus that of all wrong ones (Hanna et al. 2023, arXiv 2305.00586)."""
    p = _log_softmax(logits).exp()
    return p[:, list(correct)].sum(-1) - p[:, list(wrong)].sum(-1)


def prob(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Probability of all correct answers together."""
    return log_prob(logits, correct, wrong).exp()


def log_prob(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Natural logarithm of the probability of all correct answers together."""
    return _log_softmax(logits)[:, list(correct)].logsumexp(-1)


def neg_rank(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Minus the number of tokens with a larger logit than the best correct answer; 0 where that one comes first."""
    return -(logits > logits[:, list(correct)].amax(-1, keepdim=True)).sum(-1).double()


def accuracy(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """1 where no token has a larger logit than the best correct answer, else 0."""
    return (neg_rank(logits, correct, wrong) == 0).double()


def neg_kl(logits: Logits, clean: Float[torch.Tensor, "1 d_vocab"]) -> Values:
    """-KL(clean || patched) over the vocabulary, in nats: 0 for the clean run. Its gradient is zero there."""
    p, q = _log_softmax(clean), _log_softmax(logits)
    return (p.exp() * (q - p)).sum(-1)


@dataclass(frozen=True)
class Measure:
    """A metric with its name.

    Attributes:
        needs: which logits it reads; those that it doesn't need are not computed.
    """

    name: str
    metric: Metric | FromClean
    needs: Needs

    def columns(self, correct: Sequence[int], wrong: Sequence[int]) -> tuple[int, ...] | None:
        """Ids whose logits are needed; None for the whole vocabulary.

        Raises:
            FeatpatchError: the metric compares right answers with wrong ones, and there are no wrong ones.
        """
        if self.metric in (logit_diff, prob_diff) and not wrong:
            raise FeatpatchError(
                f"metric {self.name!r} compares the correct answers with wrong ones, and a pair has no wrong ones: give "
                "wrong=..., or a metric of the correct answers, such as 'log_prob', 'prob', 'neg_rank' or 'accuracy'"
            )
        return (*correct, *wrong) if self.needs == "answers" else None

    def raw(
        self,
        logits: Float[torch.Tensor, "rows columns"],
        correct: Sequence[int],
        wrong: Sequence[int],
        clean: Float[torch.Tensor, "1 d_vocab"] | None = None,
    ) -> torch.Tensor:
        """What the function makes of logits at the answer position: unchecked, on their device, with its gradient."""
        if self.needs == "clean":
            assert clean is not None
            return cast(FromClean, self.metric)(logits, clean)
        if self.needs == "answers":
            n, total = len(correct), len(correct) + len(wrong)
            return cast(Metric, self.metric)(logits, range(n), range(n, total))
        return cast(Metric, self.metric)(logits, correct, wrong)

    def __call__(
        self,
        logits: Float[torch.Tensor, "rows columns"],
        correct: Sequence[int],
        wrong: Sequence[int],
        clean: Float[torch.Tensor, "1 d_vocab"] | None = None,
    ) -> Float[torch.Tensor, " rows"]:
        """The metric of logits at the answer position, float64 on the CPU.

        Raises:
            FeatpatchError: the metric doesn't give one finite value per row.
        """
        values = self.raw(logits, correct, wrong, clean)
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


@dataclass(frozen=True)
class Measures:
    """Metrics that are taken of the same logits, one column each."""

    parts: tuple[Measure, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the metrics, in the order of the columns."""
        return tuple(part.name for part in self.parts)

    @property
    def reads_clean(self) -> bool:
        """Whether one of them reads the logits of the clean run."""
        return any(part.needs == "clean" for part in self.parts)

    def columns(self, correct: Sequence[int], wrong: Sequence[int]) -> tuple[int, ...] | None:
        """Ids whose logits are needed by all together; None for the whole vocabulary.

        Raises:
            FeatpatchError: see `Measure.columns`.
        """
        whole = [part.columns(correct, wrong) is None for part in self.parts]
        return None if any(whole) else (*correct, *wrong)

    def __call__(
        self,
        logits: Float[torch.Tensor, "rows columns"],
        correct: Sequence[int],
        wrong: Sequence[int],
        clean: Float[torch.Tensor, "1 d_vocab"] | None = None,
    ) -> Float[torch.Tensor, "rows metrics"]:
        """Every metric of logits at the answer position, float64 on the CPU.

        Raises:
            FeatpatchError: a metric doesn't give one finite value per row.
        """
        answers = logits if self.columns(correct, wrong) is not None else logits[:, [*correct, *wrong]]
        values = [part(answers if part.needs == "answers" else logits, correct, wrong, clean) for part in self.parts]
        return torch.stack(values, dim=1)


SEQUENCES = ("sequence_log_prob", "sequence_log_prob_diff")
"""Metrics of whole answers, read at several places: log-probability of all right answers together, and that minus the
log-probability of all wrong ones together."""

MEASURES = {
    measure.name: measure
    for measure in (
        Measure("logit_diff", logit_diff, "answers"),
        Measure("prob_diff", prob_diff, "vocabulary"),
        Measure("prob", prob, "vocabulary"),
        Measure("log_prob", log_prob, "vocabulary"),
        Measure("neg_kl", neg_kl, "clean"),
        Measure("neg_rank", neg_rank, "vocabulary"),
        Measure("accuracy", accuracy, "vocabulary"),
    )
}


def find(metric: str | Metric) -> Measure:
    """The metric of this name, or a function as a metric.

    Raises:
        FeatpatchError: no metric has this name.
    """
    if callable(metric):
        return Measure(getattr(metric, "__name__", repr(metric)), metric, "vocabulary")
    if metric not in MEASURES:
        raise FeatpatchError(
            f"metric {metric!r} is unknown: expected one of {', '.join((*MEASURES, *SEQUENCES))}, "
            "or a function of (logits, correct, wrong) that returns one value per row"
        )
    return MEASURES[metric]


def together(metric: "str | Metric | Sequence[str | Metric]") -> Measures:
    """One metric, or several.

    Raises:
        FeatpatchError: no metric, an unknown one, or two of the same name.
    """
    several = [metric] if isinstance(metric, str) or callable(metric) else list(metric)
    parts = tuple(map(find, several))
    names = [part.name for part in parts]
    if not names or len(set(names)) < len(names):
        raise FeatpatchError(f"metric={names}: expected at least one, each name once; give functions names of their own")
    return Measures(parts)


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """In float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
