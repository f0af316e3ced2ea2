"""Writers to the residual stream, and their contributions to the change of a feature.

Contributions are measured by encoding with and without a writer's change:

    contribution = 1/2 [ f(x_b + d) - f(x_b)  +  f(x_s) - f(x_s - d) ]        d: change of what the writer writes

This definition holds for any encoder. Base b is the corrupted run and source s the clean run, as in denoising; in noising both
the contribution and the feature's change have the opposite sign, so that the share is the same. If the encoder is linear, or
the feature is active at all four points, the contribution is `d . w_enc` and the shares of all writers add up to 1. Otherwise
(thresholds, TopK, norms) they need not.

Writers are the initial value before layer 0, attention heads through W_O, and MLPs. If a nonlinear step follows W_O (a norm of
the attention output, as in Gemma 2), the outputs of the heads do not add up to what the layer's attention writes; the attention
of that layer is then a single writer. This is measured, not derived from the architecture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray

from featpatch import sites
from featpatch.errors import FeatpatchError
from featpatch.model.lens import Lens
from featpatch.model.projections import rounding, wide
from featpatch.nodes import Position
from featpatch.pairs.pair import Pair
from featpatch.pairs.pairs import Pairs
from featpatch.sae.dictionary import Dictionary


@dataclass(frozen=True)
class Writer:
    """A writer to the residual stream, with fields as in `Node`: an activation that is added to it, or a head."""

    site: str
    kind: str
    index: int | None = None


@dataclass(frozen=True)
class Writers:
    """The writers to the residual stream of a model.

    Attributes:
        lens: the model.
        weights: W_O `[heads, d_head, d_model]` of each layer; None if the heads do not add up or the weights are quantised.
    """

    lens: Lens
    weights: tuple[torch.Tensor | None, ...]

    @classmethod
    def of(cls, lens: Lens, pair: Pair) -> "Writers":
        """Find the writers by running the prompts of one pair.

        The sum of the heads through W_O is compared with what attention adds, both without their means, which differ by a bias.
        """
        hooks = [(sites.component(layer, "z"), sites.component(layer, "attn_out")) for layer in range(lens.n_layers)]
        runs = lens.read(torch.tensor([pair.corrupted, pair.clean]), [hook for both in hooks for hook in both])
        found: list[torch.Tensor | None] = []
        for layer, both in enumerate(hooks):
            z, out = (wide(runs[hook]).flatten(2).flatten(0, 1) for hook in both)
            readable = lens.output_weight(layer)
            if readable is None:
                found.append(None)
                continue
            weight = wide(readable)
            heads = z @ weight.flatten(0, 1)
            differ = ((heads - heads.mean(0)) - (out - out.mean(0))).abs().max()
            adds_up = bool(differ <= rounding(lens) * torch.maximum(heads.abs().max(), out.abs().max()))
            found.append(weight if adds_up else None)
        return cls(lens, tuple(found))

    def before(self, reads: str) -> list[Writer]:
        """Return the writers upstream of a hook point of the residual stream; the first is the stream's initial value."""
        found = [Writer(sites.resid_pre(0), "activation")]
        for layer, weight in enumerate(self.weights):
            if weight is None:
                found.append(Writer(sites.component(layer, "attn_out"), "activation"))
            else:
                found += [Writer(sites.component(layer, "z"), "head", head) for head in range(len(weight))]
            if self.lens.has_mlp(layer):
                found.append(Writer(sites.component(layer, "mlp_out"), "activation"))
        return [writer for writer in found if sites.reaches(writer.site, reads)]

    def output(self, writer: Writer, change: Mapping[str, torch.Tensor]) -> Float[torch.Tensor, "pos d_model"]:
        """Return the change in what a writer writes, given the changes `[pos, ...]` of the activations by hook point."""
        whole = change[writer.site]
        weight = self.weights[sites.layer_of(writer.site)]
        if writer.kind != "head" or weight is None:
            return whole
        return whole.reshape(len(whole), len(weight), -1)[:, writer.index] @ weight[writer.index].to(whole)


def changes(runs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the change from the corrupted to the clean run of activations `[2, pos, ...]`, in float32 or wider."""
    return {hook: wide(values[1]) - wide(values[0]) for hook, values in runs.items()}


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


def _check_sum(reads: str, stream: torch.Tensor, delta: torch.Tensor, change: torch.Tensor, share: float) -> None:
    off = (delta.sum(0) - change).abs().max()
    if not off <= 4 * share * torch.maximum(stream.abs().max(), delta.abs().max()):
        raise FeatpatchError(
            f"the sum of what layers write and the residual stream at {reads!r} differ by {float(off):.3g}, of a change of "
            f"{float(change.abs().max()):.3g}: expected a residual stream to which heads and MLPs are added unchanged; "
            "compare the tables without model, saes and pairs"
        )
