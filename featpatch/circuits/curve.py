"""The faithfulness of circuits of growing size, with the areas CPR and CMD as in the MIB benchmark."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from featpatch.circuits.graph import Graph
from featpatch.effects.statistics import interval
from featpatch.errors import FeatpatchError, check_choices, check_kinds, is_number
from featpatch.frame import Frame
from featpatch.page.page import Plotted
from featpatch.untrusted import in_figure

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""The default shares of all items, as in the MIB benchmark (Mueller et al. 2025, arXiv 2504.13151)."""

Order = Literal["signed", "absolute"]
"""The order of items: the largest scores first, or the largest |scores| first."""

ROUNDING = 1e-9
"""The tolerance with which share times number of items counts as a whole number."""


@dataclass(frozen=True, repr=False)
class FaithfulnessCurve(Plotted):
    """The faithfulness of circuits of the first items of a ranking, of growing size; see `Circuit.curve`.

    Attributes:
        order: the order of the items.
        shares: the shares of all items.
        sizes: the numbers of items.
        edges: the numbers of edges without dangling ones; NaN where they are not defined.
        faithfulness: the exact faithfulness of the circuit of each size.
        low, high: the 95 % bootstrap interval over pairs; NaN with a single pair.
        other: the curve in the other order, whose own `other` is None.

    Examples:
        >>> circuit = fp.find_circuit(model, pairs, saes=saes[0], nodes=effects.top(5), size=3, progress=False)
        >>> curve = circuit.curve([0.0, 0.4, 1.0])
        >>> curve.order, curve.sizes, curve.other.order
        ('signed', (0, 2, 5), 'absolute')
        >>> 0 <= curve.cpr <= 1
        True
    """

    order: Order
    shares: tuple[float, ...]
    sizes: tuple[int, ...]
    edges: NDArray[np.float64]
    faithfulness: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    other: "FaithfulnessCurve | None" = None

    @property
    def cpr(self) -> float:
        """The integrated circuit performance ratio: the area under faithfulness; higher is better, NaN with one share."""
        return self._area(self.faithfulness)

    @property
    def cmd(self) -> float:
        """The integrated circuit-model distance: the area between faithfulness and 1; 0 is best, NaN with one share."""
        return self._area(np.abs(1 - self.faithfulness))

    def _area(self, values: NDArray[np.float64]) -> float:
        return float(np.trapezoid(values, self.shares)) if len(values) > 1 else math.nan  # an area of 0 would be a perfect CMD

    @property
    def both(self) -> "tuple[FaithfulnessCurve, ...]":
        """This curve and, if there is one, that of the other order."""
        return (self,) if self.other is None else (self, self.other)

    def table(self) -> pd.DataFrame:
        """Return a table with one row per size, first in this order and then in the other one."""
        columns = ("share", "size", "edges", "faithfulness", "low", "high")
        return pd.concat(
            [Frame({"order": curve.order, **dict(zip(columns, curve._columns(), strict=True))}) for curve in self.both],
            ignore_index=True,
        )

    def _columns(self) -> tuple[Any, ...]:
        return self.shares, self.sizes, pd.array(self.edges, dtype="Int64"), self.faithfulness, self.low, self.high

    def __repr__(self) -> str:
        known = self.table().dropna(axis=1, how="all").to_string(index=False, float_format="{:.3g}".format, na_rep="")
        single = "" if np.isfinite(self.low).any() else "; a single pair gives no interval"
        areas = "; ".join(f"{curve.order} order CPR {curve.cpr:.3g}, CMD {curve.cmd:.3g}" for curve in self.both)
        return f"faithfulness by size: {areas}{single}\n{known}"

    def plot(self, *, title: str = "") -> Any:
        """Return a `plotly.graph_objects.Figure` of faithfulness against the share of items, with a line for each order.

        Args:
            title: the title of the figure.
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        axes = {"xaxis_title": "fraction of all items", "yaxis_title": "faithfulness", "xaxis_type": "log"}
        figure = go.Figure(layout={"title": in_figure(title), **axes})
        for curve in self.both:
            bars = {
                "type": "data",
                "symmetric": False,
                "array": curve.high - curve.faithfulness,
                "arrayminus": curve.faithfulness - curve.low,
            }
            name = f"{curve.order} order: CPR {curve.cpr:.3g}, CMD {curve.cmd:.3g}"
            figure.add_scatter(
                x=list(curve.shares),
                y=curve.faithfulness,
                error_y=bars,
                mode="lines+markers",
                text=list(curve.sizes),
                name=name,
            )
        figure.add_hline(1.0, line={"dash": "dot", "width": 1})
        return figure

    _figure, _frame = plot, table


def curve_of(
    graph: Graph, scores: NDArray[np.float64], shares: Sequence[float] | NDArray[Any], order: Order, *, both: bool = True
) -> FaithfulnessCurve:
    """Measure the curve of `Circuit.curve`, which documents the arguments."""
    check_choices(get_args(Order), order=order)
    shares = shares.tolist() if isinstance(shares, np.ndarray) else shares
    fractions = isinstance(shares, Sequence) and all(is_number(share) and 0 <= share <= 1 for share in shares)
    if not fractions or not shares or list(shares) != sorted(set(shares)):
        raise FeatpatchError(f"shares={shares!r}: expected fractions of all items in ascending order, between 0 and 1")
    sizes, ranked = sizes_of(len(scores), shares), ranking(scores, order)
    masks = np.zeros((len(sizes), len(scores)), dtype=bool)
    for mask, size in zip(masks, sizes, strict=True):
        mask[ranked[:size]] = True
    masks = graph.pruned(masks)
    values = graph.of_masks(masks)
    low, high = interval(values - graph.empty, graph.whole - graph.empty).T
    reverse: Order = "absolute" if order == "signed" else "signed"
    other = curve_of(graph, scores, shares, reverse, both=False) if both else None
    found = graph.faithfulness(values)
    return FaithfulnessCurve(order, tuple(map(float, shares)), sizes, graph.edge_counts(masks), found, low, high, other)


def ranking(scores: NDArray[np.float64], order: Order) -> NDArray[np.int64]:
    """Return the indices of all items, the most important first."""
    return np.argsort(-(np.abs(scores) if order == "absolute" else scores), kind="stable")


def sizes_of(total: int, shares: Sequence[float]) -> tuple[int, ...]:
    """Return the number of items for each share, rounded down as in the MIB benchmark."""
    return tuple(math.floor(share * total + ROUNDING) for share in shares)
