"""Faithfulness as a function of the size of a circuit, and its integrals CPR and CMD."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The default shares of all items, as in the MIB benchmark (Mueller et al. 2025, arXiv 2504.13151)."""


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve:
    """The faithfulness of circuits of growing size, made of the first items of a ranking.

    Attributes:
        shares: the shares of all items.
        sizes: the numbers of items.
        faithfulness: the exact faithfulness of the circuit of each size.
        low, high: the 95 % bootstrap interval over pairs; NaN with a single pair.
    """

    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    faithfulness: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @property
    def cpr(self) -> float:
        """The integrated circuit performance ratio: the area under faithfulness over shares; higher is better."""
        return float(np.trapezoid(self.faithfulness, self.shares))

    @property
    def cmd(self) -> float:
        """The integrated circuit-model distance: the area between faithfulness and 1; 0 is best."""
        return float(np.trapezoid(np.abs(1 - self.faithfulness), self.shares))

    def table(self) -> pd.DataFrame:
        """Return a table with one row per size."""
        return pd.DataFrame(
            {"share": self.shares, "size": self.sizes, "faithfulness": self.faithfulness, "low": self.low, "high": self.high}
        )

    def __repr__(self) -> str:
        known = self.table().to_string(index=False, float_format="{:.3g}".format, na_rep="")
        single = "" if np.isfinite(self.low).any() else "; a single pair gives no interval"
        return f"faithfulness by size, CPR {self.cpr:.3g}, CMD {self.cmd:.3g}{single}\n{known}"

    def plot(self) -> Any:
        """Return a `plotly.graph_objects.Figure` of faithfulness against the share of items."""
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        figure = go.Figure(layout={"xaxis_title": "share of all items", "yaxis_title": "faithfulness", "xaxis_type": "log"})
        bars = {
            "type": "data",
            "symmetric": False,
            "array": self.high - self.faithfulness,
            "arrayminus": self.faithfulness - self.low,
        }
        figure.add_scatter(x=list(self.shares), y=self.faithfulness, error_y=bars, mode="lines+markers", text=list(self.sizes))
        figure.add_hline(1.0, line={"dash": "dot", "width": 1})
        return figure


def sizes_of(total: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return the number of items that each share of all items is."""
    return tuple(round(share * total) for share in shares)
