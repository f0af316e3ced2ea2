"""Gradients of a metric at the sites of a pair's runs, in the unmodified model: no SAE is attached.

atp     at the base run itself (Nanda 2023; Syed et al. 2023, arXiv 2310.10348)
ig      mean along the straight line of one site from base to source, all others running as they do; midpoint rule
        (Sundararajan et al. 2017, arXiv 1703.01365; Marks et al. 2024, arXiv 2403.19647)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float

from featpatch.errors import FeatpatchError
from featpatch.lens import Lens
from featpatch.metrics import Measure
from featpatch.pairs import Pair

Activations = Mapping[str, torch.Tensor]
"""`[pos, ...]` by hook."""


@dataclass(frozen=True)
class Gradients:
    """Of one run.

    Attributes:
        value: the metric of the base run.
        at: the gradient at each site, `[pos, d]`, flat.
        end: the metric with each whole site taken from the source, where the method has run it.
    """

    value: float
    at: Mapping[str, Float[torch.Tensor, "pos d"]]
    end: Mapping[str, float]


@dataclass(frozen=True)
class Method:
    """How gradients are taken.

    Attributes:
        steps: points along the line; 0: at the base run alone.
    """

    lens: Lens
    measure: Measure
    steps: int

    def gradients(
        self, pair: Pair, tokens: tuple[int, ...], sites: list[str], base: Activations, source: Activations
    ) -> Gradients:
        """At every site, of the run with these tokens."""
        measure = self._reading(pair)
        values, found = self.lens.gradients(torch.tensor([tokens]), sites, measure)
        if not self.steps:
            return Gradients(float(values[0]), {site: gradient[0].flatten(1) for site, gradient in found.items()}, {})
        at, end = {}, {}
        for site in sites:
            change = (source[site] - base[site])[None]
            total = torch.zeros_like(found[site])
            for step in range(self.steps):
                _, moved = self._along(site, (step + 0.5) / self.steps * change, tokens, measure)
                total += moved
            at[site] = (total / self.steps)[0].flatten(1)
            end[site] = float(self._along(site, change, tokens, measure)[0])
        return Gradients(float(values[0]), at, end)

    def _along(
        self, site: str, change: torch.Tensor, tokens: tuple[int, ...], measure: Callable[[torch.Tensor], torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The metric, and its gradient at the site, with the site's activation changed."""
        with self.lens.edit(self.lens.carrier(site), lambda x: x + change.reshape(x.shape).to(x)):
            values, found = self.lens.gradients(torch.tensor([tokens]), [site], measure)
        return values[0], found[site]

    def _reading(self, pair: Pair) -> Callable[[torch.Tensor], torch.Tensor]:
        """From the logits of a prompt to the metric at its answer position."""
        if not pair.correct:
            raise FeatpatchError(
                f"a pair's answers {pair.answers} are sequences, and {self.measure.name} reads one token: expected answers "
                "of one token; measure whole answers exactly, by rank_features"
            )
        columns = self.measure.columns(pair.correct, pair.wrong)

        def read(logits: torch.Tensor) -> torch.Tensor:
            row = logits[:, pair.answer_position]
            return self.measure.raw(row if columns is None else row[:, list(columns)], pair.correct, pair.wrong)

        return read


def method(lens: Lens, measure: Measure, name: str, steps: int) -> Method:
    """The method of this name.

    Raises:
        FeatpatchError: an unknown one, no steps, or a metric that has no gradient at the clean run.
    """
    if name not in ("atp", "ig") or not isinstance(steps, int) or steps < 1:
        raise FeatpatchError(f"method={name!r}, steps={steps!r}: expected 'atp' or 'ig', and 1 or more steps")
    if measure.needs == "clean":
        raise FeatpatchError(
            f"metric {measure.name!r} has a gradient of zero at the clean run: expected another one to estimate with"
        )
    return Method(lens, measure, 0 if name == "atp" else steps)
