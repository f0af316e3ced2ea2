"""The QK fix of AtP*: the effect of queries and keys on their heads' output is exact; downstream of it, a gradient is used.

Queries of different heads and positions act on different rows of the attention pattern, so all of them are exchanged in one
pass of their layer. Keys are exchanged one requested position at a time, for all later queries and all heads at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from featpatch import sites as hooks
from featpatch.attribution.gradients import SOURCE, PairGradients
from featpatch.attribution.part import Found, Part, product
from featpatch.lens import Lens
from featpatch.pairs.spans import Wanted
from featpatch.patch import Direction, Node


@dataclass(frozen=True)
class QueryKeyPart(Part):
    """The queries, or the keys, of some layers.

    Attributes:
        lens: the model.
        layers: the layers.
        name: `"q"` or `"k"`.
    """

    lens: Lens
    layers: Sequence[int]
    name: str

    @property
    def reads(self) -> list[str]:
        """The hook points of the queries or keys."""
        return [hooks.component(layer, self.name) for layer in self.layers]

    @property
    def sites(self) -> list[str]:
        """The hook points of z in the layers."""
        return [hooks.component(layer, "z") for layer in self.layers]

    def found(self, of_pair: PairGradients, direction: Direction, wanted: Wanted) -> Found:
        """Estimate the effect of each head's query or key at every requested position, in all layers."""
        tokens = torch.tensor([of_pair.tokens(direction)])
        _, entering = self.lens.read_entering(tokens, [], self.layers)
        blocks = [_Block(self.lens, layer, self.name, of_pair, direction, entering[layer], tokens) for layer in self.layers]
        return Found.of([change for block in blocks for change in block.changes(wanted)])


@dataclass(frozen=True)
class _Block:
    """One layer of a pair's base run.

    Attributes:
        lens: the model.
        layer: the layer.
        name: `"q"` or `"k"`.
        of_pair: activations and gradients of the pair.
        direction: the direction that patches the run.
        entering: the residual stream that enters the layer, `[1, pos, d_model]`.
        tokens: the token ids of the run, `[1, pos]`.
    """

    lens: Lens
    layer: int
    name: str
    of_pair: PairGradients
    direction: Direction
    entering: torch.Tensor
    tokens: torch.Tensor

    def changes(self, wanted: Wanted) -> list[tuple[Node, torch.Tensor]]:
        """Return the node and estimated effect `[variants]` of each head at each requested position."""
        base, source = (self.of_pair.activations[way][self._hook] for way in (self.direction, SOURCE[self.direction]))
        differs = (self.of_pair.change(self._hook, self.direction) != 0).any(-1)
        spans = {position: [p for p in span if bool(differs[p].any())] for position, span in wanted.items()}
        spans = {position: span for position, span in spans.items() if span}
        sums = self._queries(source, spans.values()) if self.name == "q" else self._keys(base, source, spans.values())
        changes = []
        for (position, span), effect in zip(spans.items(), sums, strict=True):
            shared = effect.unflatten(1, (differs.shape[1], -1)).sum(2)
            for head in differs[span].any(0).nonzero()[:, 0].tolist():
                changes.append((Node(self._hook, "head", head, position), shared[:, head]))
        return changes

    @property
    def _hook(self) -> str:
        return hooks.component(self.layer, self.name)

    @property
    def _z(self) -> str:
        return hooks.component(self.layer, "z")

    @property
    def _gradient(self) -> torch.Tensor:
        return self.of_pair.gradients[self.direction][self._z]

    def _queries(self, source: torch.Tensor, spans: Collection[list[int]]) -> list[torch.Tensor]:
        """Return the effects of queries, `[variants, heads]` for each span; a query acts only at its own position."""
        by_position = product(self._changed_z(source[None])[0], self._gradient).sum(-1)
        return [by_position[:, span].sum(1) for span in spans]

    def _keys(self, base: torch.Tensor, source: torch.Tensor, spans: Collection[list[int]]) -> list[torch.Tensor]:
        """Return the effects of keys, `[variants, heads]` for each span; the keys of a span are exchanged together."""
        exchanged = base.repeat(len(spans), *(1 for _ in base.shape))
        for row, span in enumerate(spans):
            exchanged[row, span] = source[span]
        return [product(change, self._gradient).sum((1, 3)) for change in self._changed_z(exchanged)]

    def _changed_z(self, values: torch.Tensor) -> torch.Tensor:
        """Return how z changes in the base run with these queries or keys, `[rows, pos, heads, d_head]`."""
        after = self.lens.through(self.layer, self.entering, self.tokens, self._z, {self._hook: values})
        return after - self.of_pair.activations[self.direction][self._z]
