"""Contributions of writers to the change of a feature, measured by encoding with and without a writer's change.

    contribution = 1/2 [ f(x_b + d) - f(x_b)  +  f(x_s) - f(x_s - d) ]        d: change of what the writer writes

This definition holds for any encoder. Base b is the corrupted run and source s the clean run, as in denoising; in noising both
the contribution and the feature's change have the opposite sign, so that the share is the same. If the encoder is linear, or
the feature is active at all four points, the contribution is `d . w_enc` and the shares of all writers add up to 1. Otherwise
(thresholds, TopK, norms) they need not.
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
"""The largest number of feature values that are encoded together."""


@dataclass(frozen=True)
class Question:
    """A request for the contributions of some writers to some features.

    Attributes:
        dictionary: the dictionary of the features, which reads the residual stream.
        position: the position at which it is read.
        writers: writers upstream of the dictionary.
        features: the indices of the features, `[features]`.
        complete: whether these are all writers to the residual stream upstream of the dictionary.
    """

    dictionary: Dictionary
    position: Position
    writers: tuple[Writer, ...]
    features: Int[torch.Tensor, " features"]
    complete: bool = False


@dataclass(frozen=True)
class Contributions:
    """Contributions of writers to features, in units of the feature's activation, summed over tokens and averaged over pairs.

    A feature may rise in one pair and fall in another; in each pair, a contribution counts as positive if it has the sign of
    the feature's own change.

    Attributes:
        contribution: the contribution of each writer to each feature, `[writers, features]`.
        change: the absolute change of each feature, `[features]`.
        changed: a mask of the writers that change in some pair, `[writers]`.
    """

    contribution: NDArray[np.float64]
    change: NDArray[np.float64]
    changed: NDArray[np.bool_]

    @property
    def share(self) -> NDArray[np.float64]:
        """The contribution divided by the change of the feature, `[writers, features]`; NaN if the change is 0."""
        return self.contribution / np.where(self.change == 0, np.nan, self.change)


@torch.no_grad()
def measure(writers: Writers, pairs: Pairs, questions: Sequence[Question]) -> list[Contributions]:
    """Measure the contributions for each question, with one run of both prompts of every pair.

    Raises:
        FeatpatchError: the changes of all writers do not add up to the change of the residual stream.
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
    """Return the contributions of writers to features and the features' own change in one pair, summed over `where`.

    An encoder that also reads earlier positions gets their activations unchanged from the run.

    Args:
        dictionary: the dictionary of the features.
        stream: the residual stream in the corrupted and the clean run.
        delta: the change in what each writer writes at the positions `where`.
        where: the token positions.
        features: the indices of the features.
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
    """Return the tokens that a position stands for and that can differ; none if the pair is too short for the index."""
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
