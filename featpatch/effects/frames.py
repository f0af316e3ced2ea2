"""Effects as pandas tables: per row, by hook point, by the value of a tag, and their stability in halves of the pairs.

The rank correlation of the halves is Spearman's (1904), from scipy. Each of the two rankings uses half of the pairs; the
ranking over all pairs is more stable than that.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, compress
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import rankdata

from featpatch.effects import statistics
from featpatch.effects.measured import Measured
from featpatch.effects.selection import WHERE_CHANGED
from featpatch.effects.statistics import quadrant_labels, spearman
from featpatch.errors import FeatpatchError, check_numbers, counted, decimal, is_integer
from featpatch.metrics import NEAR_ZERO, size
from featpatch.nodes import TOGETHER, Edge, Effect, Node, Position

LARGE = 0.1
"""The effect of an error, as a share of the gap, from which it is compared with the effect of all features."""


def number(value: float) -> str:
    """Write a number with two significant digits, but two to four decimals: `1.00`, `0.14`, `0.053`, `0.0053`."""
    if not np.isfinite(value) or not value:
        return "0" if value == 0 else str(value)
    decimals = min(max(2, 1 - int(np.floor(np.log10(abs(value))))), 4)
    short = round(value, decimals)
    return f"{short:.{decimals}f}" if short else "0.00"


def sample(effects: Measured) -> str:
    """Return the number of pairs, or of prompts without a counterfactual, with its noun."""
    return counted(len(effects.clean), "pair" if effects.has_gap else "prompt")


def notes(effects: Measured) -> list[str]:
    """Return what these rows do not show: whole activations that heads were ranked without, or a large error of an SAE."""
    whole = effects.whole
    rest = whole.take(~whole.ranked)
    values = dict(zip(rest.nodes, np.nan_to_num(rest.pooled(effects.directions_run()[0])).tolist(), strict=True))
    if any(node.kind == "feature" for node in chain(effects.nodes, compress(whole.nodes, whole.ranked))):
        return _large_errors(values) if effects.has_gap else []
    left_out = {node: value for node, value in values.items() if node.kind == "activation"}
    if not left_out or any(node.kind == "activation" for node in effects.nodes):
        return []
    largest = max(left_out, key=lambda node: left_out[node])
    return [
        f"not shown: {counted(len(left_out), 'whole activation')}, the largest of which is {largest} "
        f"({number(left_out[largest])}); effects.top(kind=None) ranks them too"
    ]


def _large_errors(values: Mapping[Node, float]) -> list[str]:
    """Return a note on the error with the largest effect of those with more effect than all features, where both are known."""
    both = ((node, replace(node, kind="all_features")) for node in values if node.kind == "error")
    large = [(node, every) for node, every in both if every in values and abs(values[node]) > max(LARGE, abs(values[every]))]
    if not large:
        return []
    node, every = max(large, key=lambda pair: abs(values[pair[0]]))
    return [
        f"{node} has a larger effect than all features there ({number(values[node])} and {number(values[every])}): these "
        "features are the smaller part of what matters; fp.check(model, saes, pairs) tells whether the SAE fits"
    ]


def full(effects: Measured) -> pd.DataFrame:
    """Return the table of `Effects.to_pandas`."""
    table = brief(effects)
    for effect in effects.directions_run():
        columns = {
            f"{effect}_median": effects.median(effect),
            f"{effect}_sign_consistency": effects.sign_consistency(effect),
            f"{effect}_p": effects.p_values(effect),
            f"{effect}_q": effects.q_values(effect),
        }
        if effect in effects.metadata.get("screening", {}).get("estimates", {}):
            beside = np.array(effects.metadata["screening"]["estimates"][effect])
            columns[f"{effect}_estimate"] = beside[effects.rows_in_whole()]
        for offset, (name, values) in enumerate(columns.items(), int(table.columns.get_loc(f"{effect}_high")) + 1):
            table.insert(offset, name, values)
    if effects.has_gap:
        table.insert(int(table.columns.get_loc("pairs")) + 1, "pairs_with_gap", int(effects.with_gap.sum()))
    table.insert(int(table.columns.get_loc("changed_pairs")) + 1, "smallest_p", effects.smallest_p)
    for metric in effects.others:
        columns = full(effects.for_metric(metric)).filter(regex="^(recovery|degradation)|^(quadrant|pairs_with_gap|unit)$")
        table = table.join(columns.add_prefix(f"{metric}_"))
    return table


def brief(effects: Measured) -> pd.DataFrame:
    """Return one row per node with the columns that are fast to compute, for display."""
    table = _fields(effects.nodes)
    if any(isinstance(node, Edge) for node in effects.nodes):
        table["sender"], table["receiver"] = (
            [str(getattr(node, end, "")) for node in effects.nodes] for end in ("sender", "receiver")
        )
        table["route"] = effects.route
    intervals = {effect: effects.interval(effect) for effect in effects.directions_run()}
    for effect, interval in intervals.items():
        table[effect], (table[f"{effect}_low"], table[f"{effect}_high"]) = effects.pooled(effect), interval.T
        if effect in effects.spread:
            table[f"{effect}_spread"] = effects.spread[effect]
    if len(intervals) == 2:
        carried = [effects.carried(effect) for effect in intervals]
        table["quadrant"] = quadrant_labels(list(intervals.values()), carried, effects.threshold)
    table["changed_pairs"] = effects.changed_pairs
    for effect in intervals:
        name = f"{effect}{WHERE_CHANGED}"
        table[name] = effects.pooled(effect, over="changed")
        table[f"{name}_low"], table[f"{name}_high"] = effects.interval(effect, over="changed").T
    table["pairs"], table["value"], table["unit"] = _having(effects), effects.value, effects.unit
    return table


def _having(effects: Measured) -> list[int]:
    """Return the number of pairs that have the position of each node: fewer than all for an index past the end of some."""
    lengths = np.array(effects.metadata.get("lengths", []))
    every = len(effects.clean)
    return [
        int((lengths > node.position).sum()) if lengths.size and is_integer(node.position) else every for node in effects.nodes
    ]


def _fields(nodes: Sequence[Node]) -> pd.DataFrame:
    """Return the fields of nodes as columns, one row per node."""
    table = pd.DataFrame({name: [getattr(node, name) for node in nodes] for name in Node.__dataclass_fields__})
    table["index"] = table["index"].astype("Int64")
    return table


def by_site(effects: Measured) -> pd.DataFrame:
    """Return the table of `Effects.sites`."""
    whole = effects.whole
    features = Counter((node.sae, node.site, node.position) for node in whole.nodes if node.kind == "feature")
    if "screening" in effects.metadata:
        features = Counter({tuple(key): count for *key, count in effects.metadata["screening"]["changed_features"]})
    at: dict[tuple[str, str, Position, str], int] = {
        (node.sae, node.site, node.position, node.kind): row for row, node in enumerate(whole.nodes)
    }
    pooled = {effect: np.append(whole.pooled(effect), [np.nan, 0.0]) for effect in whole.directions_run()}
    rows = []
    for sae, site, position in dict.fromkeys(
        (node.sae, node.site, node.position) for node in effects.nodes if node.sae and node.kind != "edge"
    ):
        row: dict[str, Any] = {"sae": sae, "site": site, "position": position}
        row["changed_features"] = sum(
            count
            for (owner, hook, where), count in features.items()
            if (owner, where) == (sae, position) and (hook == site or site.endswith(TOGETHER))
        )
        owners = {"activation": "", "all_features": sae, "error": sae}
        places = {kind: at.get((owner, site, position, kind)) for kind, owner in owners.items()}
        complete = row["changed_features"] == 0 or any(place is not None for place in places.values())
        lacking = -1 if effects.of_all and complete else -2  # no effect, or not measured
        for effect, values in pooled.items():
            for kind, place in places.items():
                row[f"{effect}_{kind}"] = values[lacking if place is None else place]
            parts = row[f"{effect}_all_features"] + row[f"{effect}_error"]
            row[f"{effect}_interaction"] = row[f"{effect}_activation"] - parts
        rows.append(row)
    return pd.DataFrame(rows)


def pairs_by_value(effects: Measured, tag: str) -> dict[str, NDArray[np.int64]]:
    """Return the indices of the pairs with each value of a tag, in order of appearance; pairs without the tag are left out.

    Raises:
        FeatpatchError: no pair has the tag, or all have the same value of it.
    """
    tags = effects.metadata.get("tags", [])
    values = [pair_tags.get(tag) for pair_tags in tags]
    distinct: list[str] = [value for value in dict.fromkeys(values) if value is not None]
    if not distinct:
        known = sorted({name for pair_tags in tags for name in pair_tags})
        raise FeatpatchError(
            f"no pair has a tag {tag!r}: expected one of {', '.join(known) or '(the pairs have no tags)'}; tag the pairs "
            f"before ranking, e.g. with fp.tasks or Pair(tags={{'corruption': ...}})"
        )
    if len(distinct) < 2:
        raise FeatpatchError(
            f"tag {tag!r} is {distinct[0]!r} in all pairs that have it: expected at least 2 values to compare; rank pairs with "
            "different values together, or choose another tag"
        )
    return {value: np.flatnonzero([other == value for other in values]) for value in distinct}


def by_tag(effects: Measured, tag: str, effect: Effect) -> pd.DataFrame:
    """Return the table of `Effects.by_tag`."""
    table = _fields(effects.nodes)
    change, rows, ranked = effects.whole.changes(effect).toarray(), effects.rows_in_whole(), effects.whole.ranked
    intervals = []
    for value, pairs in pairs_by_value(effects, tag).items():
        name, gap = f"{effect}_{value}", effects.scale[pairs]
        least = NEAR_ZERO * size(effects.clean[pairs], effects.corrupted[pairs])
        stands = not effects.has_gap or abs(gap.mean()) > least
        part = change[:, pairs] if stands else np.full((len(change), len(pairs)), np.nan)
        pooled, ranks = part.mean(axis=1) / gap.mean() if stands else part.mean(axis=1), np.full(len(change), np.nan)
        ranks[ranked] = rankdata(-pooled[ranked], method="min", nan_policy="omit")
        intervals.append(statistics.interval(part[rows], gap) if stands else np.full((len(rows), 2), np.nan))
        table[name], (table[f"{name}_low"], table[f"{name}_high"]) = pooled[rows], intervals[-1].T
        table[f"{name}_rank"] = pd.array(ranks[rows], dtype="Int64")
    table["depends"] = effects.ranked & _apart(intervals)
    return table


def _apart(intervals: list[NDArray[Any]]) -> NDArray[np.bool_]:
    """Return a mask of the rows in which some two of the intervals `[rows, 2]` do not overlap.

    Intervals that touch overlap, and NaN overlaps everything.
    """
    apart = [(one[:, 0] > other[:, 1]) | (other[:, 0] > one[:, 1]) for one, other in combinations(intervals, 2)]
    return np.any(apart, axis=0)


SPLITS = 100
TOP = 20
"""The default length of a ranking that something is said about: its stability, and what screening missed."""
LEAST_PAIRS = 4


@dataclass(frozen=True, repr=False)
class Stability:
    """The agreement of two halves of the pairs on the ranking of the features.

    Attributes:
        correlation: Spearman's rank correlation between the halves, mean over the splits; 1 for the same order, 0 for unrelated
            rankings.
        low, high: the range that holds 95 % of the splits' correlations, which is not a confidence interval of the mean.
        overlap: the share of one half's `top` largest features that are also among the other's, mean over the splits; NaN if
            there are no more than `top` features, because it would not depend on the rankings.
        chance: the expected overlap of unrelated rankings, `top / features`.
        top: the number of largest features whose overlap is measured.
        features: the number of features that were ranked.
        pairs: the number of pairs.
        splits: the number of random splits.
    """

    correlation: float
    low: float
    high: float
    overlap: float
    chance: float
    top: int
    features: int
    pairs: int
    splits: int

    def __repr__(self) -> str:
        shared = f"the halves share {self.overlap:.0%} of their top {self.top} ({self.chance:.0%} expected by chance)"
        if np.isnan(self.overlap):
            shared = f"overlap is not reported, because the top {self.top} would be all of the {self.features} features"
        return (
            f"rank correlation {decimal(self.correlation)} [{decimal(self.low)}, {decimal(self.high)}] between random halves "
            f"of {self.pairs} pairs, {self.splits} splits; {shared}"
        )


def split_half(change: NDArray[np.float64], gap: NDArray[np.float64], splits: int, top: int, seed: int) -> Stability:
    """Split the pairs into random halves `splits` times and compare the rankings of features by pooled effect.

    The gap of a half is the same for all features and does not change their order, so only the sign of the total gap is used. A
    half in which all features have the same effect gives no order and counts as correlation 0.

    Args:
        change: the changes, `[features, pairs]`; features with missing values are left out.
        gap: the gaps, `[pairs]`.
        splits, top, seed: as in `Effects.stability`, which describes the errors too.
    """
    change = change[~np.isnan(change).any(axis=1)] * np.sign(gap.sum())
    features, pairs = change.shape
    if pairs < LEAST_PAIRS:
        raise FeatpatchError(
            f"stability of {counted(pairs, 'pair')}: expected at least {LEAST_PAIRS}, two for each half; rank over more pairs"
        )
    if features < 2:
        raise FeatpatchError(
            f"stability of {counted(features, 'feature')} with known values: expected at least 2, which a ranking can order; "
            "choose an effect that was measured, or rank more positions or SAEs"
        )
    check_numbers(1, splits=splits, top=top)
    check_numbers(0, seed=seed)
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile(np.arange(pairs), (splits, 1)), axis=1)
    member = np.zeros((pairs, splits))
    np.put_along_axis(member, order[:, : pairs // 2].T, 1, axis=0)
    one, other = change @ member, change @ (1 - member)  # [features, splits]
    correlations = np.nan_to_num([spearman(a, b) for a, b in zip(one.T, other.T, strict=True)])
    low, high = np.quantile(correlations, [0.025, 0.975])
    overlap = np.nan
    if features > top:
        first = [np.argsort(-half, axis=0, kind="stable")[:top] for half in (one, other)]
        overlap = float(np.mean([len(np.intersect1d(a, b)) / top for a, b in zip(first[0].T, first[1].T, strict=True)]))
    return Stability(
        correlation=float(np.mean(correlations)),
        low=float(low),
        high=float(high),
        overlap=overlap,
        chance=min(top / features, 1.0),
        top=top,
        features=features,
        pairs=pairs,
        splits=splits,
    )
