"""The estimated cost of a sweep, as plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, repr=False)
class Plan:
    """An estimate of the cost of a sweep.

    Attributes:
        patches: number of exact runs in both directions; patches that change nothing cost nothing and are left out. An estimate
            if fewer pairs were counted than there are.
        rows: number of positions to compute, over all patches; likewise an estimate.
        flops: floating-point operations of the matrix products; likewise an estimate.
        batch_rows: number of rows that share a forward pass.
        memory: bytes that a forward pass takes at its peak, estimated from the model's sizes.
        seconds: duration of the sweep, estimated from the time of one batch that was run on this machine.
        fast: whether featpatch's own, fast forward pass is used.
        nodes: number of features, heads, neurons or paths, each at each position, that differ in some pair; likewise an
            estimate.
        estimate_seconds: time to estimate all features by gradients, extrapolated from a few pairs that were run on this
            machine; None for a metric that has no gradient, for components and for paths.
        counted, pairs: number of pairs that were counted, and number of pairs that there are.
        screens: whether the sweep is over features, which gradient estimates can screen.
    """

    patches: int
    rows: int
    flops: int
    batch_rows: int
    memory: int
    seconds: float
    fast: bool
    nodes: int
    estimate_seconds: float | None
    counted: int
    pairs: int
    screens: bool = True

    def __repr__(self) -> str:
        estimated = (
            "no gradient estimates" if self.estimate_seconds is None else f"gradient estimates {self.estimate_seconds:.1f} s"
        )
        return (
            f"plan of {self.patches:,} patches: {self.seconds:.1f} s, {self.flops:.3g} operations, "
            f"{self.memory / 2**20:,.0f} MiB, {'fast' if self.fast else 'slow'} forward pass; {self.nodes:,} nodes, "
            f"{estimated}"
        )

    def screened_seconds(self, k: int, audit: int) -> float | None:
        """Estimate the seconds that `exact="screened"` takes with these numbers of features; None without gradients."""
        if self.estimate_seconds is None:
            return None
        return self.estimate_seconds + self.seconds * min(1.0, (k + audit) / max(1, self.nodes))
