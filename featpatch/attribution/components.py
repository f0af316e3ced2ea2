"""Gradient estimates of the effect of components: change times gradient at their hook point, summed over each component.

Queries and keys act through a softmax, which is flat where attention is all or nothing. With the QK fix of AtP* (Kramar et al.
2024, arXiv 2403.00745), their effect on the output of their heads is computed exactly, and only what lies downstream of it is
estimated to first order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from featpatch import sites as hooks
from featpatch.attribution.estimation import estimated
from featpatch.attribution.gradients import Gradients, PairGradients
from featpatch.attribution.part import Found, Part, product
from featpatch.attribution.queries_keys import QueryKeyPart
from featpatch.effects import Effects
from featpatch.lens import Lens, wrap
from featpatch.metrics import Metric
from featpatch.pairs import Pairs
from featpatch.pairs.spans import Positions, Wanted
from featpatch.patch import DIRECTIONS, Direction, Node


def estimate_components(
    model: Any,
    pairs: Pairs,
    *,
    sites: str | Sequence[str] = hooks.SHOWN,
    layers: Sequence[int] | None = None,
    method: str = "atp",
    steps: int = 10,
    qk_fix: bool = True,
    gradients: Gradients | None = None,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: str | Metric = "logit_diff",
    progress: bool = True,
) -> Effects:
    """Estimate by gradients what `rank_components` measures: the same rows and columns, marked `estimate`.

    `method="grad_drop"` with the QK fix is AtP* (Kramar et al. 2024, arXiv 2403.00745).

    Args:
        qk_fix: whether to compute the effect of queries and keys on their head's output exactly, in a pass of their layer
            alone (one for all queries of a prompt, one for the keys of each requested position).
        model, pairs, sites, layers, positions, directions, metric, progress: as in `rank_components`.
        method, steps, gradients: as in `estimate_features`.

    Returns:
        A table of estimates; for `metadata["whole_residual"]` see `estimate_features`.

    Raises:
        FeatpatchError: if the input is unusable.
    """
    lens = wrap(model)
    names, chosen = hooks.check_components(sites, positions), hooks.check_layers(layers, lens.n_layers)
    fixed = [name for name in names if name in ("q", "k") and qk_fix]
    parts: list[Part] = [QueryKeyPart(lens, chosen, name) for name in fixed]
    parts += [ComponentPart.of(lens, layer, name) for name in names if name not in fixed for layer in chosen]
    about = {"components": names, "layers": chosen, "qk_fix": qk_fix}
    source = gradients or Gradients(model, pairs, metric=metric, method=method, steps=steps, keep=False)
    return estimated(source, model, pairs, parts, about, positions, directions, progress=progress)


@dataclass(frozen=True)
class ComponentPart(Part):
    """The activation at one hook point of a layer, as a whole or by head or neuron.

    Attributes:
        hook: the hook point at which change and gradient are multiplied; that of z for `"result"`, which is z times W_O.
        site: the hook point in the names of the nodes.
        name: one of `sites.COMPONENTS`.
    """

    hook: str
    site: str
    name: str

    @classmethod
    def of(cls, lens: Lens, layer: int, name: str) -> "ComponentPart":
        """Return the part for a component of a layer.

        Raises:
            FeatpatchError: if the model has no such component.
        """
        hook = lens.site(hooks.component(layer, "z" if name == "result" else name))
        return cls(hook, hook if name in hooks.WHOLE else hooks.component(layer, name), name)

    @property
    def reads(self) -> list[str]:
        """No further hook points."""
        return []

    @property
    def sites(self) -> list[str]:
        """The hook point of the component."""
        return [self.hook]

    def found(self, of_pair: PairGradients, direction: Direction, wanted: Wanted) -> Found:
        """Estimate the effect of the component, or of each of its heads or neurons, at every requested position."""
        change = of_pair.change(self.hook, direction)
        values, differs = product(change, of_pair.gradients[direction][self.hook]), change != 0
        if not hooks.by_position(self.hook):
            values, differs = values.transpose(1, 2), differs.transpose(0, 1)
        if self.name == "pattern_entry":
            return self._entries(values, differs, wanted)
        if self.name in hooks.WHOLE:
            values, differs = values.flatten(2)[:, :, None], differs.flatten(1)[:, None]
        if self.name != "neurons":
            values, differs = values.sum(-1), differs.any(-1)
        changes = []
        for position, span in wanted.items():
            sums = values[:, span].sum(1)
            changes += [(self._node(unit, position), sums[:, unit]) for unit in differs[span].any(0).nonzero()[:, 0].tolist()]
        return Found.of(changes)

    def _entries(self, values: torch.Tensor, differs: torch.Tensor, wanted: Wanted) -> Found:
        """Estimate the effect of single entries of the attention pattern, from values `[variants, pos, heads, source]`."""
        changes = []
        for position, span in wanted.items():
            for name, sources in wanted.items():
                for source in sources:
                    for head in differs[span, :, source].any(0).nonzero()[:, 0].tolist():
                        node = Node(self.site, "head", head, f"{position} <- {name}")
                        changes.append((node, values[:, span, head, source].sum(1)))
        return Found.of(changes)

    def _node(self, unit: int, position: int | str) -> Node:
        if self.name in hooks.WHOLE:
            return Node(self.site, "activation", None, position)
        return Node(self.site, "neuron" if self.name == "neurons" else "head", unit, position)
