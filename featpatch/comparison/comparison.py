"""The comparison of features with components over the same pairs."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd

from featpatch.comparison import cells, plot
from featpatch.comparison.cells import Agreement
from featpatch.comparison.written import Written
from featpatch.effects import Effect, Effects
from featpatch.errors import FeatpatchError, check_kinds, check_numbers
from featpatch.page import Frame, text
from featpatch.pairs import Pairs
from featpatch.untrusted import visible

SHOWN = 5
SAME = ("pairs", "of_pairs", "metric", "noise", "ablation")
"""The metadata entries in which the tables must agree."""
SLACK = 0.05
"""The largest accepted difference between the tables in the metric of an unpatched run, as a share of the metric's size."""


@dataclass(frozen=True, repr=False)
class Comparison:
    """The result of `compare`.

    Attributes:
        features, components: the tables that were compared.
        table: one row per component and dictionary at the same hook point and position, see `cells.joined`.
        agreement: for each effect, the agreement of components and features on the ranking of hook points and positions.
        written: the contributions of components to features; None if no model was given.
    """

    features: Effects
    components: Effects
    table: pd.DataFrame
    agreement: Mapping[Effect, Agreement]
    written: Written | None

    @property
    def through(self) -> pd.DataFrame:
        """For each of the top heads and MLPs, the features through which it acts; columns as in `written.Written`.

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

    def plot(self) -> Any:
        """Plot the effect of each cell's component against the sum over its features, as a `plotly.graph_objects.Figure`."""
        return plot.scatter(self.table, list(self.agreement))

    def _written(self) -> Written:
        if self.written is None:
            raise FeatpatchError(
                "the tables were compared without a model: expected one, to tell which component writes which feature; call "
                "compare(features, components, model=..., saes=..., pairs=...)"
            )
        return self.written

    def _sections(self) -> dict[str, pd.DataFrame]:
        """Return the tables to show, by title."""
        effects = list(self.agreement)
        agreed = [(effect, found.correlation, found.points) for effect, found in self.agreement.items()]
        sections = {
            "rank agreement of components and summed features": pd.DataFrame(agreed, columns=["effect", "Spearman", "cells"]),
            "components": cells.named(self.components.top(SHOWN, by=effects[0], kind=None), effects).drop(columns="sae"),
            "features": cells.named(self.features.top(SHOWN, by=effects[0]), effects),
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
        shown = [
            f"<p>{escape(title)}</p>{_filled(frame).to_html(index=False, escape=True, float_format='{:.3f}'.format)}"
            for title, frame in self._sections().items()
        ]
        return "".join([*shown, *(f"<p>{escape(note)}</p>" for note in self._notes())])


def compare(
    features: Effects, components: Effects, *, model: Any = None, saes: Any = None, pairs: Pairs | None = None, top: int = 20
) -> Comparison:
    """Compare features with components, by the same metric on the same pairs.

    If rows were taken from a table (`effects.top(20)`), only these are shown; sums run over all features that were ranked.

    With model, SAEs and pairs, the contribution of each component to each feature is measured: the residual stream is encoded
    with and without the change in what the component writes, clean minus corrupted, as in denoising. In noising, contributions
    have the opposite sign and the same shares. The definition is in `contributions`.

    Args:
        features: the table of `rank_features`.
        components: the table of `rank_components`.
        model, saes, pairs: the model, SAEs and pairs that were ranked, for `through` and `writers`; all three or none. SAEs
            that do not read the residual stream are left out.
        top: the number of components and of features to analyse, by recovery, or by degradation if recovery was not run; and
            the number of features to list for each component.

    Raises:
        FeatpatchError: the tables are of different pairs, metrics or models, share no direction, or are not tables of features
            and of components; a model is given without SAEs and pairs; or these are not those that were ranked.
    """
    check_kinds(Effects, features=features, components=components)
    check_numbers(1, top=top)
    effects = _shared_effects(features, components)
    table = cells.joined(features, components, effects)
    given = [value is not None for value in (model, saes, pairs)]
    if any(given) and not all(given):
        missing = ", ".join(name for name, there in zip(("model", "saes", "pairs"), given, strict=True) if not there)
        raise FeatpatchError(f"{missing} is missing: expected model, saes and pairs together, or none of them")
    written = None if pairs is None else Written.of(features, components, effects, model, saes, pairs, top)
    agreement = {effect: cells.agreement(table, effect) for effect in effects}
    return Comparison(features, components, Frame(table), agreement, written)


def _shared_effects(features: Effects, components: Effects) -> list[Effect]:
    """Return the effects that both tables hold, after checking that the tables can be compared.

    Raises:
        FeatpatchError: they can't, see `compare`.
    """
    if not any(node.sae for node in features.nodes) or any(node.sae for node in components.nodes) or not len(components):
        raise FeatpatchError(
            f"features holds {_kinds(features)} and components {_kinds(components)}: expected rows of SAEs in the first table "
            "and none in the second; call compare(rank_features(...), rank_components(...))"
        )
    for key in SAME:
        one, other = features.metadata.get(key), components.metadata.get(key)
        if one != other:
            raise FeatpatchError(
                f"{key} is {one!r} for the features and {other!r} for the components: expected the same, to compare their "
                "effects; rank both with the same pairs and metric"
            )
    counts, models = ([of(table) for table in (features, components)] for of in (_pairs, _model))
    if counts[0] != counts[1]:
        raise FeatpatchError(
            f"features has {counts[0]} pairs and components {counts[1]}: expected equally many; rank both alike"
        )
    for run in ("clean", "corrupted"):
        one, other = getattr(features, run), getattr(components, run)
        if np.abs(one - other).max() > SLACK * max(np.abs(features.clean).max(), np.abs(features.corrupted).max()):
            raise FeatpatchError(
                f"the metric of the {run} runs differs between the tables, by up to {np.abs(one - other).max():.3g}: expected "
                "the same runs; rank both alike"
            )
    if models[0] != models[1]:
        raise FeatpatchError(f"the tables are of models {models}: expected the same weights; rank both with one model")
    shared = [effect for effect in features.directions_run() if effect in components.directions_run()]
    if not shared:
        raise FeatpatchError(
            f"features holds {features.directions_run()} and components {components.directions_run()}: expected an effect that "
            "both hold; rank both in the same direction"
        )
    if features.rows_ranked > features.whole.ranked.sum():
        raise FeatpatchError(
            f"features holds {features.whole.ranked.sum()} of {features.rows_ranked} features that were ranked: expected "
            "all, to add up their effects; save and load the whole table"
        )
    return shared


def _filled(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table for display, with empty cells for unknown values."""
    return frame.astype(object).where(frame.notna(), "")


def _kinds(table: Effects) -> str:
    return ", ".join(sorted({node.kind for node in table.nodes})) or "no rows"


def _pairs(table: Effects) -> int:
    return len(table.clean)


def _model(table: Effects) -> str | None:
    found: str | None = table.metadata.get("model", {}).get("sha256")
    return found
