"""Effects of patches with their statistics, derived from the stored metric values.

    recovery    = mean(m_denoised - m_corrupted) / mean(m_clean - m_corrupted)     sufficient?
    degradation = mean(m_clean - m_noised) / mean(m_clean - m_corrupted)           necessary?

Effects are never clipped: values below 0 and above 1 are meaningful.

A feature that stands for a single name differs in few pairs, and the other pairs dilute its pooled effect. The effect over the
pairs in which the node differs (`over="changed"`, columns `recovery_where_changed` and `degradation_where_changed`) divides the
same changes by the gap of these pairs alone.

Prompts without a counterfactual have no gap. The effects of their ablations are then changes of the metric, in its own units:

    degradation = mean(m_clean - m_noised)
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from featpatch.effects import statistics
from featpatch.effects.audit import Array
from featpatch.effects.selection import Over
from featpatch.effects.values import PatchedValues
from featpatch.errors import FeatpatchError
from featpatch.metrics import NEAR_ZERO
from featpatch.nodes import Effect

T = TypeVar("T", bound="Measured")


@dataclass(frozen=True, repr=False)
class Measured(PatchedValues):
    """Effects of patches, one row per node.

    Examples:
        >>> strongest = effects.top(1)
        >>> strongest.nodes[0].index, strongest.pooled("recovery").round(2).tolist()
        (433, [0.03])
    """

    def pooled(self, effect: Effect, *, over: Over = "all") -> Array:
        """Return the pooled effect of every row, mean change over mean gap, `[rows]`; NaN in a direction that was not run.

        Without a counterfactual it is the mean change of the metric.

        Args:
            effect: `"recovery"` or `"degradation"`.
            over: `"all"` pools over all pairs, `"changed"` over those in which the node differs, with NaN if their mean gap is
                near zero.

        Examples:
            >>> whole = effects.where(kind="activation", site="blocks.1.hook_resid_pre")
            >>> whole.pooled("recovery").round(2).tolist()
            [1.0]
        """
        return self.changes(effect).sum(axis=1) / self._gaps(over)

    def _gaps(self, over: Over) -> Array:
        """Return the sum of gaps by which the changes of each row are divided, `[rows]`; NaN if it is near zero.

        Raises:
            FeatpatchError: `over` is neither `"all"` nor `"changed"`.
        """
        if over == "all":
            return np.full(len(self), self.scale.sum())
        if over != "changed":
            raise FeatpatchError(
                f"over={over!r}: expected 'all' (all pairs) or 'changed' (the pairs in which the node differs)"
            )
        if not self.has_gap:
            return np.where(self.changed_pairs > 0, self.changed_pairs, np.nan)
        gap, clean, corrupted = (
            np.bincount(self.row, values[self.pair], minlength=len(self))
            for values in (self.gap, np.abs(self.clean), np.abs(self.corrupted))
        )
        return np.where(np.abs(gap) > NEAR_ZERO * np.maximum(clean, corrupted), gap, np.nan)

    def per_pair(self, effect: Effect) -> Array:
        """Return the effect in each pair, change over gap, `[rows, pairs]`; NaN in pairs whose own gap is near zero.

        Examples:
            >>> effects.top(3).per_pair("recovery").shape
            (3, 4)
        """
        return self.changes(effect).toarray() / np.where(self.with_gap, self.scale, np.nan)

    def median(self, effect: Effect) -> Array:
        """Return the median of the per-pair ratios over the pairs that have a gap, `[rows]`; NaN if none has.

        A pair in which the node does not change counts as exactly 0, so that the median of a node that changes in fewer
        than half of the pairs is 0.

        Examples:
            >>> whole = effects.where(kind="activation", site="blocks.1.hook_resid_pre")
            >>> whole.median("degradation").round(2).tolist()
            [1.0]
        """
        ratios = self.per_pair(effect)[:, self.with_gap]
        return np.median(ratios, axis=1) if ratios.size else np.full(len(self), np.nan)

    def sign_consistency(self, effect: Effect) -> Array:
        """Return the share of the changed pairs whose change has the same sign as the pooled effect, `[rows]`.

        It is NaN if the pooled effect has no sign, because the node changes in no pair, or its changes add up to 0 or are not
        all known.

        Examples:
            >>> whole = effects.where(kind="activation", site="blocks.1.hook_resid_pre")
            >>> whole.sign_consistency("recovery").tolist()
            [1.0]
        """
        change, total = self._entries(effect), self.changes(effect).sum(axis=1)
        agree = np.bincount(self.row, np.sign(change) == np.sign(total)[self.row], minlength=len(self))
        signed = np.isfinite(total) & (total != 0)
        return np.divide(agree, self.changed_pairs, out=np.full(len(self), np.nan), where=signed)

    def interval(self, effect: Effect, *, over: Over = "all") -> Array:
        """Return the 95 % bootstrap interval of the pooled effect over pairs, `[rows, 2]`; NaN with a single pair.

        Args:
            effect: `"recovery"` or `"degradation"`.
            over: `"all"` resamples all pairs, `"changed"` only those in which the node differs. With fewer than about 10 of
                these the interval tends to be too narrow.

        Examples:
            >>> strongest = effects.top(3)
            >>> low, high = strongest.interval("recovery").T
            >>> bool((low <= strongest.pooled("recovery")).all())
            True
        """
        return self._once(f"interval {effect} {over}", lambda table: table._interval(effect, over))

    def _once(self: T, key: str, compute: Callable[[T], Array]) -> Array:
        """Return a statistic of each row that does not depend on the other rows, computed once.

        It is computed for all rows of `whole` if this table has most of them, and then shared by all tables taken from `whole`;
        otherwise for the rows of this table.
        """
        whole = self.whole
        table = whole if key in whole._computed or 2 * len(self) > len(whole) else self
        values = table._kept(key, lambda: compute(table))
        return values.copy() if table is self else self._kept(key, lambda: values[self.rows_in_whole()]).copy()

    def _interval(self, effect: Effect, over: Over) -> Array:
        if over == "all":
            return statistics.interval(self.changes(effect).toarray(), self.scale)
        result, counts, known = np.full((len(self), 2), np.nan), self.changed_pairs, np.isfinite(self._gaps(over))
        order = np.lexsort((self.pair, self.row))
        changes, pairs, starts = self._entries(effect)[order], self.pair[order], np.cumsum(counts) - counts
        for count in np.unique(counts[known & (counts > 1)]):
            rows = np.flatnonzero(known & (counts == count))
            entries = starts[rows, None] + np.arange(count)
            result[rows] = statistics.interval(changes[entries], self.scale[pairs[entries]])
        return result

    @property
    def threshold(self) -> float:
        """The share of the whole activation's effect above which an effect counts in `quadrants`."""
        return float(self.metadata.get("threshold", statistics.THRESHOLD))

    def carried(self, effect: Effect) -> Array:
        """Return the effect of the whole activation at the hook point and position of every row, `[rows]`.

        It is 1, the whole behaviour, for whole activations themselves and for rows whose hook point and position have no whole
        activation in the table; NaN in a direction that was not run.

        Examples:
            >>> effects.top(1).carried("recovery").round(2).tolist()
            [1.0]
        """
        whole = self.whole
        if effect not in self.directions_run():
            return np.full(len(self), np.nan)

        def compute() -> Array:
            of_site = {
                (node.site, node.position): value
                for node, value in zip(whole.nodes, whole.pooled(effect), strict=True)
                if node.kind == "activation"
            }
            return np.array([1.0 if n.kind == "activation" else of_site.get((n.site, n.position), 1.0) for n in whole.nodes])

        return whole._kept(f"carried {effect}", compute)[self.rows_in_whole()]

    @property
    def smallest_p(self) -> Array:
        """The smallest p-value possible with the number of pairs in which each row differs, `[rows]`; NaN with one pair."""
        return statistics.smallest(self.changed_pairs, len(self.clean))

    def p_values(self, effect: Effect) -> Array:
        """Return two-sided p-values of a sign-flip permutation test over pairs, `[rows]`; see `statistics.sign_flip`.

        They are NaN with a single pair, for a node that changes in no pair, and if values are missing.

        Examples:
            >>> whole = effects.where(kind="activation", site="blocks.1.hook_resid_pre")
            >>> whole.p_values("recovery").round(4).tolist(), whole.smallest_p.round(4).tolist()
            ([0.125], [0.125])
        """
        p = self._once(f"p {effect}", lambda table: statistics.sign_flip(table.changes(effect).toarray()))
        return np.where(self.changed_pairs > 0, p, np.nan)

    def q_values(self, effect: Effect) -> Array:
        """Return Benjamini-Hochberg q-values of the ranked rows that differ in enough pairs for a test, `[rows]`; else NaN.

        A row that differs in five pairs or fewer can't reach a p-value of 0.05 (`smallest_p`), and testing it would only raise
        the q-values of the others. Leaving it out is valid, because under the null hypothesis the number of pairs in which a
        node differs is independent of the signs that are tested (independent filtering, Bourgon et al. 2010).

        The q-values are those of the table that the rows were taken from: looking at the top 20 of 20,000 rows does not reduce
        the number of tests to 20. After `save` and `load` of taken rows, the other rows are counted with a p-value of 1; the
        q-values can then be too large, but never too small.

        Examples:
            >>> effects.top(2).q_values("recovery")  # there are only 4 pairs
            array([nan, nan])
        """
        whole = self.whole
        q, testable = np.full(len(whole), np.nan), whole.smallest_p <= statistics.TESTABLE
        tested = whole.ranked & testable
        q[tested] = statistics.false_discovery(
            whole.p_values(effect)[tested], self.rows_ranked - int((whole.ranked & ~testable).sum())
        )
        return q[self.rows_in_whole()]
