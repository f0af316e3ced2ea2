"""Parts of an estimation: nodes, and the first-order estimates of their effects."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch.attribution.gradients import PairGradients
from featpatch.pairs.spans import Wanted
from featpatch.patch import Direction, Node


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
