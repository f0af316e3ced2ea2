"""Turn the gradients of every pair into a table of first-order estimates."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch.attribution.gradients import INPUT, Gradients, PairGradients
from featpatch.effects.collector import Collector, measured_places, provenance
from featpatch.effects.table import Effects
from featpatch.metrics import check_gap
from featpatch.nodes import Direction, Node
from featpatch.pairs.pair import Positions, Wanted, lengths_if_pooled, spans_of
from featpatch.pairs.pairs import check_counterfactual


@dataclass(frozen=True)
class Estimates:
    """Estimated changes of the metric in one pair.

    Attributes:
        nodes: the nodes that differ between the runs.
        changes: the estimated changes `[variants, nodes]`, float64 on the CPU; one variant for each gradient.
        residual: the largest difference between the sum of features and error and the whole activation; 0 for other nodes.
    """

    nodes: Sequence[Node]
    changes: Float[torch.Tensor, "variants nodes"]
    residual: float = 0.0

    @classmethod
    def of(cls, changes: Sequence[tuple[Node, torch.Tensor]], residual: float = 0.0) -> "Estimates":
        """Collect nodes and their estimated changes, `[variants]` each."""
        values = [change.detach().to("cpu", torch.float64) for _, change in changes]
        return cls([node for node, _ in changes], torch.stack(values, 1) if values else torch.zeros(1, 0), residual)


class Estimator(ABC):
    """An estimator of the effects of some nodes, from activations and gradients."""

    @property
    @abstractmethod
    def reads(self) -> list[str]:
        """The hook points whose activations the estimator needs, in addition to `sites`."""

    @property
    @abstractmethod
    def sites(self) -> list[str]:
        """The hook points whose activations and gradients the estimator needs."""

    @abstractmethod
    def estimates(self, of_pair: PairGradients, direction: Direction, wanted: Wanted) -> Estimates:
        """Return first-order estimates of how patching each node would change the metric in one pair."""


def product(change: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return change `[pos, ...]` times gradients `[variants, pos, ...]`, element by element, in at least float32."""
    kind = torch.promote_types(torch.promote_types(change.dtype, gradient.dtype), torch.float32)
    return change.to(kind) * gradient.to(change.device, kind).reshape(len(gradient), *change.shape)


def estimated(
    gradients: Gradients,
    estimators: Sequence[Estimator],
    about: Mapping[str, Any],
    positions: Positions,
    directions: Sequence[Direction],
    *,
    progress: bool,
    ablated: Callable[[PairGradients], PairGradients] | None = None,
) -> Effects:
    """Return a table with the estimates of all nodes.

    Args:
        gradients: the gradients of the model on the pairs.
        estimators: the estimators of the nodes.
        about: metadata about the nodes, to store with the results.
        positions, directions, progress: as in `rank_features`.
        ablated: for estimates of an ablation, replaces the activations of each pair's corrupted run by ablation values.

    Raises:
        FeatpatchError: a position or direction is unknown, the gap is near zero, or values are taken from corrupted prompts and
            there are none.
    """
    pairs = gradients.pairs if ablated is not None else check_counterfactual(gradients.pairs)
    ways, wanted = gradients.check_directions(directions), spans_of(pairs, positions)
    clean, corrupted = np.zeros((2, len(pairs), 1))
    unsigned = gradients.method == "grad_drop"
    found: dict[int, dict[Direction, dict[Node, float]]] = {}
    complete, whole = 0.0, 0.0
    ends = {site for each in estimators for site in each.sites} if gradients.method == "ig" else {INPUT}
    with tqdm(total=len(pairs), unit="pair", desc="estimating", disable=not progress) as bar:
        for of_pair, of_ways in by_pair(gradients, estimators, wanted, ways, ablated):
            clean[of_pair.index], corrupted[of_pair.index] = of_pair.values["noising"], of_pair.values["denoising"]
            found[of_pair.index] = {}
            for way, together in of_ways.items():
                found[of_pair.index][way] = _combined(together, gradients.lens.n_layers if unsigned else None)
                complete = max([complete, *(estimates.residual for estimates in together)])
                whole = max([whole, *_beside_runs(of_pair, way, ends)])
            bar.update()
    metric, gap = gradients.measure.name, float((clean - corrupted).mean())
    if pairs.has_counterfactual:
        check_gap(metric, clean[:, 0], corrupted[:, 0])
    metadata = {
        "metric": metric,
        "method": gradients.method,
        "steps": gradients.steps,
        "unsigned": unsigned,
        "directions": sorted(ways),
        **measured_places(gradients.lens, pairs, positions, wanted, [site for each in estimators for site in each.sites]),
        "unit": "gap" if pairs.has_counterfactual else "metric",
        **provenance(gradients.lens, pairs),
        **about,
        **lengths_if_pooled(list(pairs), positions),
    }
    if ablated is None:  # all features and the error at their ablation values are not the whole activation at its own
        metadata |= {"completeness_residual": complete / abs(gap), "whole_residual": None if unsigned else whole / abs(gap)}
    return collected(metric, clean, corrupted, found, metadata, unsigned=unsigned)


def collected(
    metric: str,
    clean: NDArray[np.float64],
    corrupted: NDArray[np.float64],
    found: Mapping[int, Mapping[Direction, Mapping[Node, float]]],
    metadata: Mapping[str, Any],
    *,
    unsigned: bool,
) -> Effects:
    """Return a table of effects from estimated changes of the metric.

    Args:
        metric: the name of the metric.
        clean, corrupted: the metric of the unpatched runs, `[pairs, 1]`.
        found: the estimated changes, by pair, direction and node.
        metadata: metadata of the table.
        unsigned: whether the changes have no sign.
    """
    collector, gap = Collector((metric,)), float((clean - corrupted).mean()) or 1.0
    for index, of_way in sorted(found.items()):
        nodes = list(dict.fromkeys(node for changes in of_way.values() for node in changes))
        collector.add(index, nodes, {way: _patched(way, changes, nodes, clean[index], corrupted[index], gap, unsigned)
                                     for way, changes in of_way.items()})  # fmt: skip
    return collector.effects(clean, corrupted, metadata, value="estimate")


def by_pair(
    gradients: Gradients,
    estimators: Sequence[Estimator],
    wanted: Sequence[Wanted],
    ways: Sequence[Direction],
    ablated: Callable[[PairGradients], PairGradients] | None = None,
) -> Iterator[tuple[PairGradients, dict[Direction, list[Estimates]]]]:
    """Yield the gradients of each pair with the estimates of each estimator by direction, grouped by length of prompt."""
    reads, sites = [hook for each in estimators for hook in each.reads], [hook for each in estimators for hook in each.sites]
    for found in gradients.of(reads, sites):
        of_pair = found if ablated is None else ablated(found)
        yield of_pair, {way: [each.estimates(of_pair, way, wanted[of_pair.index]) for each in estimators] for way in ways}


def _combined(together: Sequence[Estimates], layers: int | None) -> dict[Node, float]:
    """Return one value per node; with GradDrop, the sum of absolute values divided by the number of layers minus one."""
    combined: dict[Node, float] = {}
    for estimates in together:
        changes = estimates.changes[0] if layers is None else estimates.changes.abs().sum(0) / (layers - 1)
        combined.update(zip(estimates.nodes, changes.tolist(), strict=True))
    return combined


def _patched(
    way: Direction,
    changes: Mapping[Node, float],
    nodes: Sequence[Node],
    clean: NDArray[np.float64],
    corrupted: NDArray[np.float64],
    gap: float,
    unsigned: bool,
) -> NDArray[np.float64]:
    """Return the metric that patched runs would have, `[nodes, 1]`; unsigned changes are counted as towards the source."""
    values = np.array([changes.get(node, 0.0) for node in nodes])[:, None]
    if unsigned:
        values = values * (np.sign(gap) if way == "denoising" else -np.sign(gap))
    return (corrupted if way == "denoising" else clean) + values


def _beside_runs(of_pair: PairGradients, way: Direction, wanted: set[str]) -> list[float]:
    """Return |estimate - patched run| of the whole activations at the wanted hook points that were patched."""
    left = []
    for site in of_pair.ends[way].keys() & wanted:
        estimate = float(product(of_pair.change(site, way), of_pair.gradients[way][site]).sum())
        left.append(abs(estimate - (of_pair.ends[way][site] - of_pair.values[way])))
    return left
