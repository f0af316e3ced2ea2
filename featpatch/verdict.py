"""The result of `fp.check`: whether dictionaries fit a model."""

from dataclasses import dataclass

from featpatch.untrusted import visible

LITTLE = 0.5
"""The explained variance below which a dictionary is not reported as fitting."""
MARGIN = 0.05
"""The largest accepted shortfall of the explained variance from the value that the dictionary's configuration claims."""


@dataclass(frozen=True)
class Fit:
    """The fit of one dictionary to the model, measured on the prompts of a check.

    Attributes:
        dictionary: the name of the dictionary.
        identity: the largest deviation of reconstruction + error from the activation, as a share of the activation's largest
            value.
        whole_site: the largest deviation of the change by patching all features and the error from the change by patching the
            whole activation, between clean and corrupted prompts, as a share of the activation's largest value.
        explained_variance: 1 - sum of squared errors / sum of squared deviations from the mean, without special tokens.
        expected: the explained variance that the dictionary's configuration or the registry claims, if any.
        l0: the mean number of nonzero features per position.
        misfit: the reason why the dictionary does not fit; empty if it does.
        remarks: further remarks, for example that prompts are longer than those of its training.
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
        """The result of the check in a few words."""
        if self.misfit:
            return "does not fit"
        if self.short:
            return "less than it claims"
        return "explains little" if self.explained_variance < LITTLE else "fits"

    @property
    def short(self) -> bool:
        """Whether the dictionary explains less than its configuration claims, by more than `MARGIN`."""
        return self.expected is not None and self.explained_variance < self.expected - MARGIN

    @property
    def ok(self) -> bool:
        """Whether the dictionary fits, and explains as much as its configuration claims if it claims anything."""
        return not (self.misfit or self.short)


@dataclass(frozen=True, repr=False)
class Check:
    """The outcome of `fp.check`.

    Attributes:
        model, weights: the name of the model, and how its weights were processed.
        positions: the number of positions on which the explained variance was measured.
        fits: the fit of each dictionary.
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
        """Whether every dictionary fits and explains as much as its configuration claims."""
        return all(fit.ok for fit in self.fits)
