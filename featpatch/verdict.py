"""The result of a check: whether dictionaries fit a model."""

from dataclasses import dataclass

from featpatch.untrusted import visible

LITTLE = 0.5
"""Explained variance below which a dictionary is not said to fit."""
MARGIN = 0.05
"""How far the explained variance may lie below what the dictionary's configuration claims."""


@dataclass(frozen=True)
class Fit:
    """The fit of one dictionary to the model, measured on the prompts of a check.

    Attributes:
        dictionary: its name.
        identity: largest deviation of reconstruction + error from the activation, as a share of its largest value.
        whole_site: largest deviation of the logits with all features and the error swapped from those with the whole
            activation swapped, as a share of the largest logit.
        explained_variance: 1 - sum of squared errors / sum of squared deviations from the mean, special tokens left out.
        expected: the explained variance that the dictionary's configuration or the registry claims, if any.
        l0: features that are not 0, per position.
        misfit: why it does not fit; empty if it does.
        remarks: other things to know, e.g. prompts longer than those of its training.
    """

    dictionary: str
    identity: float
    whole_site: float
    explained_variance: float
    expected: float | None
    l0: float
    misfit: str
    remarks: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """The outcome in a few words."""
        if self.misfit:
            return "does not fit"
        if self.short:
            return "less than it claims"
        return "explains little" if self.explained_variance < LITTLE else "fits"

    @property
    def short(self) -> bool:
        """Whether it explains less than its configuration claims, by more than `MARGIN`."""
        return self.expected is not None and self.explained_variance < self.expected - MARGIN

    @property
    def ok(self) -> bool:
        """Whether it fits, and explains as much as its configuration claims if it claims anything."""
        return not (self.misfit or self.short)


@dataclass(frozen=True, repr=False)
class Check:
    """The outcome of `fp.check`.

    Attributes:
        model, weights: the model's name and how its weights were processed.
        positions: how many positions the explained variance is measured on.
        fits: one entry per dictionary.
    """

    model: str
    weights: str
    positions: int
    fits: tuple[Fit, ...]

    def __repr__(self) -> str:
        claims = ["" if fit.expected is None else f" of a claimed {fit.expected:.2f}" for fit in self.fits]
        fits = [
            f"{fit.dictionary}: {fit.verdict}, explains {fit.explained_variance:.2f}{claim}. {fit.misfit}".strip()
            for fit, claim in zip(self.fits, claims, strict=True)
        ]
        said = f"check on {self.positions} positions of {self.model}, weights {self.weights}"
        return visible("\n  ".join([said, *fits]))

    @property
    def ok(self) -> bool:
        """Whether every dictionary is ok."""
        return all(fit.ok for fit in self.fits)
