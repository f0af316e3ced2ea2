"""The one table of results: raw metric values per patch and pair, from which effects and intervals are derived.

    recovery    = mean(m_denoised - m_corrupted) / mean(m_clean - m_corrupted)     sufficient?
    degradation = mean(m_clean - m_noised) / mean(m_clean - m_corrupted)           necessary?

Nothing is clipped: values below 0 and above 1 mean something. A node that has the same value in both runs of a pair has
exactly no effect there; such entries are not stored.

A feature that stands for a single name differs in few pairs, and the other pairs dilute its pooled effect. The effect over the
pairs in which the node differs (`over="changed"`, columns `recovery_where_changed` and `degradation_where_changed`) divides the
same changes by the gap of these pairs alone.

Rows that are taken from a table remember it: q-values and ranks count every feature that was ranked, not only those looked at.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featpatch.effects import breakdown, frames, significance, statistics, storage
from featpatch.effects.audit import Audit, audited, without_estimates
from featpatch.effects.frames import WHERE_CHANGED
from featpatch.effects.material import Material
from featpatch.effects.plots import Plots
from featpatch.effects.quadrants import THRESHOLD, check_threshold, named
from featpatch.effects.report import report
from featpatch.effects.stability import SPLITS, TOP, Stability, split_half
from featpatch.errors import FeatpatchError, check_kinds, check_numbers
from featpatch.files import as_path
from featpatch.page import ROWS, Frame, text, write
from featpatch.patch import EFFECTS, RANKED, Effect, Node

Over = Literal["all", "changed"]
"""The pairs that an effect is pooled over: all of them, or those in which the node differs."""
By = Literal["recovery", "degradation", "recovery_where_changed", "degradation_where_changed"]
"""The effects that rows can be sorted by."""
LEAST_CHANGED = 5
"""The number of pairs in which a row must differ, by default, to be ranked by its effect over these pairs."""

Array = NDArray[np.float64]


@dataclass(frozen=True, repr=False)
class Effects:
    """Effects of patches, one row per node.

    Attributes:
        nodes: what each row swapped.
        clean, corrupted: metric of the unpatched runs, `[pairs]`.
        row, pair: for each stored entry its row and its pair, `[entries]`.
        denoised, noised: metric of the patched runs, `[entries]`; NaN in a direction that was not run.
        metadata: versions, digests of model, SAEs and pairs, tags of the pairs, metric, directions and options.
        value: `"exact"` for patched runs; estimates say `"estimate"`.
        taken_from: the table that these rows were taken from; None for a table as it was measured or loaded.
        others: the same patches by other metrics, by name; see `metric`.
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
    taken_from: "Effects | None" = field(default=None, compare=False)
    others: "Mapping[str, Effects]" = field(default_factory=dict, compare=False)
    _p_values: dict[str, Array] = field(default_factory=dict, init=False, compare=False)

    @property
    def gap(self) -> Array:
        """`m_clean - m_corrupted` of each pair."""
        return self.clean - self.corrupted

    def __len__(self) -> int:
        return len(self.nodes)

    @property
    def metrics(self) -> list[str]:
        """The metrics that were measured, this table's first."""
        return [self.metadata["metric"], *self.others]

    def metric(self, name: str) -> "Effects":
        """The same rows by another metric of the same patched runs.

        Raises:
            FeatpatchError: this metric was not measured.
        """
        if name not in self.metrics:
            raise FeatpatchError(
                f"metric {name!r} was not measured: expected one of {', '.join(self.metrics)}; rank with it too"
            )
        return self.others.get(name, self)

    def changes(self, effect: Effect) -> "csr_array[Any]":
        """Change of the metric by row and pair `[rows, pairs]`, sparse: what is not stored is exactly 0."""
        return csr_array((self._entries(effect), (self.row, self.pair)), shape=(len(self.nodes), len(self.clean)))

    def _entries(self, effect: Effect) -> Array:
        """Change of the metric of each stored entry, `[entries]`."""
        check_kinds(str, effect=effect)
        change = {"recovery": self.denoised - self.corrupted[self.pair], "degradation": self.clean[self.pair] - self.noised}
        if effect not in change:
            raise FeatpatchError(f"effect {effect!r} is unknown: expected recovery or degradation")
        return change[effect]

    def pooled(self, effect: Effect, *, over: Over = "all") -> Array:
        """Ratio of means of every row, `[rows]`; NaN in a direction that was not run.

        Args:
            over: `"changed"` pools over the pairs in which the node differs; NaN where their mean gap is near zero.
        """
        gaps = self._gaps(over)
        result: Array = self.changes(effect).sum(axis=1) / gaps
        return result

    def _gaps(self, over: Over) -> Array:
        """Sum of the gaps by which each row's changes are divided, `[rows]`; NaN where it is near zero."""
        if over == "all":
            return np.full(len(self), self.gap.sum())
        if over != "changed":
            raise FeatpatchError(
                f"over={over!r}: expected 'all' (all pairs) or 'changed' (the pairs in which the node differs)"
            )
        gap, clean, corrupted = (
            np.bincount(self.row, values[self.pair], minlength=len(self))
            for values in (self.gap, np.abs(self.clean), np.abs(self.corrupted))
        )
        return np.where(np.abs(gap) > statistics.NEAR_ZERO * np.maximum(clean, corrupted), gap, np.nan)

    def per_pair(self, effect: Effect) -> Array:
        """Change over gap of every row and pair, `[rows, pairs]`; NaN in a pair whose own gap is near zero."""
        result: Array = self.changes(effect).toarray() / np.where(self.with_gap, self.gap, np.nan)
        return result

    @property
    def with_gap(self) -> NDArray[np.bool_]:
        """Which pairs have a gap that is not near zero, `[pairs]`; other pairs have no per-pair ratio."""
        return statistics.with_gap(self.clean, self.corrupted)

    def median(self, effect: Effect) -> Array:
        """Median of the per-pair ratios over the pairs that have a gap, `[rows]`; NaN if none has.

        A pair in which the node does not change counts as exactly 0, so that the median of a node that changes in fewer
        than half of the pairs is 0.
        """
        ratios = self.per_pair(effect)[:, self.with_gap]
        return np.median(ratios, axis=1) if ratios.size else np.full(len(self), np.nan)

    def sign_consistency(self, effect: Effect) -> Array:
        """Share of the changed pairs whose change has the sign of the pooled one, `[rows]`.

        NaN where there is no sign: the node changes in no pair, or its changes add up to 0 or are not all known.
        """
        change, total = self._entries(effect), self.changes(effect).sum(axis=1)
        agree = np.bincount(self.row, np.sign(change) == np.sign(total)[self.row], minlength=len(self))
        signed = np.isfinite(total) & (total != 0)
        return np.divide(agree, self.changed_pairs, out=np.full(len(self), np.nan), where=signed)

    @property
    def indices(self) -> NDArray[np.int64]:
        """Index of the feature, head or neuron, `[rows]`; -1 for kinds without an index."""
        return np.array([-1 if node.index is None else node.index for node in self.nodes], dtype=np.int64)

    @property
    def changed_pairs(self) -> NDArray[np.int64]:
        """Number of pairs in which the node differs between the runs, `[rows]`."""
        return np.bincount(self.row, minlength=len(self))

    def interval(self, effect: Effect, *, over: Over = "all") -> Array:
        """95 % bootstrap interval over pairs, `[rows, 2]`; NaN with a single pair.

        Args:
            over: `"changed"` draws only from the pairs in which the node differs. With fewer than about 10 of them the
                interval tends to be too narrow.
        """
        if over == "all":
            return statistics.interval(self.changes(effect).toarray(), self.gap)
        result, counts, known = np.full((len(self), 2), np.nan), self.changed_pairs, np.isfinite(self._gaps(over))
        order = np.lexsort((self.pair, self.row))
        changes, pairs, starts = self._entries(effect)[order], self.pair[order], np.cumsum(counts) - counts
        for count in np.unique(counts[known & (counts > 1)]):
            rows = np.flatnonzero(known & (counts == count))
            entries = starts[rows, None] + np.arange(count)
            result[rows] = statistics.interval(changes[entries], self.gap[pairs[entries]])
        return result

    @property
    def threshold(self) -> float:
        """The share of the whole activation's effect above which an effect counts in `quadrants`."""
        return float(self.metadata.get("threshold", THRESHOLD))

    def with_threshold(self, threshold: float) -> "Effects":
        """Return the same table with another threshold for its quadrants, used in all tables, files and reports made from it.

        Args:
            threshold: a share of the effect of the whole activation at the node's hook point and position; 0.01 by default.

        Raises:
            FeatpatchError: the threshold is not between 0 and 1.
        """
        check_threshold(threshold)
        others = {name: other.with_threshold(threshold) for name, other in self.others.items()}
        return replace(self, metadata={**self.metadata, "threshold": float(threshold)}, others=others)

    def quadrants(self) -> list[str]:
        """Say for every row in which directions its 95 % interval lies above the threshold; see `effects/quadrants.py`.

        Each label is one of `"both directions"`, `"denoising only"`, `"noising only"`, `"below threshold"` and `"opposing"`, or
        `"undecided"` if an interval extends across the threshold or minus the threshold, or if there is no interval, as with a
        single pair or in a direction that was not run. `with_threshold` sets the threshold.
        """
        unknown, run = np.full((len(self), 2), np.nan), self.directions_run()
        intervals = [self.interval(effect) if effect in run else unknown for effect in EFFECTS]
        return named(intervals, [self.carried(effect) for effect in EFFECTS], self.threshold)

    def carried(self, effect: Effect) -> Array:
        """Effect of the whole activation at the hook point and position of every row, `[rows]`.

        It is 1, the whole behaviour, for whole activations themselves and for rows whose hook point and position have no whole
        activation in the table; NaN in a direction that was not run.
        """
        whole = self.whole
        if effect not in self.directions_run():
            return np.full(len(self), np.nan)
        of_site = {
            (node.site, node.position): value
            for node, value in zip(whole.nodes, whole.pooled(effect), strict=True)
            if node.kind == "activation"
        }
        return np.array(
            [1.0 if node.kind == "activation" else of_site.get((node.site, node.position), 1.0) for node in self.nodes]
        )

    @property
    def smallest_p(self) -> Array:
        """The smallest p-value possible with the number of pairs in which each row differs, `[rows]`; NaN with one pair."""
        return significance.smallest(self.changed_pairs, len(self.clean))

    def p_values(self, effect: Effect) -> Array:
        """Sign-flip permutation p-values over pairs, two-sided, `[rows]`; see `significance.sign_flip` for how small they get.

        NaN with a single pair, for a node that changes in no pair, and where values are missing.
        """
        if effect not in self._p_values:
            p = significance.sign_flip(self.changes(effect).toarray())
            self._p_values[effect] = np.where(self.changed_pairs > 0, p, np.nan)
        return self._p_values[effect].copy()

    def q_values(self, effect: Effect) -> Array:
        """Benjamini-Hochberg q-values over the ranked rows that differ in enough pairs for a test, `[rows]`; NaN for others.

        A row that differs in five pairs or fewer can't reach a p-value of 0.05 (`smallest_p`), and testing it would only raise
        the q-values of the others. Leaving it out is valid, because under the null hypothesis the number of pairs in which a
        node differs is independent of the signs that are tested (independent filtering, Bourgon et al. 2010).

        The q-values are those of the table that the rows were taken from: looking at the top 20 of 20,000 rows does not reduce
        the number of tests to 20. After `save` and `load` of taken rows, the other rows are counted with a p-value of 1; the
        q-values can then be too large, but never too small.
        """
        whole = self.whole
        q, testable = np.full(len(whole), np.nan), whole.smallest_p <= significance.TESTABLE
        tested = whole.ranked & testable
        q[tested] = significance.false_discovery(
            whole.p_values(effect)[tested], self.rows_ranked - int((whole.ranked & ~testable).sum())
        )
        return q[self.rows_in_whole()]

    @property
    def ranked(self) -> NDArray[np.bool_]:
        """Which rows are features, heads or neurons, `[rows]`; all rows of a table in which none is."""
        kinds = np.array([node.kind in RANKED for node in self.whole.nodes], dtype=bool)
        return (kinds if kinds.any() else ~kinds)[self.rows_in_whole()]

    @property
    def whole(self) -> "Effects":
        """The table that the rows were taken from, or this one."""
        return self if self.taken_from is None else self.taken_from

    def rows_in_whole(self) -> NDArray[np.int64]:
        """Index of each row in `whole`, `[rows]`."""
        if self.taken_from is None:
            return np.arange(len(self))
        at = {node: row for row, node in enumerate(self.taken_from.nodes)}
        return np.array([at[node] for node in self.nodes], dtype=np.int64)

    @property
    def rows_ranked(self) -> int:
        """Number of ranked rows of `whole`, also if only some of its rows were saved and loaded."""
        return int(self.whole.metadata.get("rows_ranked", self.whole.ranked.sum()))

    def audit(
        self, effect: Effect | None = None, *, top: int | None = None, confidence: float = 0.95, share: float = 0.05
    ) -> Audit:
        """What a screened ranking may have missed: bounds from the features that were run at random; see `effects/audit.py`.

        Args:
            effect: whose size is meant; by default the larger of the effects that were run.
            top: the ranking that is asked about; by default the first 20, or all that were screened where these are fewer.
            confidence: of each bound.
            share: the share of the features that estimates put last, of which `Audit.size` tells the size.

        Raises:
            FeatpatchError: nothing was screened, the sweep was interrupted, or rows were taken before the table was saved.
        """
        whole, screening = self.whole, self.metadata.get("screening")
        if screening is None or not self.finished:
            raise FeatpatchError(
                "there is no finished screening: expected a table of rank_features(..., exact='screened'); "
                "in a full sweep nothing is missed"
            )
        sizes = whole.take(whole.ranked).sizes([effect] if effect else None)
        if len(sizes) != screening["k"] + screening["sampled"]:
            raise FeatpatchError(
                f"the table has {len(sizes)} of {screening['k'] + screening['sampled']} features that were run: expected all "
                "of them; audit the table as it was measured"
            )
        return audited(
            sizes[: screening["k"]],
            sizes[screening["k"] :],
            screening["candidates"],
            top=min(TOP, screening["k"]) if top is None else top,
            confidence=confidence,
            share=share,
            looks=screening["looks"],
        )

    def sizes(self, effects: Sequence[Effect] | None = None) -> Array:
        """|effect| of every row, the larger one of several, `[rows]`; by default of the effects that were run.

        Raises:
            FeatpatchError: an effect that was not run.
        """
        if effects is not None and not set(effects) <= set(self.directions_run()):
            raise FeatpatchError(f"effects={effects}: expected some of those that were run, {', '.join(self.directions_run())}")
        result: Array = np.max([np.abs(self.pooled(effect)) for effect in effects or self.directions_run()], axis=0)
        return result

    def stability(self, effect: Effect, *, splits: int = SPLITS, top: int = TOP, seed: int = 0) -> Stability:
        """Measure how well the rankings of the features in two halves of the pairs agree.

        Raises:
            FeatpatchError: fewer than 4 pairs or 2 features with known values, or `splits` or `top` below 1.
        """
        return split_half(self.take(self.ranked).changes(effect).toarray(), self.gap, splits, top, seed)

    def by_tag(self, tag: str, effect: Effect) -> pd.DataFrame:
        """The pooled effects for each value of a tag of the pairs, with intervals and ranks, one row per node.

        For example `by_tag("corruption", "recovery")`. `depends` says that a feature's intervals under two values do not
        overlap; see `breakdown.by_tag`.

        Raises:
            FeatpatchError: no pair has this tag, or all have the same value of it.
        """
        return Frame(breakdown.by_tag(self, tag, effect))

    def take(self, rows: Sequence[int] | NDArray[Any]) -> "Effects":
        """Select rows in the given order, by indices without duplicates or by a mask of all rows.

        Raises:
            FeatpatchError: a row is named twice or does not exist.
        """
        order = _indices(rows, len(self), "row")
        new = np.full(len(self.nodes), -1)
        new[order] = np.arange(len(order))
        kept = new[self.row] >= 0
        return replace(
            self,
            taken_from=self if self.taken_from is None else self.taken_from,
            nodes=tuple(self.nodes[index] for index in order),
            row=new[self.row[kept]],
            pair=self.pair[kept],
            denoised=self.denoised[kept],
            noised=self.noised[kept],
            others={name: other.take(order) for name, other in self.others.items()},
        )

    @property
    def finished(self) -> bool:
        """False where the sweep was interrupted: some pairs are missing, or values are NaN."""
        return bool(self.metadata.get("finished", True))

    def known(self) -> "Effects":
        """The rows whose values are all known: after an interruption, those that were finished in every pair."""
        runs = {"recovery": self.denoised, "degradation": self.noised}
        missing = np.any([np.isnan(runs[effect]) for effect in self.directions_run()], axis=0)
        return self.take(np.setdiff1d(np.arange(len(self)), self.row[missing]))

    def of_pairs(self, pairs: Sequence[int] | NDArray[Any]) -> "Effects":
        """Select pairs, in the order of the table; nodes that differ in none of them are left out.

        Raises:
            FeatpatchError: a pair is named twice or does not exist.
        """
        pairs = np.sort(_indices(pairs, len(self.clean), "pair"))
        kept = np.isin(self.pair, pairs)
        new = np.cumsum(np.isin(np.arange(len(self.clean)), pairs)) - 1
        metadata = {**self.metadata, "of_pairs": pairs.tolist()} if len(pairs) < len(self.clean) else dict(self.metadata)
        if "screening" in metadata and len(pairs) < len(self.clean):
            metadata["screening"] = without_estimates(metadata["screening"])
        if "tags" in metadata:
            metadata["tags"] = [metadata["tags"][pair] for pair in pairs]
        part = replace(
            self,
            clean=self.clean[pairs],
            corrupted=self.corrupted[pairs],
            taken_from=None if self.taken_from is None else self.taken_from.of_pairs(pairs),
            metadata=metadata,
            row=self.row[kept],
            pair=new[self.pair[kept]],
            denoised=self.denoised[kept],
            noised=self.noised[kept],
            others={},
        )
        others = {name: other.of_pairs(pairs) for name, other in self.others.items()}
        return replace(part.take(np.unique(part.row)) if len(pairs) < len(self.clean) else part, others=others)

    def where(self, **wanted: Any) -> "Effects":
        """The rows whose node has these values, e.g. `where(kind="feature", position="S2")`."""
        unknown = set(wanted) - set(Node.__dataclass_fields__)
        if unknown:
            raise FeatpatchError(f"{sorted(unknown)} are no columns: expected some of {', '.join(Node.__dataclass_fields__)}")
        return self.take([i for i, n in enumerate(self.nodes) if all(getattr(n, k) == v for k, v in wanted.items())])

    def top(
        self, n: int = 20, *, by: By | None = None, kind: str | None = "ranked", least_changed: int | None = None
    ) -> "Effects":
        """The `n` rows with the largest effect, largest first.

        Args:
            by: `"recovery"` or `"degradation"`, pooled over all pairs; or `"recovery_where_changed"` or
                `"degradation_where_changed"`, pooled over the pairs in which the node differs. The direction must have been
                run; by default recovery if it was, else degradation.
            kind: a kind of node, such as `"head"`; None for all kinds; by default those that are `ranked`.
            least_changed: leave out rows that differ in fewer pairs than this; by default 0, or 5 if `by` ends in
                `_where_changed`, because an interval over fewer pairs is too narrow.
        """
        effect, over = sorting(by, self.directions_run())
        least = least_to_sort(over, least_changed)
        check_numbers(0, n=n)
        rows = self if kind is None else self.take(self.ranked) if kind == "ranked" else self.where(kind=kind)
        rows = rows.take(rows.changed_pairs >= least) if least else rows
        return rows.take(np.argsort(-rows.pooled(effect, over=over), kind="stable")[:n])

    def directions_run(self) -> list[Effect]:
        """The effects that this table holds."""
        return [effect for effect, direction in EFFECTS.items() if direction in self.metadata["directions"]]

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per node: its fields, both effects with intervals and statistics, quadrant, pairs, value.

        Columns of each effect over all pairs: `recovery`, `_low` and `_high` (95 % interval), `_median`, `_sign_consistency`,
        `_p`, `_q`; over the `changed_pairs` in which the node differs: `recovery_where_changed` with its `_low` and `_high`.
        `smallest_p` is the smallest p-value possible with that number of changed pairs. `quadrant` is present if both
        directions were run, and `_estimate` if features were screened. Columns of other metrics come last, prefixed with the
        metric's name: `prob_recovery`.
        """
        return Frame(frames.full(self))

    def sites(self) -> pd.DataFrame:
        """Each site's summary: effect of the whole activation, of all features with the error kept, of the error alone, and
        the interaction that is left, whole - features - error.

        What has no row is the same in both runs and has exactly no effect.
        """
        return Frame(frames.by_site(self))

    def about(self) -> dict[str, Any]:
        """Return the provenance of the table: its metadata without entries that are as long as the pairs or the features."""
        about = {name: value for name, value in self.metadata.items() if name not in ("tags", "shown_rows")}
        if "screening" in about:
            about["screening"] = {
                name: value for name, value in about["screening"].items() if not isinstance(value, (list, dict))
            }
        return about

    @property
    def plot(self) -> Plots:
        """Figures of this table: `plot.quadrants()`, `plot.sites()`, `plot.heatmap()`."""
        return Plots(self)

    def report(self, path: str | Path, *, material: Material | None = None, components: "Effects | None" = None) -> Path:
        """Write a self-contained HTML file with the ranking to sort and search, figures and provenance.

        `fp.report` adds prompts and features.

        Args:
            material: what is shown beside.
            components: of `rank_components`, for the maps.

        Raises:
            FeatpatchError: the path is a folder.
        """
        return write(path, report(self, material or Material(), components))

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file, with metadata as JSON in its header."""
        return storage.save(self, as_path(path))

    @classmethod
    def load(cls, path: str | Path) -> "Effects":
        """Reads what `save` wrote.

        Raises:
            FeatpatchError: the file is missing, damaged or not a table of effects.
        """
        first, *others = [cls(**fields) for fields in storage.load(as_path(path))]
        table = replace(first, others={other.metadata["metric"]: other for other in others})
        return table.take(range(table.metadata["shown_rows"])) if "shown_rows" in table.metadata else table

    def __repr__(self) -> str:
        first = self.take(range(min(ROWS, len(self))))
        shown = text(frames.brief(first).drop(columns=["sae", "pairs", "value"]))
        more = f", the first {len(first)} of" if len(self) > len(first) else ","
        return f"{self.value} effects over {len(self.clean)} pairs{more} {len(self)} rows:\n{shown}"

    def _repr_html_(self) -> str:
        shown = frames.brief(self.take(range(min(20, len(self))))).to_html(index=False, escape=True)
        return f"{shown}<p>{len(self)} rows</p>"


def sorting(by: str | None, run: Sequence[Effect]) -> tuple[Effect, Over]:
    """Split what rows are sorted by into the effect and the pairs that it is pooled over.

    Raises:
        FeatpatchError: the effect was not run.
    """
    known: dict[str, tuple[Effect, Over]] = {effect: (effect, "all") for effect in run}
    known |= {f"{effect}{WHERE_CHANGED}": (effect, "changed") for effect in run}
    check_kinds((str, NoneType), by=by)
    if by is None:
        return run[0], "all"
    if by not in known:
        raise FeatpatchError(f"by={by!r}: expected one of the effects that were run, {', '.join(known)}")
    return known[by]


def least_to_sort(over: Over, asked: int | None) -> int:
    """Return the number of pairs in which a row must differ to be among the top rows.

    Raises:
        FeatpatchError: what was asked for is not a number of pairs.
    """
    least = (LEAST_CHANGED if over == "changed" else 0) if asked is None else asked
    check_numbers(0, least_changed=least)
    return least


def _indices(wanted: Sequence[int] | NDArray[Any], count: int, what: str) -> NDArray[np.int64]:
    """Convert indices or a mask to valid indices without duplicates."""
    given = np.asarray(wanted)
    if given.ndim != 1 or (given.size and given.dtype.kind not in "biu"):
        raise FeatpatchError(f"{what}s {wanted!r}: expected a list of indices, or a mask")
    mask, order = given.dtype == bool, given.astype(np.int64)
    if mask and len(given) == count:
        return np.flatnonzero(given)
    if order.size and (mask or order.min() < 0 or order.max() >= count or len(np.unique(order)) < order.size):
        raise FeatpatchError(
            f"{what}s {order[:10].tolist()}: expected indices from 0 to {count - 1}, each once, or a mask of {count}"
        )
    return order
