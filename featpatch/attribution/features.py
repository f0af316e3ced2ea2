"""Estimate the effect of every feature, error term and whole activation from a few gradients.

    IE_i = (f_s - f_b)_i (d_i . g),   IE_error = (e_s - e_b) . g,   g = dm/dx at the hook point in the unmodified model

Their sum over all features and the error is exactly (x_s - x_b) . g; the deviation is stored as the completeness residual.
Denoising uses the gradient of the corrupted run, noising that of the clean run.
"""

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

from featpatch.attribution.estimates import Estimates, Estimator, by_pair, estimated, product
from featpatch.attribution.gradients import SOURCE, Gradients, PairGradients
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError
from featpatch.metric_functions import Metric
from featpatch.model.transformer_lens import wrap
from featpatch.nodes import Combine, Direction, Kind, Node
from featpatch.pairs.pair import Positions, Wanted, spans
from featpatch.pairs.pairs import Pairs
from featpatch.sae.codec import Split
from featpatch.sae.dictionary import Dictionary, combined_by, dictionaries, digests
from featpatch.sae.nodes import together


def estimate_features(
    gradients: Gradients,
    saes: Any,
    positions: Positions,
    directions: Sequence[Direction],
    combine: Combine | None,
    *,
    progress: bool,
) -> Effects:
    """Estimate by gradients what `rank_features` measures exactly; it describes the arguments and the result."""
    found = dictionaries(gradients.lens, saes)
    about: dict[str, Any] = {"saes": digests(found)}
    if combined := combined_by(found, combine):
        about["combine"] = combined
    if put := [name for name, meaning in combined.items() if meaning == "set"]:
        raise FeatpatchError(
            f"estimates for {put[0]!r}, whose patches set several hook points: expected patches that add, because what a patch "
            "sets stops what comes from below, which no gradient of the unmodified model tells; pass combine='add', or "
            "method='exact'"
        )
    return estimated(gradients, [FeatureEstimator(d) for d in found], about, positions, directions, progress=progress)


@dataclass(frozen=True)
class FeatureEstimator(Estimator):
    """An estimator for the features and the error of a dictionary, and the whole activations that it writes.

    Attributes:
        dictionary: the dictionary.
    """

    dictionary: Dictionary

    @property
    def reads(self) -> list[str]:
        """The hook points that the dictionary reads."""
        return list(self.dictionary.inputs)

    @property
    def sites(self) -> list[str]:
        """The hook points that the dictionary writes."""
        return list(self.dictionary.outputs)

    def estimates(self, of_pair: PairGradients, direction: Direction, wanted: Wanted) -> Estimates:
        """Estimate the effects of features, all features, error and whole activation at every requested position."""
        dictionary = self.dictionary
        split = of_pair.split(dictionary)
        b, s = split[direction], split[SOURCE[direction]]
        gradients = [of_pair.gradients[direction][site].flatten(2).to(b.error) for site in dictionary.outputs]
        g = torch.cat(gradients, dim=-1)
        position, feature = (s.features - b.features)[0].nonzero(as_tuple=True)
        along = _along(dictionary, b, s, position, feature, g)
        activations = [of_pair.change(site, direction).flatten(1).to(g.device) for site in dictionary.outputs]
        sums: dict[tuple[Kind, str], torch.Tensor] = {
            ("all_features", dictionary.name): dictionary.change(b, s, features=True)[0],
            ("error", dictionary.name): dictionary.change(b, s, error=True)[0],
            ("activation", ""): torch.cat(activations, dim=-1),
        }
        across = [together(dictionary)] if len(dictionary.outputs) > 1 else []
        changes: list[tuple[Node, torch.Tensor]] = []
        worst = 0.0
        for name, span in wanted.items():
            rows = torch.tensor([p for p in span if p >= of_pair.first], dtype=torch.long, device=g.device)
            here = torch.isin(position, rows)
            features, number = feature[here].unique(return_inverse=True)
            single = g.new_zeros(len(g), len(features)).index_add_(1, number, along[:, here])
            nodes = [dictionary.node(number, name) for number in features.tolist()]
            changes += zip(nodes, single.unbind(1), strict=True)
            whole = {kind: dictionary.by_output(product(change[rows], g[:, rows])) for (kind, _), change in sums.items()}
            for (kind, owner), change in sums.items():
                of_site = {site: bool(part.any()) for site, part in dictionary.by_output(change[rows]).items()}
                parts = [(site, whole[kind][site].sum((1, 2))) for site, differs in of_site.items() if differs]
                parts += [(site, torch.stack([part for _, part in parts]).sum(0)) for site in across if parts]
                changes += [(Node(site, kind, None, name, owner), part) for site, part in parts]
            left = single.sum(1) + sum(part.sum((1, 2)) for part in whole["error"].values())
            left = left - sum(part.sum((1, 2)) for part in whole["activation"].values())
            worst = max(worst, float(left.abs().max()))
        return Estimates.of(changes, worst)


def _along(
    dictionary: Dictionary,
    base: Split,
    source: Split,
    position: Int[torch.Tensor, " entries"],
    feature: Int[torch.Tensor, " entries"],
    g: Float[torch.Tensor, "variants pos d"],
) -> Float[torch.Tensor, "variants entries"]:
    """Return (f_s - f_b)_i (d_i . g) or, if features have no fixed direction, the change that each makes alone times g."""
    if not dictionary.behaviour.linear:
        moved = dictionary.moved(base, source, position, feature)
        return (moved.to(g) * g[:, position]).sum(2)
    several, number = feature.unique(return_inverse=True)
    directions = dictionary.directions(several.cpu()).to(g)
    change = (source.features - base.features)[0, position, feature].to(g)
    if dictionary.behaviour.scaled:
        change = change * dictionary.gains(base)[position].to(g)
    return change * torch.stack([(directions[number] * of_run[position]).sum(1) for of_run in g])


def estimation_time(
    model: Any, saes: Any, pairs: Pairs, positions: Positions, directions: Sequence[Direction], metric: str | Metric
) -> float | None:
    """Return the seconds that estimates of features will take, extrapolated from one pair after a warm-up.

    The result is None if the metric has no gradient or a gradient of zero.
    """
    estimators = [FeatureEstimator(dictionary) for dictionary in dictionaries(wrap(model), saes)]
    seconds = 0.0
    try:
        for _ in ("warm-up", "timed"):
            start = time.perf_counter()
            gradients = Gradients(model, pairs[:1], metric=metric, keep=False)
            ways = gradients.check_directions(directions)
            deque(by_pair(gradients, estimators, [spans(pairs[0], positions)], ways), maxlen=0)
            seconds = time.perf_counter() - start
    except FeatpatchError:
        return None
    return seconds * len(pairs)
