"""How much of a feature's change a writer writes: by encoding with and without it, which is right for any encoder.

    contribution = 1/2 [ f(x_b + d) - f(x_b)  +  f(x_s) - f(x_s - d) ]        d: change of what the writer writes

Base b is the corrupted run and source s the clean one, as in denoising; for noising both it and the feature's change turn their
sign, and the share stays. The contribution is `d . w_enc` where the encoder is linear, or the feature is on in all four places,
and then the shares of all writers add up to 1. Elsewhere (thresholds, TopK, norms) they need not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from featpatch.comparison.writers import Writer, Writers, changes, rounding
from featpatch.errors import FeatpatchError
from featpatch.lens import Dictionary
from featpatch.pairs import Pair, Pairs
from featpatch.patch import Position

VALUES = 2**23
"""Feature values that are encoded together."""


@dataclass(frozen=True)
class Question:
    """Features `[features]` of a dictionary that reads the stream at a position, and writers before it.

    `complete` says that the writers are all that there are.
    """

    dictionary: Dictionary
    position: Position
    writers: tuple[Writer, ...]
    features: Int[torch.Tensor, " features"]
    complete: bool = False


@dataclass(frozen=True)
class Contributions:
    """In units of a feature's activation, summed over the position's tokens, means over pairs.

    A feature may rise in one pair and fall in another; in each, a contribution counts as positive where it has the sign of the
    feature's own change.

    Attributes:
        contribution: `[writers, features]`.
        change: size of the features' own change, `[features]`.
        changed: which writers change in some pair, `[writers]`.
    """

    contribution: NDArray[np.float64]
    change: NDArray[np.float64]
    changed: NDArray[np.bool_]

    @property
    def share(self) -> NDArray[np.float64]:
        """Contribution over change, `[writers, features]`; NaN where the change is 0."""
        return self.contribution / np.where(self.change == 0, np.nan, self.change)


@torch.no_grad()
def measure(writers: Writers, pairs: Pairs, questions: Sequence[Question]) -> list[Contributions]:
    """Contributions by question; both prompts of every pair are run once.

    Raises:
        FeatpatchError: the writers' changes do not add up to that of the stream.
    """
    lens = writers.lens
    hooks = sorted({hook for q in questions for hook in (q.dictionary.reads, *(writer.site for writer in q.writers))})
    found = [
        Contributions(np.zeros((len(q.writers), len(q.features))), np.zeros(len(q.features)), np.zeros(len(q.writers), bool))
        for q in questions
    ]
    for pair in pairs if hooks else ():
        runs = lens.read(torch.tensor([pair.corrupted, pair.clean]), hooks)
        change = changes(runs)
        for question, sums in zip(questions, found, strict=True):
            where = _where(pair, question.position, causal=lens.causal)
            if not where or not question.writers:
                continue
            at = {writer.site: change[writer.site][where] for writer in question.writers}
            delta = torch.stack([writers.output(writer, at) for writer in question.writers])
            stream = runs[question.dictionary.reads]
            if question.complete:
                _check_sum(question.dictionary.reads, stream, delta, change[question.dictionary.reads][where], rounding(lens))
            contribution, own = contributions(question.dictionary, stream, delta, where, question.features)
            sums.contribution[:] += (contribution * own.sign()).numpy() / len(pairs)
            sums.change[:] += own.abs().numpy() / len(pairs)
            sums.changed[:] |= delta.flatten(1).ne(0).any(1).cpu().numpy()
    return found


def contributions(
    dictionary: Dictionary,
    stream: Float[torch.Tensor, "2 pos d_model"],
    delta: Float[torch.Tensor, "writers where d_model"],
    where: list[int],
    features: Int[torch.Tensor, " features"],
) -> tuple[Float[torch.Tensor, "writers features"], Float[torch.Tensor, " features"]]:
    """The contributions of writers to features, and the features' own change, in one pair, summed over the positions `where`.

    An encoder that looks at earlier positions sees them as they are in the run.
    """
    base, source = stream.to(delta.dtype)
    if dictionary.behaviour.rowwise:
        base, source, shift, kept = base[where], source[where], delta, list(range(len(where)))
    else:
        shift, kept = delta.new_zeros(len(delta), *base.shape), where
        shift[:, where] = delta

    def encoded(x: torch.Tensor) -> torch.Tensor:
        return dictionary.codec.encode(x).features[:, kept][..., features].cpu().double().sum(1)

    before, after = encoded(torch.stack([base, source]))
    some = max(1, VALUES // (len(base) * dictionary.d_sae))
    added = torch.cat([encoded(base + part) for part in shift.split(some)])
    left = torch.cat([encoded(source - part) for part in shift.split(some)])
    return (added - before + after - left) / 2, after - before


def _where(pair: Pair, position: Position, *, causal: bool) -> list[int]:
    """The tokens that a position stands for and that can differ; none where a shorter pair has no such index."""
    if isinstance(position, int) and position >= len(pair):
        return []
    return [token for token in pair.positions(position) if token >= pair.first_difference or not causal]


def _check_sum(reads: str, stream: torch.Tensor, delta: torch.Tensor, change: torch.Tensor, rounding: float) -> None:
    off = (delta.sum(0) - change).abs().max()
    if not off <= 4 * rounding * torch.maximum(stream.abs().max(), delta.abs().max()):
        raise FeatpatchError(
            f"what blocks write and the stream at {reads!r} differ by {float(off):.3g}, of a change of "
            f"{float(change.abs().max()):.3g}: expected a stream that heads and MLPs add to as they are; compare the tables "
            "without model, saes and pairs"
        )
