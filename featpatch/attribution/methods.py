"""Ways to compute the gradient of a metric at hook points of the unmodified model; no SAE is attached.

atp             The gradient at the base run itself (Nanda 2023; Syed et al. 2023, arXiv 2310.10348).
ig              The mean gradient along the straight line from base to source at one hook point, with the rest of the model
                running freely; midpoint rule (Sundararajan et al. 2017, arXiv 1703.01365; Marks et al. 2024, arXiv 2403.19647).
eap_ig_inputs   The mean gradient along the straight line of the residual stream that enters the first layer, at all hook points
                at once; midpoint rule (Hanna et al. 2024, arXiv 2403.17806). This is not the same quantity as `ig`, because the
                activations at all hook points change along the line.
grad_drop       The gradient at the base run, once for every layer, with no gradient through that layer's attention and MLP, to
                reveal effects that cancel between layers. The absolute values of the resulting estimates are added up and
                divided by the number of layers - 1: a size without sign, for ranking (GradDrop of AtP*, Kramar et al. 2024,
                arXiv 2403.00745).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int

from featpatch import sites as hooks
from featpatch.lens import Lens

METHODS = ("atp", "ig", "eap_ig_inputs", "grad_drop")
"""The names of the methods."""

INPUT = hooks.resid_pre(0)
"""The hook point of the residual stream that enters the first layer."""


@dataclass(frozen=True)
class Taken:
    """Gradients of some runs.

    Attributes:
        gradients: the gradients `[variants, runs, pos, ...]` by hook point; one variant or, for GradDrop, one per layer.
        ends: the metric `[runs]` with the whole activation at a hook point patched from the source, by hook point, if it was
            run.
    """

    gradients: Mapping[str, torch.Tensor]
    ends: Mapping[str, Float[torch.Tensor, " runs"]]


@dataclass(frozen=True)
class Runs:
    """Some equally long prompts with their metric.

    Attributes:
        lens: the model.
        tokens: the token ids.
        answers: the answer position of each prompt.
        measure: computes the metric `[runs]` from the logits at the answer positions.
    """

    lens: Lens
    tokens: Int[torch.Tensor, "runs pos"]
    answers: Int[torch.Tensor, " runs"]
    measure: Callable[[torch.Tensor], torch.Tensor]

    def integrated(self, changes: Mapping[str, torch.Tensor], sites: Sequence[str], steps: int) -> Taken:
        """Compute gradients by the method `ig`."""
        lines = {site: self._along(site, changes[site], [site], steps) for site in sites}
        return Taken({site: found[site] for site, (found, _) in lines.items()}, {site: end for site, (_, end) in lines.items()})

    def integrated_inputs(self, changes: Mapping[str, torch.Tensor], sites: Sequence[str], steps: int) -> Taken:
        """Compute gradients by the method `eap_ig_inputs`."""
        gradients, end = self._along(INPUT, changes[INPUT], sites, steps)
        return Taken(gradients, {INPUT: end})

    def dropped(self, sites: Sequence[str]) -> Taken:
        """Compute gradients by the method `grad_drop`."""
        each = []
        for layer in range(self.lens.n_layers):
            stopped = [hooks.component(layer, name) for name in ("attn_out", "mlp_out")]
            there = [hook for hook in stopped if hook in self.lens.hook_points]
            each.append(self.lens.gradients(self.tokens, sites, self.answers, self.measure, stopped=there).gradients)
        return Taken({site: torch.stack([of_layer[site] for of_layer in each]) for site in sites}, {})

    def _along(
        self, moved: str, change: torch.Tensor, sites: Sequence[str], steps: int
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return mean gradients along a line at the hook point `moved`, and the metric at the end of the line."""
        points = [self._at(moved, (step + 0.5) / steps * change, sites) for step in range(steps)]
        mean = {site: torch.stack([gradients[site] for gradients, _ in points]).mean(0, keepdim=True) for site in sites}
        return mean, self._at(moved, change, [moved])[1]

    def _at(self, moved: str, change: torch.Tensor, sites: Sequence[str]) -> tuple[Mapping[str, torch.Tensor], torch.Tensor]:
        """Return gradients and metric with a change added at the hook point `moved`."""
        with self.lens.edit(self.lens.carrier(moved), lambda x: x + change.reshape(x.shape).to(x)):
            found = self.lens.gradients(self.tokens, sites, self.answers, self.measure)
        return found.gradients, found.values
