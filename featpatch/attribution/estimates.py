"""Turn the gradients of every pair into a table of first-order estimates."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from tqdm.auto import tqdm

from featpatch.attribution.gradients import INPUT, Gradients, PairGradients
from featpatch.effects.collector import Collector
from featpatch.effects.statistics import check_gap
from featpatch.effects.table import Effects
from featpatch.model.provenance import provenance
from featpatch.nodes import Direction, Node
from featpatch.pairs.pair import Positions, Wanted, spans


@dataclass(frozen=True)
class Found:
    """Estimated changes of the metric in one pair.

    Attributes:
        nodes: the nodes that differ between the runs.
        changes: the estimated changes `[variants, nodes]`, float64 on the CPU; one variant for each gradient.
        residual: the largest difference between the sum of features and error and the whole activation; 0 for other parts.
    """

    nodes: Sequence[Node]
    changes: Float[torch.Tensor, "variants nodes"]
    residual: float = 0.0

    @classmethod
    def of(cls, changes: Sequence[tuple[Node, torch.Tensor]], residual: float = 0.0) -> "Found":
        """Collect nodes and their estimated changes, `[variants]` each."""
        values = [change.detach().to("cpu", torch.float64) for _, change in changes]
        return cls([node for node, _ in changes], torch.stack(values, 1) if values else torch.zeros(1, 0), residual)


class Part(ABC):
    """Nodes whose effects are estimated together."""

    @property
    @abstractmethod
    def reads(self) -> list[str]:
        """The hook points whose activations the part needs, in addition to `sites`."""

    @property
    @abstractmethod
    def sites(self) -> list[str]:
        """The hook points whose activations and gradients the part needs."""

    @abstractmethod
    def found(self, of_pair: PairGradients, direction: Direction, wanted: Wanted) -> Found:
        """Return first-order estimates of how patching each node would change the metric in one pair."""


def product(change: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return change `[pos, ...]` times gradients `[variants, pos, ...]`, element by element, in at least float32."""
    kind = torch.promote_types(torch.promote_types(change.dtype, gradient.dtype), torch.float32)
    return change.to(kind) * gradient.to(change.device, kind).reshape(len(gradient), *change.shape)


def estimated(
    gradients: Gradients,
    parts: Sequence[Part],
    about: Mapping[str, Any],
    positions: Positions,
    directions: Sequence[Direction],
    *,
    progress: bool,
) -> Effects:
    """Return a table with the estimates of all parts.

    Args:
        gradients: the gradients of the model on the pairs.
        parts: the nodes whose effects are estimated.
        about: metadata about the parts, to store with the results.
        positions, directions, progress: as in `rank_features`.

    Raises:
        FeatpatchError: if a position or direction is unknown, or the gap is near zero.
    """
    pairs = gradients.pairs
    ways, wanted = gradients.check_directions(directions), [spans(pair, positions) for pair in pairs]
    clean, corrupted = np.zeros((2, len(pairs), 1))
    unsigned = gradients.method == "grad_drop"
    found: dict[int, dict[Direction, dict[Node, float]]] = {}
    complete, whole = 0.0, 0.0
    ends = {site for part in parts for site in part.sites} if gradients.method == "ig" else {INPUT}
    with tqdm(total=len(pairs), unit="pair", desc="estimating", disable=not progress) as bar:
        for of_pair, of_ways in by_pair(gradients, parts, wanted, ways):
            clean[of_pair.index], corrupted[of_pair.index] = of_pair.values["noising"], of_pair.values["denoising"]
            found[of_pair.index] = {}
            for way, of_parts in of_ways.items():
                found[of_pair.index][way] = _combined(of_parts, gradients.lens.n_layers if unsigned else None)
                complete = max([complete, *(of_part.residual for of_part in of_parts)])
                whole = max([whole, *_beside_runs(of_pair, way, ends)])
            bar.update()
    metric = gradients.measure.name
    check_gap(metric, clean[:, 0], corrupted[:, 0])
    gap = float((clean - corrupted).mean())
    metadata = {
        "metric": metric,
        "method": gradients.method,
        "steps": gradients.steps,
        "unsigned": unsigned,
        "directions": sorted(ways),
        "positions": positions if isinstance(positions, str) else [*wanted[0]],
        **provenance(gradients.lens, pairs),
        **about,
        "completeness_residual": complete / abs(gap),
        "whole_residual": None if unsigned else whole / abs(gap),
    }
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
    collector, gap = Collector((metric,)), float((clean - corrupted).mean())
    for index, of_way in sorted(found.items()):
        nodes = list(dict.fromkeys(node for changes in of_way.values() for node in changes))
        collector.add(index, nodes, {way: _patched(way, changes, nodes, clean[index], corrupted[index], gap, unsigned)
                                     for way, changes in of_way.items()})  # fmt: skip
    return collector.effects(clean, corrupted, metadata, value="estimate")


def by_pair(
    gradients: Gradients, parts: Sequence[Part], wanted: Sequence[Wanted], ways: Sequence[Direction]
) -> Iterator[tuple[PairGradients, dict[Direction, list[Found]]]]:
    """Yield the gradients of each pair with the estimates of each part by direction, grouped by length of prompt."""
    reads, sites = [hook for part in parts for hook in part.reads], [hook for part in parts for hook in part.sites]
    for of_pair in gradients.of(reads, sites):
        yield of_pair, {way: [part.found(of_pair, way, wanted[of_pair.index]) for part in parts] for way in ways}


def _combined(of_parts: Sequence[Found], blocks: int | None) -> dict[Node, float]:
    """Return one value per node; with GradDrop, the sum of absolute values divided by the number of layers minus one."""
    combined: dict[Node, float] = {}
    for found in of_parts:
        changes = found.changes[0] if blocks is None else found.changes.abs().sum(0) / (blocks - 1)
        combined.update(zip(found.nodes, changes.tolist(), strict=True))
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
