"""Ways to take the gradient of a metric at sites of the unmodified model; no SAE is attached.

atp             at the base run itself (Nanda 2023; Syed et al. 2023, arXiv 2310.10348)
ig              mean along the straight line of one site from base to source, all others running as they do; midpoint rule
                (Sundararajan et al. 2017, arXiv 1703.01365; Marks et al. 2024, arXiv 2403.19647)
eap_ig_inputs   mean along the straight line of the stream that enters the first block, at all sites at once; midpoint rule
                (Hanna et al. 2024, arXiv 2403.17806). Another quantity than `ig`, as the base of every site moves along
grad_drop       at the base run, once for every block, whose attention and MLP pass no gradient on: effects that cancel between
                blocks show. What comes of the gradients is added up by its absolute values, over blocks - 1: a size without
                sign, for ranking (GradDrop of AtP*, Kramar et al. 2024, arXiv 2403.00745)
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch import sites as hooks
from featpatch.lens import Lens

METHODS = ("atp", "ig", "eap_ig_inputs", "grad_drop")

INPUT = hooks.resid_pre(0)
"""The stream that enters the first block."""


@dataclass(frozen=True)
class Taken:
    """Gradients of some runs.

    Attributes:
        gradients: by site `[variants, runs, pos, ...]`; one variant, or one for each block that was dropped.
        ends: the metric with a whole site taken from the source, where it was run, `[runs]` by site.
    """

    gradients: Mapping[str, torch.Tensor]
    ends: Mapping[str, Float[torch.Tensor, " runs"]]


@dataclass(frozen=True)
class Runs:
    """Some equally long prompts with their metric."""

    lens: Lens
    tokens: Int[torch.Tensor, "runs pos"]
    answers: Int[torch.Tensor, " runs"]
    measure: Callable[[torch.Tensor], torch.Tensor]

    def integrated(self, changes: Mapping[str, torch.Tensor], sites: Sequence[str], steps: int) -> Taken:
        """`ig`."""
        lines = {site: self._along(site, changes[site], [site], steps) for site in sites}
        return Taken({site: found[site] for site, (found, _) in lines.items()}, {site: end for site, (_, end) in lines.items()})

    def integrated_inputs(self, changes: Mapping[str, torch.Tensor], sites: Sequence[str], steps: int) -> Taken:
        """`eap_ig_inputs`."""
        gradients, end = self._along(INPUT, changes[INPUT], sites, steps)
        return Taken(gradients, {INPUT: end})

    def dropped(self, sites: Sequence[str]) -> Taken:
        """`grad_drop`."""
        each = []
        for layer in range(self.lens.n_layers):
            stopped = [hooks.component(layer, name) for name in ("attn_out", "mlp_out")]
            there = [hook for hook in stopped if hook in self.lens.hook_points]
            each.append(self.lens.gradients(self.tokens, sites, self.answers, self.measure, stopped=there).gradients)
        return Taken({site: torch.stack([of_layer[site] for of_layer in each]) for site in sites}, {})

    def _along(
        self, moved: str, change: torch.Tensor, sites: Sequence[str], steps: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The mean gradient at some sites while one is moved, and the metric where it arrives."""
        points = [self._at(moved, (step + 0.5) / steps * change, sites) for step in range(steps)]
        mean = {site: torch.stack([gradients[site] for gradients, _ in points]).mean(0, keepdim=True) for site in sites}
        return mean, self._at(moved, change, [moved])[1]

    def _at(self, moved: str, change: torch.Tensor, sites: Sequence[str]) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        """Gradients and metric with one site changed."""
        with self.lens.edit(self.lens.carrier(moved), lambda x: x + change.reshape(x.shape).to(x)):
            found = self.lens.gradients(self.tokens, sites, self.answers, self.measure)
        return found.gradients, found.values
