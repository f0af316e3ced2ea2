"""The table of results: raw metric values per patch and pair, from which effects and intervals are derived.

    recovery    = mean(m_denoised - m_corrupted) / mean(m_clean - m_corrupted)     sufficient?
    degradation = mean(m_clean - m_noised) / mean(m_clean - m_corrupted)           necessary?

Effects are never clipped: values below 0 and above 1 are meaningful. A node that has the same value in both runs of a pair has
exactly no effect there; such entries are not stored.

A feature that stands for a single name differs in few pairs, and the other pairs dilute its pooled effect. The effect over the
pairs in which the node differs (`over="changed"`, columns `recovery_where_changed` and `degradation_where_changed`) divides the
same changes by the gap of these pairs alone.

Prompts without a counterfactual have no gap. The effects of their ablations are then changes of the metric, in its own units:

    degradation = mean(m_clean - m_noised)

Rows that are taken from a table keep a reference to it: q-values and ranks count every feature that was ranked, not only the
selected rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featpatch.effects import statistics
from featpatch.effects.audit import Array, without_estimates
from featpatch.effects.selection import Over, indices
from featpatch.errors import FeatpatchError, check_kinds
from featpatch.metrics import NEAR_ZERO, with_gap
from featpatch.nodes import EFFECTS, RANKED, Effect, Node

T = TypeVar("T", bound="Measured")


@dataclass(frozen=True, repr=False)
class Measured:
    """Effects of patches, one row per node.

    Attributes:
        nodes: the node that each row patches.
        clean, corrupted: the metric of the unpatched runs, `[pairs]`.
        row, pair: the row and the pair of each stored entry, `[entries]`.
        denoised, noised: the metric of the patched runs, `[entries]`; NaN in a direction that was not run.
        metadata: versions, digests of model, SAEs and pairs, tags of the pairs, metric, directions and options.
        value: `"exact"` for patched runs, `"estimate"` for estimates.
        taken_from: the table that these rows were taken from; None for a table as it was measured or loaded.
        others: tables of the same patches for further metrics, by the metric's name; see `for_metric`.
        spread: the standard deviation over draws of noise of each pooled effect, `[rows]`; empty without several draws.

    Examples:
        >>> len(effects.gap) == len(pairs)
        True
        >>> strongest = effects.top(1)
        >>> strongest.nodes[0].index, strongest.pooled("recovery").round(2).tolist()
        (433, [0.03])
    """

    nodes: tuple[Node, ...]
    clean: Array
    corrupted: Array
    row: NDArray[np.int64]
    pair: NDArray[np.int64]
    denoised: Array
    noised: Array
    metadata: Mapping[str, Any]
    value: str = "exact"
    taken_from: "Measured | None" = field(default=None, compare=False)
    others: Mapping[str, "Measured"] = field(default_factory=dict, compare=False)
    spread: Mapping[Effect, Array] = field(default_factory=dict, compare=False)
    _computed: dict[str, NDArray[Any]] = field(default_factory=dict, init=False, compare=False)

    @property
    def gap(self) -> Array:
        """The gap `m_clean - m_corrupted` of each pair, `[pairs]`."""
        return self.clean - self.corrupted

    @property
    def has_gap(self) -> bool:
        """Whether effects are shares of the gap; otherwise they are changes of the metric, in its own units."""
        return bool(self.metadata.get("unit", "gap") == "gap")

    @property
    def unit(self) -> str:
        """The unit of effects: `"of the gap"` or, without a counterfactual, the metric, such as `"of logit_diff"`.

        Examples:
            >>> effects.unit
            'of the gap'
        """
        return "of the gap" if self.has_gap else f"of {self.metadata['metric']}"

    @property
    def scale(self) -> Array:
        """The divisor of the changes in each pair, `[pairs]`: the gap, or 1 where effects are in units of the metric."""
        return self.gap if self.has_gap else np.ones(len(self.clean))

    def titled(self, effect: Effect) -> str:
        """Return the title of an effect for a figure or table: its name or, without a gap, `"loss of logit_diff"`.

        Examples:
            >>> effects.titled("recovery")
            'recovery'
        """
        return effect if self.has_gap else f"loss {self.unit}"

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def metrics(self) -> list[str]:
        """The names of the metrics that were measured, starting with this table's metric."""
        return [self.metadata["metric"], *self.others]

    def changes(self, effect: Effect) -> "csr_array[Any]":
        """Return the change of the metric as a sparse array `[rows, pairs]`; entries that are not stored are exactly 0.

        Examples:
            >>> effects.changes("recovery").toarray().shape == (len(effects), len(pairs))
            True
        """
        return csr_array((self._entries(effect), (self.row, self.pair)), shape=(len(self.nodes), len(self.clean)))

    def _entries(self, effect: Effect) -> Array:
        """Return the change of the metric of each stored entry, `[entries]`.

        Raises:
            FeatpatchError: the effect is unknown.
        """
        check_kinds(str, effect=effect)
        if effect == "recovery":
            return self.denoised - self.corrupted[self.pair]
        if effect == "degradation":
            return self.clean[self.pair] - self.noised
        raise FeatpatchError(f"effect {effect!r} is unknown: expected recovery or degradation")

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
        result: Array = self.changes(effect).sum(axis=1) / self._gaps(over)
        return result

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
        result: Array = self.changes(effect).toarray() / np.where(self.with_gap, self.scale, np.nan)
        return result

    @property
    def with_gap(self) -> NDArray[np.bool_]:
        """A mask of the pairs whose gap is not near zero, `[pairs]`; other pairs have no per-pair ratio, which needs a gap."""
        return with_gap(self.clean, self.corrupted) if self.has_gap else np.ones(len(self.clean), dtype=bool)

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

    @property
    def indices(self) -> NDArray[np.int64]:
        """The index of the feature, head or neuron, `[rows]`; -1 for kinds without an index."""
        return np.array([-1 if node.index is None else node.index for node in self.nodes], dtype=np.int64)

    @property
    def changed_pairs(self) -> NDArray[np.int64]:
        """The number of pairs in which the node differs between the runs, `[rows]`."""
        return np.bincount(self.row, minlength=len(self))

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

    def _kept(self, key: str, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return an array of this table, computed at the first call."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

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

    @property
    def ranked(self) -> NDArray[np.bool_]:
        """A mask of the rows that are features, heads or neurons, `[rows]`; all rows if the table has none of these."""
        whole = self.whole
        kinds = whole._kept("ranked kinds", lambda: np.array([node.kind in RANKED for node in whole.nodes], dtype=bool))
        return (kinds if kinds.any() else ~kinds)[self.rows_in_whole()]

    @property
    def whole(self: T) -> T:
        """The table that the rows were taken from, or this table itself."""
        return self if self.taken_from is None else cast(T, self.taken_from)

    def rows_in_whole(self) -> NDArray[np.int64]:
        """Return the index in `whole` of each row, `[rows]`."""
        whole = self.taken_from
        if whole is None:
            return np.arange(len(self))

        def compute() -> NDArray[np.int64]:
            at = {node: row for row, node in enumerate(whole.nodes)}
            return np.array([at[node] for node in self.nodes], dtype=np.int64)

        return self._kept("rows in whole", compute).copy()

    @property
    def rows_ranked(self) -> int:
        """The number of ranked rows of `whole`, also if only some of its rows were saved and loaded."""
        return int(self.whole.metadata.get("rows_ranked", self.whole.ranked.sum()))

    def take(self: T, rows: Sequence[int] | NDArray[Any]) -> T:
        """Select rows in the given order, by indices without duplicates or by a mask of all rows.

        Raises:
            FeatpatchError: a row is given twice or does not exist.

        Examples:
            >>> effects.take([0, 1]).nodes == effects.nodes[:2]
            True
            >>> often = effects.take(effects.changed_pairs >= 3)
            >>> 0 < len(often) < len(effects)
            True
        """
        order = indices(rows, len(self), "row")
        new = np.full(len(self.nodes), -1)
        new[order] = np.arange(len(order))
        kept = new[self.row] >= 0
        taken = replace(
            self,
            taken_from=self if self.taken_from is None else self.taken_from,
            nodes=tuple(self.nodes[index] for index in order),
            row=new[self.row[kept]],
            pair=self.pair[kept],
            denoised=self.denoised[kept],
            noised=self.noised[kept],
            others={name: other.take(order) for name, other in self.others.items()},
            spread={effect: values[order] for effect, values in self.spread.items()},
        )
        if self.taken_from is None or "rows in whole" in self._computed:
            taken._computed["rows in whole"] = self.rows_in_whole()[order]
        return taken

    @property
    def route(self) -> str:
        """The route that paths take from sender to receiver, see `rank_paths`; empty if the table holds no paths."""
        return str(self.metadata.get("route", ""))

    @property
    def finished(self) -> bool:
        """Whether the sweep ran to its end; after an interruption some pairs are missing or some values are NaN."""
        return bool(self.metadata.get("finished", True))

    def of_pairs(self: T, pairs: Sequence[int] | NDArray[Any]) -> T:
        """Select pairs, in the order of the table; nodes that differ in none of them are left out.

        Raises:
            FeatpatchError: a pair is given twice or does not exist.

        Examples:
            >>> half = effects.of_pairs(range(0, len(pairs), 2))
            >>> len(half.gap)
            2
        """
        pairs = np.sort(indices(pairs, len(self.clean), "pair"))
        part = self._of_pairs(pairs)
        return part.take(np.unique(part.row)) if len(pairs) < len(self.clean) else part

    def _of_pairs(self: T, pairs: NDArray[np.int64]) -> T:
        """Return all rows with these pairs alone, for every metric."""
        kept = np.isin(self.pair, pairs)
        new = np.cumsum(np.isin(np.arange(len(self.clean)), pairs)) - 1
        metadata = {**self.metadata, "of_pairs": pairs.tolist()} if len(pairs) < len(self.clean) else dict(self.metadata)
        if "screening" in metadata and len(pairs) < len(self.clean):
            metadata["screening"] = without_estimates(metadata["screening"])
        for name in ("tags", "places", "lengths"):
            if name in metadata:
                metadata[name] = [metadata[name][pair] for pair in pairs]
        return replace(
            self,
            clean=self.clean[pairs],
            corrupted=self.corrupted[pairs],
            taken_from=None if self.taken_from is None else self.taken_from.of_pairs(pairs),
            metadata=metadata,
            row=self.row[kept],
            pair=new[self.pair[kept]],
            denoised=self.denoised[kept],
            noised=self.noised[kept],
            others={name: other._of_pairs(pairs) for name, other in self.others.items()},
            spread=self.spread if len(pairs) == len(self.clean) else {},
        )

    def directions_run(self) -> list[Effect]:
        """Return the effects that were run, recovery first.

        Examples:
            >>> effects.directions_run()
            ['recovery', 'degradation']
        """
        return [effect for effect, direction in EFFECTS.items() if direction in self.metadata["directions"]]
