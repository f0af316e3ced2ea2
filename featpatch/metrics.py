"""What to measure: a metric sees logits only and returns one value per row, without a mean over rows.

Sign convention: larger means closer to the clean behaviour.
"""

from collections.abc import Callable, Sequence

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


METRICS: dict[str, Metric] = {"logit_diff": logit_diff}


def find(metric: str | Metric) -> tuple[str, Metric]:
    """The name and the function of a metric that is given by either.

    Raises:
        FeatpatchError: no metric has this name.
    """
    if callable(metric):
        return getattr(metric, "__name__", repr(metric)), metric
    if metric not in METRICS:
        raise FeatpatchError(
            f"metric {metric!r} is unknown: expected one of {', '.join(METRICS)}, "
            "or a function of (logits, correct, wrong) that returns one value per row"
        )
    return metric, METRICS[metric]
