"""The table of results: its largest rows, quadrants, tables, figures and files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from featpatch.effects import frames, storage
from featpatch.effects.audit import Array, Audit, audited
from featpatch.effects.frames import SPLITS, TOP, Stability, split_half
from featpatch.effects.grid import Grid, chosen, grid
from featpatch.effects.measured import Measured
from featpatch.effects.plots import Plots
from featpatch.effects.selection import WHERE_CHANGED, By, least_to_sort, measured_effect, sorting
from featpatch.effects.statistics import check_threshold, quadrant_labels
from featpatch.effects.values import PatchedValues  # noqa: F401 (the annotations of inherited fields are resolved here)
from featpatch.errors import FeatpatchError, check_numbers, counted
from featpatch.files import as_path, path_to_write
from featpatch.frame import ROWS, Frame, text
from featpatch.nodes import EFFECTS, Effect, Position


@dataclass(frozen=True, repr=False)
class Effects(Measured):
    """A table of effects, with one row per node: the result of every sweep and of every gradient estimate.

    `PatchedValues` selects rows and pairs, and `Measured` computes effects and statistics. This class adds the order of rows,
    quadrants, tables, figures, files and the audit of a screened ranking.

    Examples:
        >>> strongest = effects.top(3)
        >>> strongest.nodes[0].index, round(float(strongest.pooled("degradation")[0]), 2)
        (433, 0.07)
        >>> sum(quadrant == "both directions" for quadrant in effects.quadrants())
        3
    """

    def top(
        self, n: int = 20, *, by: By | None = None, kind: str | None = "ranked", least_changed: int | None = None
    ) -> "Effects":
        """Return the `n` rows with the largest effect, largest first.

        Args:
            n: the number of rows.
            by: `"recovery"` or `"degradation"`, pooled over all pairs; or `"recovery_where_changed"` or
                `"degradation_where_changed"`, pooled over the pairs in which the node differs. The direction must have been
                run; by default recovery if it was, else degradation.
            kind: a kind of node, such as `"head"`; None for all kinds; by default those that are `ranked`, if there are any.
            least_changed: the number of pairs in which a row must differ to be included; by default 0, or 5 if `by` ends in
                `_where_changed` (all pairs if there are fewer), because an interval over fewer pairs is too narrow.

        Raises:
            FeatpatchError: the effect was not run, or `n` or `least_changed` is not a number of at least 0.

        Examples:
            >>> effects.top(3).nodes[0].index
            433
            >>> len(effects.top(10, by="degradation_where_changed", least_changed=2))
            10
        """
        effect, over = sorting(by, self.directions_run(), self.metrics)
        least = least_to_sort(over, least_changed, len(self.clean))
        check_numbers(0, n=n)
        every = kind is None or (kind == "ranked" and not self.ranked.any())
        rows = self if every else self.take(self.ranked) if kind == "ranked" else self.where(kind=kind)
        rows = rows.take(rows.changed_pairs >= least) if least else rows
        return rows.take(np.argsort(-rows.pooled(effect, over=over), kind="stable")[:n])

    def sizes(self, effects: Sequence[Effect] | None = None) -> Array:
        """Return |effect| of every row, `[rows]`: the largest over the given effects, by default over all that were run.

        Raises:
            FeatpatchError: an effect was not run.

        Examples:
            >>> sizes = effects.sizes(["recovery"])
            >>> bool((sizes == abs(effects.pooled("recovery"))).all())
            True
        """
        run = self.directions_run()
        if effects is not None and not set(effects) <= set(run):
            raise FeatpatchError(f"effects={effects}: expected some of the measured effects, {', '.join(run)}")
        return np.max([np.abs(self.pooled(effect)) for effect in effects or run], axis=0)

    def with_threshold(self, threshold: float) -> "Effects":
        """Return the same table with another threshold for its quadrants, used in all tables, files and reports made from it.

        Args:
            threshold: a share of the effect of the whole activation at the node's hook point and position; 0.01 by default.

        Raises:
            FeatpatchError: the threshold is not between 0 and 1, or the effects are not shares of a gap.

        Examples:
            >>> strict = effects.with_threshold(0.5)
            >>> effects.threshold, strict.threshold
            (0.01, 0.5)
        """
        check_threshold(threshold)
        self._check_gap()
        others = {name: self.for_metric(name).with_threshold(threshold) for name in self.others}
        return replace(self, metadata={**self.metadata, "threshold": float(threshold)}, others=others)

    def quadrants(self) -> list[str]:
        """Return a label for every row that says in which directions its 95 % interval lies above the threshold.

        Each label is one of `"both directions"`, `"denoising only"`, `"noising only"`, `"below threshold"` and `"opposing"`, or
        `"undecided"` if an interval extends across the threshold or minus the threshold, or if there is no interval, as with a
        single pair or in a direction that was not run. `with_threshold` sets the threshold. The labels are defined in
        `effects/statistics.py`.

        Raises:
            FeatpatchError: the effects are not shares of a gap.

        Examples:
            >>> effects.where(kind="activation", site="blocks.1.hook_resid_pre").quadrants()
            ['both directions']
        """
        self._check_gap()
        unknown, run = np.full((len(self), 2), np.nan), self.directions_run()
        intervals = [self.interval(effect) if effect in run else unknown for effect in EFFECTS]
        return quadrant_labels(intervals, [self.carried(effect) for effect in EFFECTS], self.threshold)

    def _check_gap(self) -> None:
        if not self.has_gap:
            raise FeatpatchError(
                f"the effects are changes {self.unit}, because the prompts have no counterfactual: expected shares of a gap, "
                "to compare with a threshold; add corrupted prompts, or use effects.interval(...)"
            )

    def audit(
        self, effect: Effect | None = None, *, top: int | None = None, confidence: float = 0.95, share: float = 0.05
    ) -> Audit:
        """Bound how much a screened ranking may have missed, from the features that were run at random.

        See `effects/audit.py` for the statistics.

        Args:
            effect: the effect by whose size features are compared; by default the larger one of those that were run.
            top: the number of largest features to make a statement about; by default 20, or the number of screened features
                if that is smaller.
            confidence: the confidence of each bound, between 0 and 1.
            share: the share of the features that estimates ranked last that may have a larger effect than `Audit.size`.

        Raises:
            FeatpatchError: the ranking was not screened, the sweep was interrupted, or only some rows of the table were saved.

        Examples:
            >>> screen = fp.Screen(k=20, audit=80)
            >>> screened = fp.rank_features(model, saes, pairs, positions=["S2"], screen=screen, progress=False)
            >>> audit = screened.audit(top=10)
            >>> audit.screened, audit.sampled, audit.recall >= 0.5
            (20, 63, True)
        """
        whole, screening = self.whole, self.metadata.get("screening")
        if screening is None or not self.finished:
            raise FeatpatchError(
                "this table has no finished screening to audit: expected one from rank_features(..., screen=fp.Screen()); a "
                "full sweep needs no audit, because it patches every feature"
            )
        sizes = whole.take(whole.ranked).sizes([effect] if effect else None)
        k, sampled, candidates, looks = (screening[name] for name in ("k", "sampled", "candidates", "looks"))
        if len(sizes) != k + sampled:
            raise FeatpatchError(
                f"the table has {len(sizes)} of the {k + sampled} features that were patched: expected all of them; audit the "
                "table before you select rows"
            )
        top = min(TOP, k) if top is None else top
        return audited(sizes[:k], sizes[k:], candidates, top=top, confidence=confidence, share=share, looks=looks)

    def stability(self, effect: Effect, *, splits: int = SPLITS, top: int = TOP, seed: int = 0) -> Stability:
        """Measure how well the rankings of the features in two random halves of the pairs agree.

        Args:
            effect: the effect to rank by.
            splits: the number of random splits.
            top: the number of largest features whose overlap is measured.
            seed: the seed of the random splits.

        Raises:
            FeatpatchError: fewer than 4 pairs or 2 features with known values, or `splits` or `top` below 1.

        Examples:
            >>> stability = effects.stability("recovery", top=10)
            >>> stability.overlap > stability.chance
            True
        """
        return split_half(self.take(self.ranked).changes(effect).toarray(), self.scale, splits, top, seed)

    def by_tag(self, tag: str, effect: Effect) -> pd.DataFrame:
        """Return the pooled effects for each value of a tag of the pairs, with intervals and ranks, one row per node.

        The columns for a value, for example `swap_s2` with `recovery`, are `recovery_swap_s2`, `recovery_swap_s2_low` and
        `_high` (95 % bootstrap interval over these pairs) and `recovery_swap_s2_rank` (1 is the largest of all features that
        were ranked). All are NaN for a value whose pairs have a mean gap near zero; the interval is also NaN for a value with a
        single pair.

        `depends` is True for a feature whose intervals under two values do not overlap. It is not a test with a controlled
        error rate: intervals over a few pairs are too narrow, and among thousands of features some do not overlap by chance.

        Args:
            tag: the name of the tag.
            effect: `"recovery"` or `"degradation"`.

        Raises:
            FeatpatchError: no pair has this tag, or all have the same value of it.

        Examples:
            >>> two = fp.Pairs((*fp.tasks.ioi(model, 4), *fp.tasks.ioi(model, 4, corruptions="swap_names")))
            >>> table = fp.rank_components(model, two, sites="resid_pre", positions=["S2"], progress=False)
            >>> table.by_tag("corruption", "recovery")[["recovery_swap_s2", "recovery_swap_names"]].shape
            (4, 2)
        """
        return Frame(frames.by_tag(self, tag, effect))

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per node: its fields, both effects with intervals and statistics, quadrant, pairs, value.

        Columns of each effect over all pairs: `recovery`, `_low` and `_high` (95 % interval), `_median`, `_sign_consistency`,
        `_p`, `_q`; over the `changed_pairs` in which the node differs: `recovery_where_changed` with its `_low` and `_high`.
        `unit` is what effects are measured in. With several draws of noise, `recovery_spread` is the standard deviation over
        draws. `smallest_p` is the smallest p-value possible with that number of changed pairs. `quadrant` is present if both
        directions were run, and `_estimate` if features were screened. Columns of other metrics come last, prefixed with the
        metric's name: `prob_recovery`.

        Examples:
            >>> table = effects.top(5).to_pandas()
            >>> table[["index", "recovery", "recovery_low", "recovery_high"]].shape
            (5, 4)
            >>> bool((table["recovery_low"] <= table["recovery"]).all())
            True
        """
        return Frame(frames.full(self))

    def to_tensor(
        self, *axes: str, effect: Effect | None = None, kind: str | None = None, site: str | None = None,
        position: Position | None = None,
    ) -> Grid:  # fmt: skip
        """Return effects as a tensor with these axes, for example `to_tensor("layer", "position", site="resid_pre")`.

        A value is exactly 0 where a node is the same in both runs of every pair, and NaN where nothing was measured. A cell of
        features holds the sum of the effects of the features in the table, which were patched one at a time.

        Args:
            axes: some of `"layer"`, `"position"` and `"head"`, in the order of the dimensions.
            effect: the effect; by default recovery if it was run, else degradation.
            kind: the kind of node; by default `"head"` if heads are an axis, else the only one.
            site: a hook point, or the name of a component such as `"z"`; by default the only one.
            position: a position; by default the only one, or all if positions are an axis.

        Returns:
            The values, and what the entries of each axis stand for.

        Raises:
            FeatpatchError: an axis is unknown, the effect was not run, no row fits, or the rows differ in something that is no
                axis, such as their kind or hook point.

        Examples:
            >>> heads = fp.rank_components(model, pairs, sites="z", positions=["S2", "end"], progress=False)
            >>> values, axes = heads.to_tensor("layer", "head", position="end")
            >>> values.shape, axes["layer"]
            (torch.Size([4, 8]), [0, 1, 2, 3])
        """
        kind = "head" if kind is None and "head" in axes else kind
        return grid(chosen(self, kind, site, position), axes, measured_effect(effect, self.directions_run()))

    def sites(self) -> pd.DataFrame:
        """Summarise each hook point, one row per SAE and position.

        The columns hold the effect of the whole activation, of all features with the error kept, of the error alone, and of
        their interaction, whole - features - error. In a ranking of all nodes, one without a row is the same in both runs and
        has exactly no effect; in a table of nodes that were named, its effect is unknown (NaN). Rows that were taken from a
        table have the numbers of the whole table.

        Examples:
            >>> effects.sites().set_index("sae")["recovery_activation"].round(2).to_dict()
            {'blocks.1.hook_resid_pre': 1.0, 'blocks.3.hook_resid_post': 0.0}
        """
        return Frame(frames.by_site(self))

    @property
    def plot(self) -> Plots:
        """The plotly figures of this table: `plot.quadrants()`, `plot.sites()`, `plot.heatmap()`."""
        return Plots(self)

    def about(self) -> dict[str, Any]:
        """Return the provenance of the table: its metadata without entries that are as long as the pairs or the features.

        Examples:
            >>> effects.about()["metric"]
            'logit_diff'
        """
        about = {name: value for name, value in self.metadata.items() if name not in ("tags", "places", "shown_rows")}
        if "screening" in about:
            screening = about["screening"].items()
            about["screening"] = {name: value for name, value in screening if not isinstance(value, (list, dict))}
        return about

    def save(self, path: str | Path) -> Path:
        """Write the table to a safetensors file, with metadata as JSON in its header.

        Args:
            path: the file, whose name ends in `.safetensors`; an existing one is replaced.

        Returns:
            The path.

        Raises:
            FeatpatchError: the path has another ending or can't be written to, or the table could not be loaded again.

        Examples:
            >>> path = effects.save(folder / "ioi.safetensors")
            >>> len(fp.Effects.load(path)) == len(effects)
            True
        """
        return storage.save(self, path_to_write(path, ".safetensors"))

    @classmethod
    def load(cls, path: str | Path) -> "Effects":
        """Load a table from a file that `save` wrote.

        Raises:
            FeatpatchError: the file is missing, damaged or not a table of effects.

        Examples:
            >>> path = effects.save(folder / "ioi.safetensors")
            >>> fp.Effects.load(path).top(1).nodes == effects.top(1).nodes
            True
        """
        first, *others = [cls(**fields) for fields in storage.load(as_path(path))]
        table = replace(first, others={other.metadata["metric"]: other for other in others})
        return table.take(range(table.metadata["shown_rows"])) if "shown_rows" in table.metadata else table

    def __repr__(self) -> str:
        first, table = self._first()
        pooled = ["pairs"] if set(table["pairs"]) <= {len(self.clean)} else []
        beside = [name for name in table if WHERE_CHANGED in name and not _sorted_by(table, name)]  # the lines would be long
        owner = [] if any("#" in node.sae for node in first.nodes) else ["sae"]  # only it tells SAEs at one hook point apart
        shown = text(table.drop(columns=[*owner, *pooled, "value", "unit", "route", *beside], errors="ignore"))
        return "\n".join([f"{self._headline(len(first))}:", shown, *frames.notes(self)])

    def _repr_html_(self) -> str:
        first, table = self._first()
        said = [escape(text) for text in (self._headline(len(first)), *frames.notes(self))]
        return "".join([f"<p>{said[0]}</p>", table.to_html(index=False, escape=True), *(f"<p>{note}</p>" for note in said[1:])])

    def _first(self) -> tuple["Effects", pd.DataFrame]:
        """Return the rows that are printed, and their table."""
        first = self.take(range(min(ROWS, len(self))))
        return first, frames.brief(first)

    def _headline(self, shown: int) -> str:
        paths = f" of paths (route {self.route!r})" if self.route else ""
        over = f"{self.value} effects{paths} over {frames.sample(self)}"
        if self.spread:
            over += f" and {self.metadata['noise']['draws']} draws of noise (spread: standard deviation over draws)"
        over += "" if self.finished else ", interrupted before the others were finished"
        over += "" if self.has_gap else f", as changes {self.unit} (clean - ablated)"
        return f"{over}, {f'the first {shown} of ' * (shown < len(self))}{counted(len(self), 'row')}"


def _sorted_by(table: pd.DataFrame, name: str) -> bool:
    """Return whether the rows are sorted by this column of an effect and not by the same effect pooled over all pairs."""
    effect = name[: name.index(WHERE_CHANGED)]
    return table[f"{effect}{WHERE_CHANGED}"].is_monotonic_decreasing and not table[effect].is_monotonic_decreasing
