"""Stored metric values of patches: one row per node, one entry per row and pair in which the node differs between the runs.

A node that has the same value in both runs of a pair has exactly no effect there, so that entry is not stored. Rows that are
taken from a table keep a reference to it, because q-values and ranks count every feature that was ranked.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featpatch.effects.audit import Array, without_estimates
from featpatch.effects.selection import check_measured, indices
from featpatch.errors import FeatpatchError, check_choices, check_kinds
from featpatch.metrics import with_gap
from featpatch.nodes import EFFECTS, KINDS, RANKED, Effect, Node

T = TypeVar("T", bound="PatchedValues")


@dataclass(frozen=True, repr=False)
class PatchedValues:
    """The metric of patched runs, with the selection of rows and pairs.

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
    taken_from: "PatchedValues | None" = field(default=None, compare=False)
    others: Mapping[str, "PatchedValues"] = field(default_factory=dict, compare=False)
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

    def for_metric(self: T, name: str) -> T:
        """Return the table of the same patched runs for another metric.

        Args:
            name: the name of the metric, one of `metrics`.

        Raises:
            FeatpatchError: this metric was not measured.

        Examples:
            >>> both = fp.rank_features(model, saes, pairs, positions=["S2"], metric=["logit_diff", "log_prob"], progress=False)
            >>> both.metrics
            ['logit_diff', 'log_prob']
            >>> both.for_metric("log_prob").nodes == both.nodes
            True
        """
        if name not in self.metrics:
            raise FeatpatchError(
                f"metric {name!r} was not measured: expected one of {', '.join(self.metrics)}; to have it, rank with it too"
            )
        return cast(T, self.others.get(name, self))

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

    @property
    def with_gap(self) -> NDArray[np.bool_]:
        """A mask of the pairs whose gap is not near zero, `[pairs]`; other pairs have no per-pair ratio, which needs a gap."""
        return with_gap(self.clean, self.corrupted) if self.has_gap else np.ones(len(self.clean), dtype=bool)

    @property
    def indices(self) -> NDArray[np.int64]:
        """The index of the feature, head or neuron, `[rows]`; -1 for kinds without an index."""
        return np.array([-1 if node.index is None else node.index for node in self.nodes], dtype=np.int64)

    @property
    def changed_pairs(self) -> NDArray[np.int64]:
        """The number of pairs in which the node differs between the runs, `[rows]`."""
        return np.bincount(self.row, minlength=len(self))

    def _kept(self, key: str, compute: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Return an array of this table, computed at the first call."""
        if key not in self._computed:
            self._computed[key] = compute()
        return self._computed[key]

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

    @property
    def of_all(self) -> bool:
        """Whether `whole` ranks all nodes that differ, instead of nodes that were named, sets of nodes or random directions."""
        whole = self.whole
        apart = whole._kept("apart", lambda: np.array(any(node.kind in ("set", "random") for node in whole.nodes)))
        return "nodes" not in whole.metadata and not apart

    def where(self: T, **wanted: Any) -> T:
        """Return the rows whose node has these field values, e.g. `where(kind="feature", position="S2")`.

        Raises:
            FeatpatchError: a node has no such field, the kind is not one of `fp.nodes.KINDS`, or nothing was measured at this
                site or position or for this SAE.

        Examples:
            >>> errors = effects.where(kind="error")
            >>> [node.sae for node in errors.nodes]
            ['blocks.1.hook_resid_pre', 'blocks.3.hook_resid_post']
        """
        fields = Node.__dataclass_fields__
        if unknown := sorted(set(wanted) - set(fields)):
            raise FeatpatchError(f"unknown columns {', '.join(map(repr, unknown))}: expected some of {', '.join(fields)}")
        check_kinds((str, int, np.integer, type(None)), **wanted)
        if "kind" in wanted:
            check_choices(KINDS, kind=wanted["kind"])
        rows = [i for i, n in enumerate(self.nodes) if all(getattr(n, k) == v for k, v in wanted.items())]
        if not rows:
            check_measured(self.whole.nodes, self.metadata, wanted)
        return self.take(rows)

    def known(self: T) -> T:
        """Return the rows whose values are all known; after an interruption, those that were finished in every pair.

        Examples:
            >>> len(effects.known()) == len(effects)
            True
        """
        runs = {"recovery": self.denoised, "degradation": self.noised}
        known = np.ones(len(self), dtype=bool)
        known[self.row[np.any([np.isnan(runs[effect]) for effect in self.directions_run()], axis=0)]] = False
        return self.take(known)

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

    @property
    def route(self) -> str:
        """The route that paths take from sender to receiver, see `rank_paths`; empty if the table holds no paths."""
        return str(self.metadata.get("route", ""))

    @property
    def finished(self) -> bool:
        """Whether the sweep ran to its end; after an interruption some pairs are missing or some values are NaN."""
        return bool(self.metadata.get("finished", True))

    def directions_run(self) -> list[Effect]:
        """Return the effects that were run, recovery first.

        Examples:
            >>> effects.directions_run()
            ['recovery', 'degradation']
        """
        return [effect for effect, direction in EFFECTS.items() if direction in self.metadata["directions"]]
