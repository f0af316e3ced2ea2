"""Gradient estimates of the effect of components: change times gradient at their hook point, summed over each component.

Queries and keys act through a softmax, which is flat where attention is all or nothing. With the QK fix of AtP* (Kramar et al.
2024, arXiv 2403.00745), their effect on the output of their heads is computed exactly, and only what lies downstream of it is
estimated to first order.

Queries of different heads and positions act on different rows of the attention pattern, so all of them are exchanged in one
pass of their layer. Keys are exchanged one requested position at a time, for all later queries and all heads at once.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from featpatch.attribution.estimates import Estimates, Estimator, estimated, product
from featpatch.attribution.gradients import SOURCE, Gradients, PairGradients
from featpatch.components import check_components_and_layers
from featpatch.effects.table import Effects
from featpatch.model.lens import Lens
from featpatch.nodes import Direction, Node
from featpatch.pairs.pair import Positions, Wanted
from featpatch.sites import WHOLE, by_position, component


@dataclass(frozen=True)
class QueryKeyEstimator(Estimator):
    """An estimator for the queries, or the keys, of some layers.

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
        return [component(layer, self.name) for layer in self.layers]

    @property
    def sites(self) -> list[str]:
        """The hook points of z in the layers."""
        return [component(layer, "z") for layer in self.layers]

    def estimates(self, of_pair: PairGradients, direction: Direction, wanted: Wanted) -> Estimates:
        """Estimate the effect of each head's query or key at every requested position, in all layers."""
        tokens = torch.tensor([of_pair.tokens(direction)])
        _, entering = self.lens.read_entering(tokens, [], self.layers)
        blocks = [_Block(self.lens, layer, self.name, of_pair, direction, entering[layer], tokens) for layer in self.layers]
        return Estimates.of([change for block in blocks for change in block.changes(wanted)])


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
        return component(self.layer, self.name)

    @property
    def _z(self) -> str:
        return component(self.layer, "z")

    @property
    def _gradient(self) -> torch.Tensor:
        return self.of_pair.gradients[self.direction][self._z]

    def _queries(self, source: torch.Tensor, spans: Collection[list[int]]) -> list[torch.Tensor]:
        """Return the effects of queries, `[variants, heads]` for each span; a query acts only at its own position."""
        per_position = product(self._changed_z(source[None])[0], self._gradient).sum(-1)
        return [per_position[:, span].sum(1) for span in spans]

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


def estimate_components(
    gradients: Gradients,
    sites: str | Sequence[str],
    layers: Sequence[int] | None,
    positions: Positions,
    directions: Sequence[Direction],
    *,
    progress: bool,
) -> Effects:
    """Estimate by gradients what `rank_components` measures exactly; it describes the arguments and the result."""
    estimators, about = component_estimators(gradients, sites, layers, positions)
    return estimated(gradients, estimators, about, positions, directions, progress=progress)


def component_estimators(
    gradients: Gradients, sites: str | Sequence[str], layers: Sequence[int] | None, positions: Positions
) -> tuple[list[Estimator], dict[str, Any]]:
    """Return the estimators of some components, and the metadata to store with their estimates."""
    lens = gradients.lens
    names, chosen = check_components_and_layers(sites, layers, positions, lens.n_layers)
    fixed = [name for name in names if name in ("q", "k") and gradients.qk_fix]
    estimators: list[Estimator] = [QueryKeyEstimator(lens, chosen, name) for name in fixed]
    estimators += [ComponentEstimator.of(lens, layer, name) for name in names if name not in fixed for layer in chosen]
    return estimators, {"components": names, "layers": chosen, "qk_fix": gradients.qk_fix}


@dataclass(frozen=True)
class ComponentEstimator(Estimator):
    """An estimator for the activation at one hook point of a layer, as a whole or by head or neuron.

    Attributes:
        hook: the hook point at which change and gradient are multiplied; that of z for `"result"`, which is z times W_O.
        site: the hook point in the names of the nodes.
        name: one of `sites.COMPONENTS`.
    """

    hook: str
    site: str
    name: str

    @classmethod
    def of(cls, lens: Lens, layer: int, name: str) -> "ComponentEstimator":
        """Return the estimator for a component of a layer; raise a FeatpatchError if the model has no such component."""
        hook = lens.site(component(layer, "z" if name == "result" else name))
        return cls(hook, hook if name in WHOLE else component(layer, name), name)

    @property
    def reads(self) -> list[str]:
        """No further hook points."""
        return []

    @property
    def sites(self) -> list[str]:
        """The hook point of the component."""
        return [self.hook]

    def estimates(self, of_pair: PairGradients, direction: Direction, wanted: Wanted) -> Estimates:
        """Estimate the effect of the component, or of each of its heads or neurons, at every requested position."""
        change = of_pair.change(self.hook, direction)
        values, differs = product(change, of_pair.gradients[direction][self.hook]), change != 0
        if not by_position(self.hook):
            values, differs = values.transpose(1, 2), differs.transpose(0, 1)
        if self.name == "pattern_entry":
            return self._entries(values, differs, wanted)
        if self.name in WHOLE:
            values, differs = values.flatten(2)[:, :, None], differs.flatten(1)[:, None]
        if self.name != "neurons":
            values, differs = values.sum(-1), differs.any(-1)
        changes = []
        for position, span in wanted.items():
            sums = values[:, span].sum(1)
            changes += [(self._node(unit, position), sums[:, unit]) for unit in differs[span].any(0).nonzero()[:, 0].tolist()]
        return Estimates.of(changes)

    def _entries(self, values: torch.Tensor, differs: torch.Tensor, wanted: Wanted) -> Estimates:
        """Estimate the effect of single entries of the attention pattern, from values `[variants, pos, heads, source]`."""
        changes = []
        for position, span in wanted.items():
            for name, sources in wanted.items():
                for source in sources:
                    for head in differs[span, :, source].any(0).nonzero()[:, 0].tolist():
                        node = Node(self.site, "head", head, f"{position} <- {name}")
                        changes.append((node, values[:, span, head, source].sum(1)))
        return Estimates.of(changes)

    def _node(self, unit: int, position: int | str) -> Node:
        if self.name in WHOLE:
            return Node(self.site, "activation", None, position)
        return Node(self.site, "neuron" if self.name == "neurons" else "head", unit, position)
