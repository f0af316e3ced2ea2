"""The comparison of features with components over the same pairs.

A *cell* is a hook point and a position at which both were ranked. It compares the effect of the whole activation there with the
sum of the effects of all single features of a dictionary.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go  # type: ignore[import-untyped]
from numpy.typing import NDArray

from featpatch import sites
from featpatch.comparison.tables import ContributionTables
from featpatch.effects.statistics import spearman
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_kinds, check_numbers, counted, listed
from featpatch.frame import Frame, text
from featpatch.nodes import TOGETHER, Effect
from featpatch.pairs.pairs import Pairs
from featpatch.untrusted import in_figure, visible

TIED = 1e-6
"""The share of the largest effect to which effects are rounded before they are ranked."""

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


def side_by_side(features: Effects, components: Effects, effects: Sequence[Effect]) -> pd.DataFrame:
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
    """Return the rows of `side_by_side` that are cells: whole activations that have features at the same place."""
    return table[(table["kind"] == "activation") & table["sae"].notna()]


def agreement(table: pd.DataFrame, effect: Effect) -> Agreement:
    """Measure the rank agreement over the cells of `side_by_side`; cells with unknown values are left out.

    Effects are rounded to multiples of `TIED` of the largest, because the order of closer ones is often due to rounding errors.
    """
    found = cells(table)
    pairs = found[[effect, f"{effect}_features"]].dropna().to_numpy(dtype=np.float64)
    pairs = np.round(pairs / (TIED * np.abs(pairs).max(0, initial=1e-30)))
    reason = _reason(table, len(found), pairs)
    return Agreement(np.nan if reason else spearman(*pairs.T), len(pairs), reason)


def _reason(table: pd.DataFrame, count: int, pairs: NDArray[np.float64]) -> str:
    """Return why there is no rank correlation over `count` cells, or an empty text if there is one.

    Args:
        table: the table of `side_by_side`.
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
            f"the tables share {len(pairs)} cells (hook point and position) with known effects{unknown}: expected at least 2 "
            "for a rank correlation; rank features and components at more positions or hook points"
        )
    constant = [name for name, values in zip(("components", "summed features"), pairs.T, strict=True) if not np.ptp(values)]
    if constant:
        return (
            f"the effects of the {' and of the '.join(constant)} are the same in all {len(pairs)} cells: expected effects "
            "that differ, to rank the cells by"
        )
    return ""


def _places(rows: pd.DataFrame) -> str:
    """Return the names of the first hook points of some rows, with their positions."""
    positions: dict[str, dict[str, None]] = defaultdict(dict)
    for site, position in zip(rows["site"], rows["position"], strict=True):
        positions[site][str(position)] = None
    return listed([f"{site} ({listed(list(of), LISTED)})" for site, of in positions.items()], LISTED) or "none"


def _advice(features: pd.DataFrame) -> str:
    """Return advice on which components to rank for a comparison with these features."""
    names = {name: hook for name, hook in sites.WHOLE.items() if any(site.endswith(f".{hook}") for site in features["site"])}
    if not names:
        return f"rank features of SAEs at {', '.join(sites.WHOLE)}: only there does rank_components patch whole activations"
    layers = sorted({sites.layer_of(site) for site in features["site"] if site.endswith(tuple(names.values()))})
    positions = list(dict.fromkeys(features["position"]))
    asked = "'each'" if set(map(type, positions)) == {int} else "'all'" if positions == ["all"] else repr(positions)
    options = f"sites={list(names)}, layers={layers}, positions={asked}"
    return f"call rank_components(model, pairs, {options}), or fp.ablate with these options if the features were ablated"


def _by_dictionary(features: Effects, effects: Sequence[Effect]) -> pd.DataFrame:
    """Return one row per dictionary, hook point and position, with the sum and the best of all features ranked there."""
    whole, shown = features.whole, {(node.site, node.position) for node in features.nodes}
    rows = defaultdict(list)
    for row, node in enumerate(whole.nodes):
        if node.kind == "feature":
            rows[node.sae, node.site, node.position].append(row)
    frame = whole.sites()
    places = zip(frame["site"], frame["position"], strict=True)
    frame = frame[[(site, at) in shown and not site.endswith(TOGETHER) for site, at in places]].reset_index(drop=True)
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


def scatter(table: pd.DataFrame, effects: Sequence[Effect]) -> go.Figure:
    """Plot one point per cell and effect, with names as tooltips and the diagonal on which both effects are equal."""
    found, figure = cells(table), go.Figure()
    names = [
        in_figure(f"{row['site']} @ {row['position']}" + (f" ({row['sae']})" if row["sae"] != row["site"] else ""))
        for _, row in found.iterrows()
    ]
    for effect in effects:
        figure.add_scatter(
            x=found[f"{effect}_features"].tolist(),
            y=found[effect].tolist(),
            mode="markers",
            name=effect,
            text=names,
            hovertemplate="%{text}<br>features %{x:.3f}, component %{y:.3f}",
        )
    values = found[[column for effect in effects for column in (effect, f"{effect}_features")]].to_numpy(dtype=np.float64)
    finite = [0.0, 1.0, *values[np.isfinite(values)]]
    low, high = float(min(finite)), float(max(finite))
    figure.add_shape(type="line", x0=low, y0=low, x1=high, y1=high, line_dash="dot")
    return figure.update_layout(xaxis_title="sum over individual features", yaxis_title="whole component")


SHOWN = 5
"""The number of rows of each table that are shown."""
SAME = ("pairs", "of_pairs", "metric", "unit", "noise", "ablation")
"""The metadata entries in which the tables must agree."""
SLACK = 0.05
"""The largest accepted difference between the tables in the metric of an unpatched run, as a share of the metric's size."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of `compare`.

    Attributes:
        features, components: the tables that were compared.
        table: one row per component and dictionary at the same hook point and position, see `side_by_side`.
        agreement: for each effect, the agreement of components and features on the ranking of hook points and positions.
        written: the contributions of components to features; None if no model was given.

    Examples:
        >>> comparison = fp.compare(effects, components, model=model, saes=saes, pairs=pairs, top=3)
        >>> comparison.writers[["sae", "feature", "site", "share"]].shape[1]
        4
        >>> comparison.plot().write_html(folder / "comparison.html")
    """

    features: Effects
    components: Effects
    table: pd.DataFrame
    agreement: Mapping[Effect, Agreement]
    written: ContributionTables | None

    @property
    def through(self) -> pd.DataFrame:
        """For each of the top heads and MLPs, the features through which it acts; columns as in `ContributionTables`.

        Raises:
            FeatpatchError: the comparison was made without a model.
        """
        return self._written().through

    @property
    def writers(self) -> pd.DataFrame:
        """For each of the top features, its writers: heads, MLPs and the residual stream that enters layer 0.

        Raises:
            FeatpatchError: the comparison was made without a model.
        """
        return self._written().writers

    def plot(self, *, title: str = "") -> Any:
        """Plot the effect of each cell's component against the sum over its features, as a `plotly.graph_objects.Figure`.

        Args:
            title: the title of the figure.
        """
        check_kinds(str, title=title)
        return scatter(self.table, list(self.agreement)).update_layout(title=in_figure(title))

    def _written(self) -> ContributionTables:
        if self.written is None:
            raise FeatpatchError(
                "the tables were compared without a model: expected a model, to trace which component writes which feature; "
                "call compare(features, components, model=..., saes=..., pairs=...)"
            )
        return self.written

    def _sections(self) -> dict[str, pd.DataFrame]:
        """Return the tables to show, by title."""
        effects = list(self.agreement)
        agreed = [(effect, found.correlation, found.points) for effect, found in self.agreement.items()]
        sections = {
            "rank agreement of components and summed features": pd.DataFrame(agreed, columns=["effect", "Spearman", "cells"]),
            "components": named(self.components.top(SHOWN, by=effects[0], kind=None), effects).drop(columns="sae"),
            "features": named(self.features.top(SHOWN, by=effects[0]), effects),
        }
        if self.written is not None:
            sections |= {"through": self.through.head(SHOWN), "writers": self.writers.head(SHOWN)}
        return sections

    def _notes(self) -> tuple[str, ...]:
        without: dict[str, list[str]] = defaultdict(list)
        for effect, found in self.agreement.items():
            without[found.reason].append(effect)
        reasons = [f"no Spearman correlation for {' and '.join(of)}: {reason}" for reason, of in without.items() if reason]
        return (*reasons, *(() if self.written is None else self.written.notes))

    def __repr__(self) -> str:
        shown = [f"{title}\n{text(frame.reset_index(drop=True))}" for title, frame in self._sections().items()]
        return "\n\n".join([*shown, *map(visible, self._notes())])

    def _repr_html_(self) -> str:
        shown = []
        for title, frame in self._sections().items():
            filled = frame.astype(object).where(frame.notna(), "")
            html = filled.to_html(index=False, escape=True, float_format="{:.3f}".format)
            shown.append(f"<p>{escape(title)}</p>{html}")
        return "".join([*shown, *(f"<p>{escape(note)}</p>" for note in self._notes())])


def compare(
    features: Effects, components: Effects, *, model: Any = None, saes: Any = None, pairs: Pairs | None = None, top: int = 20
) -> Comparison:
    """Compare features with components, by the same metric on the same pairs.

    If rows were taken from a table (`effects.top(20)`), only these are shown; sums run over all features that were ranked.

    With model, SAEs and pairs, the contribution of each component to each feature is measured: the residual stream is encoded
    with and without the change in what the component writes, clean minus corrupted, as in denoising. In noising, contributions
    have the opposite sign and the same shares. The definition is in `featpatch/comparison/writers.py`.

    Args:
        features: the table of `rank_features`.
        components: the table of `rank_components`.
        model, saes, pairs: the model, SAEs and pairs that were ranked, for `through` and `writers`; all three or none. SAEs
            that do not read the residual stream are left out.
        top: the number of components and of features to analyse, by recovery, or by degradation if recovery was not run; and
            the number of features to list for each component.

    Returns:
        The joined table and the rank agreement of both and, if a model is given, the writers of the features.

    Raises:
        FeatpatchError: the tables are of different pairs, metrics or models, share no direction, or are not tables of features
            and of components; a model is given without SAEs and pairs; or these are not those that were ranked.

    Examples:
        >>> both = fp.rank_features(model, saes[:1], pairs, positions=["S2", "end"], progress=False)
        >>> layers = fp.rank_components(model, pairs, sites="resid_pre", positions=["S2", "end"], progress=False)
        >>> comparison = fp.compare(both, layers)
        >>> comparison.agreement["recovery"].points, comparison.table["sae"].nunique()
        (2, 1)
    """
    check_kinds(Effects, features=features, components=components)
    check_numbers(1, top=top)
    effects = _shared_effects(features, components)
    table = side_by_side(features, components, effects)
    given = [value is not None for value in (model, saes, pairs)]
    if any(given) and not all(given):
        missing = ", ".join(name for name, there in zip(("model", "saes", "pairs"), given, strict=True) if not there)
        raise FeatpatchError(f"{missing} is missing: expected model, saes and pairs together, or none of them; pass it too")
    written = None if pairs is None else ContributionTables.of(features, components, effects, model, saes, pairs, top)
    agreements = {effect: agreement(table, effect) for effect in effects}
    return Comparison(features, components, Frame(table), agreements, written)


def _shared_effects(features: Effects, components: Effects) -> list[Effect]:
    """Return the effects that both tables hold, after checking that the tables can be compared.

    Raises:
        FeatpatchError: they can't, see `compare`.
    """
    if not any(node.sae for node in features.nodes) or any(node.sae for node in components.nodes) or not len(components):
        kinds = [", ".join(sorted({node.kind for node in of.nodes})) or "no rows" for of in (features, components)]
        raise FeatpatchError(
            f"the first table holds {kinds[0]} and the second {kinds[1]}: expected features of SAEs in the first and "
            "components in the second; call compare(rank_features(...), rank_components(...))"
        )
    for key in SAME:
        one, other = features.metadata.get(key), components.metadata.get(key)
        if one != other:
            said = "pairs differ" if key == "pairs" else f"{key} is {one!r} for the features and {other!r} for the components"
            raise FeatpatchError(
                f"{said}: expected the same {key}, since their effects are compared; rank both with the same pairs and metric"
            )
    counts = len(features.clean), len(components.clean)
    if counts[0] != counts[1]:
        raise FeatpatchError(
            f"the features were ranked over {counted(counts[0], 'pair')} and the components over {counts[1]}: expected the "
            "same pairs; rank both over them"
        )
    for run in ("clean", "corrupted"):
        one, other = getattr(features, run), getattr(components, run)
        if np.abs(one - other).max() > SLACK * max(np.abs(features.clean).max(), np.abs(features.corrupted).max()):
            raise FeatpatchError(
                f"the metric of the {run} runs differs between the tables, by up to {np.abs(one - other).max():.3g}: expected "
                "the same runs; rank both with the same model, pairs and metric"
            )
    models = [table.metadata.get("model", {}).get("sha256") for table in (features, components)]
    if models[0] != models[1]:
        raise FeatpatchError(
            "the tables were measured on models with different weights: expected the same ones; rank both with one model"
        )
    shared = [effect for effect in features.directions_run() if effect in components.directions_run()]
    if not shared:
        raise FeatpatchError(
            f"the feature table holds {', '.join(features.directions_run())} and the component table "
            f"{', '.join(components.directions_run())}: expected an effect that both hold; rank both in the same direction"
        )
    if not features.of_all:
        raise FeatpatchError(
            "the first table holds nodes that were named, or sets of nodes: expected all features, since their effects are "
            "summed; pass a table of rank_features"
        )
    if features.rows_ranked > features.whole.ranked.sum():
        raise FeatpatchError(
            f"the first table holds {features.whole.ranked.sum()} of {features.rows_ranked} ranked features: expected all of "
            "them, since their effects are summed; pass the whole table"
        )
    return shared
