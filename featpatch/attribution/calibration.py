"""Compare estimates with exact effects of the same pairs, overall and by hook point, to see how far to trust them."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import pearsonr

from featpatch.effects.statistics import spearman
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_kinds, check_numbers
from featpatch.frame import Frame
from featpatch.nodes import Effect, Node
from featpatch.untrusted import in_figure, visible


@dataclass(frozen=True, repr=False)
class Calibration:
    """Estimated and exact effects of the same nodes.

    Attributes:
        nodes: the ranked nodes of either table, where a missing row is an effect of 0; if the exact table was screened or is a
            selection of rows, only its own.
        estimate, exact: the pooled effects, `[nodes]`.
        effect: the effect that is compared.
        signed: whether estimates have a sign; if not, `exact` holds absolute values.

    Examples:
        >>> estimates = fp.rank_features(model, saes, pairs, positions=["S2"], method="atp", progress=False)
        >>> calibration = fp.calibrate(estimates, effects)
        >>> calibration.table(k=10)["site"].tolist()
        ['all', 'blocks.1.hook_resid_pre', 'blocks.3.hook_resid_post']
        >>> calibration.misses(3).columns.tolist()
        ['node', 'estimate', 'exact']
    """

    nodes: tuple[Node, ...]
    estimate: NDArray[np.float64]
    exact: NDArray[np.float64]
    effect: Effect
    signed: bool = True

    def table(self, k: int = 20) -> pd.DataFrame:
        """Return one row for all nodes and one per SAE or, for other nodes, per hook point.

        The columns are `rows`: the number of nodes; `pearson` and `spearman`; `recall`: the share of the k largest |exact| that
        are among the k largest |estimate| (NaN with no more than k rows); `signs`: the share of rows with the same sign;
        `slope`: exact over estimate, by least squares through 0. Estimates without sign (`"grad_drop"`) are compared with
        |exact|, and `signs` is NaN.
        """
        check_numbers(1, k=k)
        names = np.array([node.sae or node.site for node in self.nodes])
        rows = [("all", np.ones(len(names), dtype=bool)), *((name, names == name) for name in dict.fromkeys(names))]
        return Frame([{"site": name, **self._agreement(at, k)} for name, at in rows])

    def misses(self, n: int = 10) -> pd.DataFrame:
        """Return the n rows in which the estimate is farthest from the exact effect, farthest first."""
        check_numbers(0, n=n)
        worst = np.argsort(-np.abs(self.estimate - self.exact), kind="stable")[:n]
        return Frame(
            {"node": [str(self.nodes[row]) for row in worst], "estimate": self.estimate[worst], "exact": self.exact[worst]}
        )

    def plot(self, *, title: str = "") -> Any:
        """Return a `plotly.graph_objects.Figure` of exact effect against estimate, coloured by SAE, with the diagonal.

        Args:
            title: the title of the figure.
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        figure = go.Figure(layout={"title": in_figure(title), "xaxis_title": "estimate", "yaxis_title": f"exact {self.effect}"})
        names = np.array([in_figure(node.sae or node.site) for node in self.nodes])
        for name in dict.fromkeys(names.tolist()):
            at = np.flatnonzero(names == name)
            text = [in_figure(str(self.nodes[row])) for row in at]
            figure.add_scatter(x=self.estimate[at], y=self.exact[at], mode="markers", name=str(name), text=text)
        ends = [float(min(self.estimate.min(), self.exact.min())), float(max(self.estimate.max(), self.exact.max()))]
        figure.add_scatter(x=ends, y=ends, mode="lines", name="equal")
        return figure

    def __repr__(self) -> str:
        return visible(f"{self.effect}, estimate against exact\n{self.table().round(3).to_string(index=False)}")

    def _agreement(self, rows: NDArray[np.bool_], k: int) -> dict[str, float]:
        estimate, exact = self.estimate[rows], self.exact[rows]
        varied = len(estimate) > 1 and bool(np.ptp(estimate)) and bool(np.ptp(exact))
        top = [set(np.argsort(-np.abs(values), kind="stable")[:k].tolist()) for values in (estimate, exact)]
        size = float(estimate @ estimate)
        return {
            "rows": float(len(estimate)),
            "pearson": float(pearsonr(estimate, exact).statistic) if varied else np.nan,
            "spearman": spearman(estimate, exact),
            "recall": len(top[0] & top[1]) / k if len(estimate) > k else np.nan,
            "signs": float((np.sign(estimate) == np.sign(exact)).mean()) if self.signed and len(estimate) else np.nan,
            "slope": float(estimate @ exact) / size if size else np.nan,
        }


def calibrate(estimate: Effects, exact: Effects, *, effect: Effect | None = None) -> Calibration:
    """Compare estimates with exact effects of the same pairs, metric and positions.

    Args:
        estimate: a table of estimates.
        exact: a table of exact effects.
        effect: the effect to compare; by default recovery if both tables have it.

    Returns:
        The pooled effects of both tables, node by node, with tables and a figure of their agreement.

    Raises:
        FeatpatchError: the tables are not one of estimates and one of exact effects, differ in pairs, metric, positions, model
            or SAEs, hold nodes of different kinds, or do not both have the effect.

    Examples:
        >>> estimates = fp.rank_features(model, saes, pairs, positions=["S2"], method="atp", progress=False)
        >>> table = fp.calibrate(estimates, effects).table()
        >>> round(float(table["recall"][0]), 1)
        0.8
    """
    check_kinds(Effects, estimate=estimate, exact=exact)
    if estimate.value != "estimate" or exact.value != "exact":
        raise FeatpatchError(
            f"the first table holds {estimate.value} effects and the second {exact.value} effects: expected estimates first "
            "and exact effects second; call calibrate(estimate, exact)"
        )
    for key in ("pairs", "of_pairs", "metric", "unit", "ablation", "positions", "route", "model"):
        one, other = (table.metadata.get(key) for table in (estimate, exact))
        if one != other:
            raise FeatpatchError(
                f"{key} is {one!r} for the estimates and {other!r} for the exact effects: expected the same; compute both "
                "with the same model, pairs and options"
            )
    digests = [table.metadata.get("saes", {}) for table in (estimate, exact)]
    for name in digests[0].keys() & digests[1].keys():
        if digests[0][name] != digests[1][name]:
            raise FeatpatchError(
                f"SAE {name!r} has different weights in the two tables: expected the same SAE; compute both tables with it"
            )
    kinds = [{node.kind for node in table.take(table.ranked).nodes} for table in (estimate, exact)]
    if not kinds[0] & kinds[1]:
        raise FeatpatchError(
            f"the estimates are of nodes of kind {', '.join(sorted(kinds[0])) or 'none'} and the exact effects of "
            f"{', '.join(sorted(kinds[1])) or 'none'}: expected a kind in common; rank the same kind of nodes for both"
        )
    estimate = estimate.whole
    shared = [name for name in estimate.directions_run() if name in exact.directions_run()]
    wanted = effect or next(iter(shared), None)
    if wanted is None or wanted not in shared:
        raise FeatpatchError(
            f"effect={effect!r}: expected an effect that both tables hold ({', '.join(shared) or 'there is none'}); rank both "
            "in the same directions"
        )
    tables = (exact,) if "screening" in exact.metadata or exact.taken_from is not None else (exact, estimate)
    nodes = tuple(dict.fromkeys(node for table in tables for node in table.take(table.ranked).nodes))
    values = [dict(zip(table.nodes, table.pooled(wanted), strict=True)) for table in (estimate, exact)]
    first, second = (np.array([of_table.get(node, 0.0) for node in nodes]) for of_table in values)
    signed = not estimate.metadata.get("unsigned", False)
    return Calibration(nodes, first, second if signed else np.abs(second), wanted, signed)
