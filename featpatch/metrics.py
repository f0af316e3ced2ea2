"""Metrics: functions of the logits that return one value per row, without a mean over rows; and their gap.

Larger values mean closer to the clean behaviour, so distances and ranks are negative. The gap of a metric is its value in the
clean run minus that in the corrupted run; effects are shares of it, so it must not be near zero.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from featpatch.errors import FeatpatchError, FeatpatchWarning, closest
from featpatch.metric_functions import FORMS, Logits, Metric, Values, called, name_of, reads_one_prompt

FromClean = Callable[[Logits, Float[torch.Tensor, "1 d_vocab"]], Values]
"""A metric `metric(logits, clean)` that compares logits with those of the pair's clean run."""

Needs = Literal["answers", "vocabulary", "clean"]
"""The logits that a metric reads: those of the answers, those of the vocabulary, or those of the vocabulary and of the clean
run."""


def logit_diff(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Return the mean logit of the correct answers minus that of the wrong ones (Wang et al. 2022, arXiv 2211.00593)."""
    return logits[:, list(correct)].mean(-1) - logits[:, list(wrong)].mean(-1)


def logit(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Return the mean logit of the correct answers."""
    return logits[:, list(correct)].mean(-1)


def prob_diff(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Return the probability of all correct answers minus that of all wrong ones (Hanna et al. 2023, arXiv 2305.00586)."""
    p = _log_softmax(logits).exp()
    return p[:, list(correct)].sum(-1) - p[:, list(wrong)].sum(-1)


def prob(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Return the total probability of the correct answers."""
    return log_prob(logits, correct, wrong).exp()


def log_prob(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Return the natural logarithm of the total probability of the correct answers."""
    return _log_softmax(logits)[:, list(correct)].logsumexp(-1)


def neg_rank(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Return minus the number of tokens with a larger logit than the best correct answer.

    It is 0 if the best correct answer comes first.
    """
    return -(logits > logits[:, list(correct)].amax(-1, keepdim=True)).sum(-1).double()


def accuracy(logits: Logits, correct: Sequence[int], wrong: Sequence[int]) -> Values:
    """Return 1 if no token has a larger logit than the best correct answer, else 0."""
    return (neg_rank(logits, correct, wrong) == 0).double()


def neg_kl(logits: Logits, clean: Float[torch.Tensor, "1 d_vocab"]) -> Values:
    """Return -KL(clean || patched) over the vocabulary, in nats: 0 for the clean run, where its gradient is zero."""
    p, q = _log_softmax(clean), _log_softmax(logits)
    return (p.exp() * (q - p)).sum(-1)


@dataclass(frozen=True)
class Measure:
    """A metric with its name.

    Attributes:
        name: the name of the metric.
        metric: the function.
        needs: the logits that it reads; other logits are not computed.
        of_answers: whether it reads the answers of a pair.
        by_token: whether it reads answers of several tokens; `metric` is then applied to one token at a time.
    """

    name: str
    metric: Metric | FromClean
    needs: Needs
    of_answers: bool = True
    by_token: bool = False

    def columns(self, correct: Sequence[int], wrong: Sequence[int]) -> tuple[int, ...] | None:
        """Return the token ids whose logits are needed; None for the whole vocabulary.

        Raises:
            FeatpatchError: the metric compares correct answers with wrong ones, and there are no wrong ones.
        """
        if self.metric in (logit_diff, prob_diff) and not wrong:
            raise FeatpatchError(
                f"metric {self.name!r} compares correct with wrong answers, and a pair has no wrong answers: expected at "
                "least one; give wrong=..., or use a metric of the correct answers alone, such as 'logit', "
                "'log_prob', 'prob', 'neg_rank' or 'accuracy'"
            )
        return (*correct, *wrong) if self.needs == "answers" else None

    def of(
        self,
        logits: Float[torch.Tensor, "rows columns"],
        correct: Sequence[int],
        wrong: Sequence[int],
        clean: Float[torch.Tensor, "1 d_vocab"] | None = None,
    ) -> torch.Tensor:
        """Compute the metric of logits at the answer position, `[rows]`, on their device, with its gradient.

        Raises:
            FeatpatchError: the metric fails or does not return one finite real number per row.
        """
        if self.needs == "clean":
            assert clean is not None
            values: Any = cast(FromClean, self.metric)(logits, clean)
        elif self.needs == "answers":
            n, total = len(correct), len(correct) + len(wrong)
            values = cast(Metric, self.metric)(logits, range(n), range(n, total))
        else:
            values = cast(Metric, self.metric)(logits, correct, wrong)
        rows = len(logits)
        if not isinstance(values, torch.Tensor):
            raise FeatpatchError(f"metric {self.name!r} returned a {type(values).__name__} for {rows} rows: expected {FORMS}")
        if values.shape != (rows,) or values.is_complex():
            raise FeatpatchError(
                f"metric {self.name!r} returned {values.dtype} of shape {tuple(values.shape)} for {rows} rows: expected one "
                f"real value per row; {FORMS}"
            )
        if not torch.isfinite(values).all():
            raise FeatpatchError(
                f"metric {self.name!r} returned NaN or an infinite value for {rows} rows: expected one finite value per row; "
                "check the model and the metric"
            )
        return values

    def __call__(
        self,
        logits: Float[torch.Tensor, "rows columns"],
        correct: Sequence[int],
        wrong: Sequence[int],
        clean: Float[torch.Tensor, "1 d_vocab"] | None = None,
    ) -> Float[torch.Tensor, " rows"]:
        """Compute the metric as `of` does, without its gradient and as float64 on the CPU."""
        return self.of(logits, correct, wrong, clean).detach().to("cpu", torch.float64)


Metrics = str | Metric | Sequence[str | Metric]
"""A metric, by name or as a function, or several metrics."""


@dataclass(frozen=True)
class Measures:
    """One or several metrics of the same logits, one column each."""

    parts: tuple[Measure, ...]

    @classmethod
    def of(cls, metric: "Metrics | Measures", refused: Collection[str] = (), use: str = "here") -> "Measures":
        """Return one metric, or several that are read from the same logits; validated metrics are returned unchanged.

        Args:
            metric: the metric or metrics.
            refused, use: as in `find`.

        Raises:
            FeatpatchError: there is no metric, `find` rejects one, two have the same name, or metrics of answers of several
                tokens come with others.
        """
        if isinstance(metric, Measures):
            return metric
        several = _several(metric)
        if not several or not all(isinstance(one, str) or callable(one) for one in several):
            raise FeatpatchError(f"metric={metric!r}: expected at least one metric, each the name of a metric or a function")
        parts = tuple(find(one, refused, use) for one in several)
        names = [part.name for part in parts]
        if len(set(names)) < len(names):
            raise FeatpatchError(f"metric={names}: expected each name once; give functions different names")
        if len({part.by_token for part in parts}) > 1:
            raise FeatpatchError(
                f"metric={names}: expected metrics of answers of several tokens ({', '.join(SEQUENCES)}) on their own, because "
                "the others read one token; rank twice"
            )
        return cls(parts)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the metrics, in the order of the columns."""
        return tuple(part.name for part in self.parts)

    @property
    def reads_clean(self) -> bool:
        """Whether any of the metrics reads the logits of the clean run."""
        return any(part.needs == "clean" for part in self.parts)

    @property
    def by_token(self) -> bool:
        """Whether the metrics read answers of several tokens."""
        return any(part.by_token for part in self.parts)

    def columns(self, correct: Sequence[int], wrong: Sequence[int]) -> tuple[int, ...] | None:
        """Return the token ids whose logits any of the metrics needs, as `Measure.columns` does for one."""
        whole = [part.columns(correct, wrong) is None for part in self.parts]
        return None if any(whole) else (*correct, *wrong)

    def __call__(
        self,
        logits: Float[torch.Tensor, "rows columns"],
        correct: Sequence[int],
        wrong: Sequence[int],
        clean: Float[torch.Tensor, "1 d_vocab"] | None = None,
    ) -> Float[torch.Tensor, "rows metrics"]:
        """Compute every metric of logits at the answer position, as float64 on the CPU.

        Raises:
            FeatpatchError: a metric does not return one finite value per row.
        """
        answers = logits if self.columns(correct, wrong) is not None else logits[:, [*correct, *wrong]]
        values = [part(answers if part.needs == "answers" else logits, correct, wrong, clean) for part in self.parts]
        return torch.stack(values, dim=1)


SEQUENCES = {
    name: Measure(name, log_prob, "vocabulary", by_token=True) for name in ("sequence_log_prob", "sequence_log_prob_diff")
}
"""Metrics of answers of several tokens, read at several positions: the log-probability of all correct answers together, and the
same minus the log-probability of all wrong answers together."""

MEASURES = {
    measure.name: measure
    for measure in (
        Measure("logit_diff", logit_diff, "answers"),
        Measure("logit", logit, "answers"),
        Measure("prob_diff", prob_diff, "vocabulary"),
        Measure("prob", prob, "vocabulary"),
        Measure("log_prob", log_prob, "vocabulary"),
        Measure("neg_kl", neg_kl, "clean", of_answers=False),
        Measure("neg_rank", neg_rank, "vocabulary"),
        Measure("accuracy", accuracy, "vocabulary"),
    )
}


def find(metric: str | Metric, refused: Collection[str] = SEQUENCES, use: str = "here") -> Measure:
    """Return the metric with a given name, or a metric function as a `Measure`.

    Args:
        metric: a name, or a function.
        refused: names of metrics that the caller does not support.
        use: where they are not supported, and why, for the error.

    Raises:
        FeatpatchError: no supported metric has this name, or the function does not take the arguments of a metric.
    """
    if callable(metric):
        name = name_of(metric)
        alone = reads_one_prompt(metric, name)
        return Measure(name, partial(called, metric, name, alone), "vocabulary", of_answers=not alone)
    every = MEASURES | SEQUENCES
    measure = every.get(metric) if isinstance(metric, str) else None
    if measure is None or measure.name in refused:
        what = "unknown" if measure is None else f"not supported {use}"
        accepted = ", ".join(name for name in every if name not in refused)
        near = closest(metric, list(every))
        raise FeatpatchError(f"metric {metric!r} is {what}: expected one of {accepted}, or a function {FORMS}{near}")
    return measure


def leading(metric: Metrics) -> str | Metric:
    """Return the first of several metrics, whose table is the main one.

    Raises:
        FeatpatchError: `Measures.of` rejects the metrics.
    """
    Measures.of(metric)
    return _several(metric)[0]


def one_metric(metric: Metrics) -> str | Metric:
    """Return the only metric, given by itself or as a list of one, for functions that compute one metric at a time.

    Raises:
        FeatpatchError: there are several metrics, or none.
    """
    several = _several(metric)
    if len(several) != 1 or not (isinstance(several[0], str) or callable(several[0])):
        raise FeatpatchError(f"metric={metric!r}: expected one name or one function; call this once for each metric")
    return several[0]


def _several(metric: Metrics) -> list[str | Metric]:
    """Return metrics as a list, which is empty for what is neither a name, a function nor a sequence."""
    if isinstance(metric, str) or callable(metric):
        return [metric]
    return list(metric) if isinstance(metric, Sequence) else []


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    """Return the log-softmax over the vocabulary, in float32 at least."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


METRIC = "logit_diff"
"""The default metric."""

NEAR_ZERO, SMALL_GAP, CANCELLED = 1e-3, 0.02, 0.5
"""The shares below which a mean gap is refused, and a pair has no ratio of its own, or is warned of: two of the metric's size,
and one of the mean size of the gaps of pairs."""


def size(clean: NDArray[np.float64], corrupted: NDArray[np.float64]) -> float:
    """Return the size of the metric: the mean of its absolute values in the clean or corrupted runs, the larger one."""
    return float(max(np.abs(clean).mean(), np.abs(corrupted).mean()))


def with_gap(clean: NDArray[np.float64], corrupted: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return a mask of the pairs whose gap is large enough for a ratio, `[pairs]`."""
    return np.abs(clean - corrupted) > NEAR_ZERO * size(clean, corrupted)


def check_gap(metric: str, clean: NDArray[np.float64], corrupted: NDArray[np.float64]) -> None:
    """Raise a FeatpatchError if the mean gap, that of `clean - corrupted`, is too near zero; warn if it is small."""
    gap, values = float(np.mean(clean - corrupted)), f"{clean.mean():.6g} on clean and {corrupted.mean():.6g} on corrupted"
    said = f"{metric} is {values} prompts, a mean gap of {gap:.3g}"
    if abs(gap) <= NEAR_ZERO * size(clean, corrupted):
        raise FeatpatchError(f"{said}: expected a gap large enough to normalise effects by; choose other corruptions")
    if abs(gap) <= max(SMALL_GAP * size(clean, corrupted), CANCELLED * np.abs(clean - corrupted).mean()):
        odd = f"{int(((clean - corrupted) * gap < 0).sum())} of {len(clean)} pairs have a gap of the other sign"
        warnings.warn(f"{said}; {odd}: effects are shares of it; see pairs.check(model)", FeatpatchWarning, stacklevel=5)
