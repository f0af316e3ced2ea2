"""Effects as pandas tables: all columns, those that are fast to compute, and a summary by hook point."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from featpatch.effects.quadrants import named
from featpatch.patch import Edge, Node, Position

if TYPE_CHECKING:
    from featpatch.effects.effects import Effects

WHERE_CHANGED = "_where_changed"
"""The suffix of effects that are pooled over the pairs in which the node differs."""


def number(value: float) -> str:
    """Write a number with two significant digits, but two to four decimals: `1.00`, `0.14`, `0.053`, `0.0053`."""
    if not np.isfinite(value) or not value:
        return "0" if value == 0 else str(value)
    decimals = min(max(2, 1 - int(np.floor(np.log10(abs(value))))), 4)
    short = round(value, decimals)
    return f"{short:.{decimals}f}" if short else "0.00"


def rounded(frame: pd.DataFrame) -> pd.DataFrame:
    """Round the floats of a table to four significant digits, for display."""
    floats = frame.select_dtypes("float")
    return frame.assign(**{name: [float(f"{value:.4g}") for value in floats[name]] for name in floats})


def full(effects: "Effects") -> pd.DataFrame:
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
    table.insert(int(table.columns.get_loc("pairs")) + 1, "pairs_with_gap", int(effects.with_gap.sum()))
    table.insert(int(table.columns.get_loc("changed_pairs")) + 1, "smallest_p", effects.smallest_p)
    for metric, other in effects.others.items():
        columns = other.to_pandas().filter(regex="^(recovery|degradation)|^(quadrant|pairs_with_gap)$")
        table = table.join(columns.add_prefix(f"{metric}_"))
    return table


def brief(effects: "Effects") -> pd.DataFrame:
    """Return one row per node with the columns that are fast to compute, for display."""
    table = pd.DataFrame({name: [getattr(node, name) for node in effects.nodes] for name in Node.__dataclass_fields__})
    table["index"] = table["index"].astype("Int64")
    if any(isinstance(node, Edge) for node in effects.nodes):
        table["sender"], table["receiver"] = (
            [str(getattr(node, end, "")) for node in effects.nodes] for end in ("sender", "receiver")
        )
    intervals = {effect: effects.interval(effect) for effect in effects.directions_run()}
    for effect, interval in intervals.items():
        table[effect], (table[f"{effect}_low"], table[f"{effect}_high"]) = effects.pooled(effect), interval.T
    if len(intervals) == 2:
        carried = [effects.carried(effect) for effect in intervals]
        table["quadrant"] = named(list(intervals.values()), carried, effects.threshold)
    table["changed_pairs"] = effects.changed_pairs
    for effect in intervals:
        name = f"{effect}{WHERE_CHANGED}"
        table[name] = effects.pooled(effect, over="changed")
        table[f"{name}_low"], table[f"{name}_high"] = effects.interval(effect, over="changed").T
    table["pairs"], table["value"] = len(effects.clean), effects.value
    return table


def by_site(effects: "Effects") -> pd.DataFrame:
    """Return the table of `Effects.sites`."""
    features = Counter((node.sae, node.site, node.position) for node in effects.nodes if node.kind == "feature")
    if "screening" in effects.metadata:
        features = Counter({tuple(key): count for *key, count in effects.metadata["screening"]["changed_features"]})
    at: dict[tuple[str, str, Position, str], int] = {
        (node.sae, node.site, node.position, node.kind): row for row, node in enumerate(effects.nodes)
    }
    pooled = {effect: np.append(effects.pooled(effect), 0.0) for effect in effects.directions_run()}
    rows = []
    for sae, site, position in dict.fromkeys(
        (node.sae, node.site, node.position) for node in effects.nodes if node.sae and node.kind != "edge"
    ):
        row: dict[str, Any] = {"sae": sae, "site": site, "position": position}
        row["changed_features"] = features[sae, site, position]
        for effect, values in pooled.items():
            for kind, owner in (("activation", ""), ("all_features", sae), ("error", sae)):
                row[f"{effect}_{kind}"] = values[at.get((owner, site, position, kind), -1)]
            parts = row[f"{effect}_all_features"] + row[f"{effect}_error"]
            row[f"{effect}_interaction"] = row[f"{effect}_activation"] - parts
        rows.append(row)
    return pd.DataFrame(rows)
