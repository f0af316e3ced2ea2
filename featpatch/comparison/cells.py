"""Comparison of components with the features of dictionaries at the same hook point and position.

A *cell* is a hook point and a position at which both were ranked. It compares the effect of the whole activation there with the
sum of the effects of all single features of a dictionary.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import spearmanr

from featpatch import sites
from featpatch.effects import Effect, Effects

LISTED = 4
"""The largest number of hook points, and of positions of each, that a reason names."""


@dataclass(frozen=True)
class Agreement:
    """The agreement of components and features on the ranking of the cells.

    Attributes:
        correlation: Spearman's rank correlation over the cells; NaN with fewer than 2, or where one side is constant.
        points: the number of cells.
        reason: why there is no correlation, and what to rank to get one; empty if there is one.
    """

    correlation: float
    points: int
    reason: str = ""


def joined(features: Effects, components: Effects, effects: Sequence[Effect]) -> pd.DataFrame:
    """Return one row per component and dictionary at the same hook point and position.

    Columns are `site`, `position` and `layer`; `kind`, `index` and each effect, such as `recovery`, of the component; and for
    the dictionary `sae`, `changed_features` and for each effect `recovery_features` (sum over single features),
    `recovery_all_features`, `recovery_error`, `recovery_activation`, `recovery_best` (the largest effect of a single feature)
    and `recovery_best_feature` (its index). If only one of the tables has the hook point and position, the columns of the other
    are NaN.
    """
    right = _by_dictionary(features, effects)
    left = named(components, effects).drop(columns="sae")
    places = [list(zip(side.pop("site"), side.pop("position"), strict=True)) for side in (left, right)]
    number = {place: index for index, place in enumerate(dict.fromkeys(places[0] + places[1]))}
    left["place"], right["place"] = ([number[place] for place in side] for side in places)
    table = left.merge(right, on="place", how="outer")
    names = list(number)
    site, position = zip(*[names[index] for index in table.pop("place")], strict=True)
    table.insert(0, "site", list(site))
    table.insert(1, "position", pd.Series(position, dtype=object))
    table.insert(2, "layer", [sites.layer_of(name) for name in site])
    return table


def named(table: Effects, effects: Sequence[Effect]) -> pd.DataFrame:
    """Return the fields of the nodes of a table with their pooled effects."""
    fields = ("site", "kind", "index", "position", "sae")
    frame = pd.DataFrame({name: pd.Series([getattr(node, name) for node in table.nodes], dtype=object) for name in fields})
    frame["index"] = frame["index"].astype("Int64")
    return frame.assign(**{effect: table.pooled(effect) for effect in effects})


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of `joined` that are cells: whole activations that have features at the same place."""
    return table[(table["kind"] == "activation") & table["sae"].notna()]


def agreement(table: pd.DataFrame, effect: Effect) -> Agreement:
    """Measure the rank agreement over the cells of `joined`; cells with unknown values are left out."""
    found = cells(table)
    pairs = found[[effect, f"{effect}_features"]].dropna().to_numpy(dtype=np.float64)
    reason = _reason(table, len(found), pairs)
    return Agreement(np.nan if reason else float(spearmanr(*pairs.T).statistic), len(pairs), reason)


def _reason(table: pd.DataFrame, count: int, pairs: NDArray[np.float64]) -> str:
    """Return why there is no rank correlation over `count` cells, or an empty text if there is one.

    Args:
        table: the table of `joined`.
        count: the number of cells.
        pairs: the known effects of components and of summed features, `[cells, 2]`.
    """
    if not count:
        return (
            "the tables have no hook point and position in common: the features are at "
            f"{_places(table[table['sae'].notna()])}, whole activations of components at "
            f"{_places(table[table['kind'] == 'activation'])}; {_advice(table[table['sae'].notna()])}"
        )
    if len(pairs) < 2:
        unknown = f" ({count - len(pairs)} more with unknown effects)" if len(pairs) < count else ""
        return (
            f"number of hook points and positions with known effects in both tables: {len(pairs)}{unknown}; a rank correlation "
            "needs at least 2; rank features and components at more positions or hook points"
        )
    constant = [name for name, values in zip(("components", "summed features"), pairs.T, strict=True) if not np.ptp(values)]
    if constant:
        return (
            f"the effects of the {' and of the '.join(constant)} are the same in all {len(pairs)} cells, which gives no order"
        )
    return ""


def _places(rows: pd.DataFrame) -> str:
    """Return the names of the first hook points of some rows, with their positions."""
    positions: dict[str, dict[str, None]] = defaultdict(dict)
    for site, position in zip(rows["site"], rows["position"], strict=True):
        positions[site][str(position)] = None
    shown = [f"{site} ({_listed(list(of))})" for site, of in positions.items()]
    return _listed(shown) if shown else "none"


def _listed(names: Sequence[str]) -> str:
    """Return the first names as a list in words, with the number of further names."""
    return ", ".join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def _advice(features: pd.DataFrame) -> str:
    """Return advice on which components to rank for a comparison with these features."""
    names = {name: hook for name, hook in sites.WHOLE.items() if any(site.endswith(f".{hook}") for site in features["site"])}
    if not names:
        return f"rank features of SAEs at {', '.join(sites.WHOLE)}: only there does rank_components patch whole activations"
    layers = sorted({sites.layer_of(site) for site in features["site"] if site.endswith(tuple(names.values()))})
    positions = list(dict.fromkeys(features["position"]))
    asked = "'each'" if set(map(type, positions)) == {int} else "'all'" if positions == ["all"] else repr(positions)
    return f"call rank_components(model, pairs, sites={list(names)}, layers={layers}, positions={asked})"


def _by_dictionary(features: Effects, effects: Sequence[Effect]) -> pd.DataFrame:
    """Return one row per dictionary, hook point and position, with the sum and the best of all features ranked there."""
    whole, shown = features.whole, {(node.site, node.position) for node in features.nodes}
    rows = defaultdict(list)
    for row, node in enumerate(whole.nodes):
        if node.kind == "feature":
            rows[node.sae, node.site, node.position].append(row)
    frame = whole.sites()
    frame = frame[[place in shown for place in zip(frame["site"], frame["position"], strict=True)]].reset_index(drop=True)
    kept = frame[["sae", "site", "position", "changed_features"]].astype({"changed_features": "Int64"})
    found = [rows[key] for key in zip(frame["sae"], frame["site"], frame["position"], strict=True)]
    for effect in effects:
        pooled = whole.pooled(effect)
        best = [max(some, key=lambda row: np.nan_to_num(pooled[row], nan=-np.inf), default=None) for some in found]
        kept[f"{effect}_features"] = [float(pooled[some].sum()) for some in found]
        for kind in ("all_features", "error", "activation"):
            kept[f"{effect}_{kind}"] = frame[f"{effect}_{kind}"]
        kept[f"{effect}_best"] = [np.nan if row is None else float(pooled[row]) for row in best]
        indices = [None if row is None else whole.nodes[row].index for row in best]
        kept[f"{effect}_best_feature"] = pd.array(indices, dtype="Int64")
    return kept
