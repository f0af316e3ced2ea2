"""The sections of the report that show effects by hook point and position."""

import numpy as np
import pandas as pd
from markupsafe import Markup

from featpatch import sites
from featpatch.effects.table import Effects
from featpatch.nodes import Node
from featpatch.page.charts import Bar, bars, grid
from featpatch.page.page import Block, Section, table
from featpatch.reporting.conclusion import short_names

PLACES = 16
"""The largest number of hook points and positions in a chart; the table below it shows all."""

PARTS = {"activation": "whole", "all_features": "features", "error": "error"}
"""The parts of an activation with their names in charts."""


def sites_section(effects: Effects) -> Section | None:
    """Return the section of what the whole activation, all features and the error carry; None if nothing of it was measured."""
    run = effects.directions_run()
    frame = effects.sites()
    if len(frame):
        frame = frame.dropna(subset=[f"{effect}_{kind}" for effect in run for kind in PARTS], how="all", ignore_index=True)
    if not len(frame):
        return None
    names = short_names([Node(row["site"], "activation", None, row["position"], row["sae"]) for _, row in frame.iterrows()])
    sizes = frame[[f"{effect}_activation" for effect in run]].abs().max(axis=1).to_numpy()
    chosen = np.sort(np.argsort(-sizes, kind="stable")[:PLACES])
    nan = float("nan")
    charts = [
        bars(
            [Bar(names[n], [(float(frame[f"{effect}_{kind}"].iloc[n]), nan, nan) for kind in PARTS]) for n in chosen],
            list(PARTS.values()),
            title=effects.titled(effect),
        )
        for effect in run
    ]
    shown = pd.DataFrame({"hook point": names, "changed features": frame["changed_features"]})
    for effect in run:
        for kind, words in PARTS.items():
            shown[f"{effect}: {words}"] = frame[f"{effect}_{kind}"].round(4) + 0.0
    text = (
        "What the whole activation carries, what all features of the SAE carry with the error term kept, and what the error "
        "term alone carries, which the SAE does not explain; effects.sites() also has their interaction."
    )
    if len(chosen) < len(frame):
        text += f" The charts show the {len(chosen)} places with the largest effects of {len(frame)}."
    side_by_side = Markup('<div class="columns narrow">{}</div>').format(Markup("").join(charts))
    first = ["hook point", f"{run[0]}: {PARTS['all_features']}", f"{run[0]}: {PARTS['error']}"]
    return Section("sites", "Whole activation, features, error", text, [side_by_side, table(shown, rows=10, first=first)])


def maps_section(effects: Effects, components: Effects | None) -> Section | None:
    """Return the section of effects by layer and position; None if there are none to show."""
    kinds = {node.kind for node in effects.nodes}
    charts = [_map(effects, "feature")] if "feature" in kinds and "screening" not in effects.metadata else []
    if components is not None:
        found = {node.kind for node in components.nodes}
        charts = [_map(components, kind) for kind in ("activation", "head") if kind in found] + charts
    text = (
        "Effects of components first, if they were ranked too; for heads and for features, the sum of their individual "
        "effects. Blue is positive, orange is negative; an empty cell holds no row."
    )
    side_by_side = Markup('<div class="columns">{}</div>').format(Markup("").join(charts))
    return Section("maps", "Effects by layer and position", text, [side_by_side]) if charts else None


def _height(site: str) -> tuple[int, int, str]:
    """Return a key that sorts hook points from the first to the last layer, and within a layer by where they are read."""
    name, inside, known = sites.short(site), sites.within(site), list(sites.ENTRIES)
    layer = int(name.split()[0][1:]) if name != site else -1
    return layer, known.index(inside) if inside in known else len(known), inside


def _map(effects: Effects, kind: str) -> Block:
    """Return a table of sums of effects by hook point and position."""
    rows = effects.take([row for row, node in enumerate(effects.nodes) if node.kind == kind])
    chosen = rows.directions_run()[0]
    cells: dict[tuple[str, str], float] = {}
    lines = {site: sites.short(site) for site in sorted({node.site for node in rows.nodes}, key=_height)}
    for node, value in zip(rows.nodes, rows.pooled(chosen).tolist(), strict=True):
        key = lines[node.site], str(node.position)
        cells[key] = cells.get(key, 0.0) + value
    columns = list(dict.fromkeys(str(node.position) for node in rows.nodes))
    names = {"activation": "whole activations", "head": "sum over heads", "feature": "sum over features"}
    values = [[cells.get((line, column)) for column in columns] for line in dict.fromkeys(lines.values())]
    return grid(values, list(dict.fromkeys(lines.values())), columns, title=f"{names[kind]}: {rows.titled(chosen)}")
