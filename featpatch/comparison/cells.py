"""Components beside the features of the dictionaries at the same place, and how far the two rank places alike.

A *cell* is a site and a position at which both were ranked: the component is the whole activation there, beside it stands the
sum of the effects of all single features of a dictionary.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from featpatch import sites
from featpatch.effects import Effect, Effects


@dataclass(frozen=True)
class Agreement:
    """How far components and features rank the cells alike.

    Attributes:
        correlation: Spearman's rank correlation over the cells; NaN with fewer than 2, or where one side is constant.
        points: the number of cells.
    """

    correlation: float
    points: int


def joined(features: Effects, components: Effects, effects: Sequence[Effect]) -> pd.DataFrame:
    """One row per component and dictionary at its site and position; what one table lacks is NaN in its columns.

    Columns: `site`, `position`, `layer`; `kind`, `index` and each effect, e.g. `recovery`, of the component; `sae`,
    `changed_features`, and of each effect `recovery_features` (sum over single features), `recovery_all_features`,
    `recovery_error`, `recovery_activation`, `recovery_best` and `recovery_best_feature` (the largest of a single feature).
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
    """The nodes of a table with their pooled effects."""
    fields = ("site", "kind", "index", "position", "sae")
    frame = pd.DataFrame({name: pd.Series([getattr(node, name) for node in table.nodes], dtype=object) for name in fields})
    frame["index"] = frame["index"].astype("Int64")
    return frame.assign(**{effect: table.pooled(effect) for effect in effects})


def cells(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `joined` in which whole activations stand beside features."""
    return table[(table["kind"] == "activation") & table["sae"].notna()]


def agreement(table: pd.DataFrame, effect: Effect) -> Agreement:
    """Over the cells of `joined`; those with unknown values are left out."""
    pairs = cells(table)[[effect, f"{effect}_features"]].dropna().to_numpy(dtype=np.float64)
    ordered = len(pairs) > 1 and bool(np.ptp(pairs, axis=0).all())
    return Agreement(float(spearmanr(*pairs.T).statistic) if ordered else np.nan, len(pairs))


def _by_dictionary(features: Effects, effects: Sequence[Effect]) -> pd.DataFrame:
    """One row per dictionary, site and position of the table: sums and best features over all that were ranked there."""
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
