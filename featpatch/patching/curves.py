"""Measure the effects of the top k features together, for growing k."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from featpatch.effects.collector import concatenated
from featpatch.effects.selection import measured_effect
from featpatch.effects.table import Effects
from featpatch.errors import FeatpatchError, check_kinds, check_numbers, counted
from featpatch.frame import Frame
from featpatch.metrics import Metrics
from featpatch.nodes import DIRECTIONS, EFFECTS, TOGETHER, Combine, Direction, Effect, Node, Patch, Position
from featpatch.page.page import Plotted
from featpatch.pairs.pair import Positions
from featpatch.pairs.pairs import Pairs
from featpatch.patching.features import feature_study
from featpatch.patching.joint import node_study
from featpatch.patching.noise import Noise
from featpatch.patching.sets import MOST, SetPart
from featpatch.patching.study import Options
from featpatch.untrusted import in_figure, visible

Key = tuple[str, Position]
"""The name of a dictionary and a position."""


ALL = "all SAEs"
"""The name that stands for all dictionaries together."""

SHOWN = 12
"""The largest number of dictionaries and positions that the `repr` of a curve names."""


@dataclass(frozen=True, repr=False)
class Curve(Plotted):
    """The effects of the top k features together, by dictionary and position.

    Attributes:
        features: the features of each dictionary and position, ordered by the effect of each alone: indices for a single SAE,
            otherwise nodes.
        single: the effects of single features, on the same pairs as the sets.
        sets: the effects of the sets, in rows of kind `set`; set n holds the first `sizes[n]` features.
        sizes: the number k of features in each set, by dictionary and position.

    Examples:
        >>> curve = fp.top_k_curve(model, saes[0], pairs, most=3, positions=["S2"], progress=False)
        >>> curve.table()[["k", "recovery", "recovery_low", "recovery_high"]].shape
        (3, 4)
        >>> curve.plot("recovery").layout.xaxis.title.text
        'features together'
    """

    features: Mapping[Key, Sequence[int] | Sequence[Node]]
    single: Effects
    sets: Effects
    sizes: Mapping[Key, Sequence[int]]

    def table(self) -> pd.DataFrame:
        """Return one row per dictionary, position and k.

        The columns are both effects of the set with 95 % intervals, and each effect as a share of the effect of all features
        (NaN if that is 0).
        """
        sets = self.sets
        keys = [(node.sae, node.position) for node in sets.nodes]
        table = Frame(keys, columns=["sae", "position"])
        table["k"] = [self.sizes[key][node.index or 0] for key, node in zip(keys, sets.nodes, strict=True)]
        alone = self.single.where(kind="all_features")
        for effect in sets.directions_run():
            low, high = sets.interval(effect).T
            table[effect], table[f"{effect}_low"], table[f"{effect}_high"] = sets.pooled(effect), low, high
            of_all = dict(zip(((node.sae, node.position) for node in alone.nodes), alone.pooled(effect), strict=True))
            whole = np.array([of_all.get(key, 0.0) for key in keys], dtype=np.float64)
            table[f"{effect}_of_all_features"] = table[effect] / np.where(whole == 0, np.nan, whole)
        order = sorted(range(len(keys)), key=lambda row: (list(self.sizes).index(keys[row]), table["k"][row]))
        return table.iloc[order].reset_index(drop=True)

    def __repr__(self) -> str:
        effects = self.sets.directions_run()
        shown = [f"effects of the top k features together, at {len(self.features)} dictionaries and positions:"]
        for (sae, position), rows in list(self.table().groupby(["sae", "position"], sort=False))[:SHOWN]:
            last = rows.iloc[-1]
            reached = ", ".join(f"{effect} {last[effect]:.2g}" for effect in effects)
            shown.append(f"  {sae} @ {position}: {counted(len(rows), 'set')}, {reached} with the top {last['k']}")
        more = [f"  and {len(self.features) - SHOWN} more"] if len(self.features) > SHOWN else []
        return visible("\n".join([*shown, *more]))

    def plot(self, effect: Effect | None = None, *, title: str = "") -> Any:
        """Return a `plotly.graph_objects.Figure` of effect by k with intervals, one line per dictionary and position.

        Args:
            effect: the effect to plot; by default recovery if it was run, else degradation.
            title: the title of the figure.

        Raises:
            FeatpatchError: the effect was not run.
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        chosen, table = measured_effect(effect, self.sets.directions_run()), self.table()
        figure = go.Figure(
            layout={"title": in_figure(title), "xaxis_title": "features together", "yaxis_title": chosen, "xaxis_type": "log"}
        )
        for (sae, position), rows in table.groupby(["sae", "position"], sort=False):
            up, down = rows[f"{chosen}_high"] - rows[chosen], rows[chosen] - rows[f"{chosen}_low"]
            figure.add_scatter(
                x=rows["k"], y=rows[chosen], name=in_figure(f"{sae} @ {position}"), error_y={"array": up, "arrayminus": down}
            )
        return figure

    _figure, _frame = plot, table


def top_k_curve(
    model: Any,
    saes: Any,
    pairs: Pairs,
    *,
    by: Effect = "recovery",
    most: int = MOST,
    rank_on: Pairs | None = None,
    positions: Positions = "all",
    directions: Sequence[Direction] = DIRECTIONS,
    metric: Metrics = "logit_diff",
    batch_rows: int | None = None,
    noise: Noise | None = None,
    across: bool = False,
    combine: Combine | None = None,
    progress: bool = True,
) -> Curve:
    """Measure the exact effects of the top k features together, k = 1, 2, ..., for each dictionary and position.

    With `across`, features of all dictionaries compete, and the top k of all are patched together.

    For controls with the same number of features, pass other dictionaries at the same hook point along with the SAE:
    `fp.dictionaries.identity(model, site)` (coordinates) or `fp.dictionaries.pca(model, site, pairs)`.

    Args:
        by: the effect by which features are ranked.
        most: the number of features in the largest set; k grows by a sixth from 12 on.
        across: whether to rank and patch the features of all dictionaries together.
        combine: what a patch of features at several hook points means, as in `rank_nodes`.
        rank_on: pairs on which single features are ranked; `pairs` by default, which makes the curve look better than it is.
        model, saes, pairs, positions, directions, metric, batch_rows, noise, progress: as in `rank_features`.

    Returns:
        The curve, with a table of one row per dictionary, position and k, and a figure.

    Raises:
        FeatpatchError: the input is unusable.

    Examples:
        >>> curve = fp.top_k_curve(model, saes[0], pairs, most=8, positions=["S2"], progress=False)
        >>> curve.table()["k"].tolist()
        [1, 2, 3, 4, 5, 6, 7, 8]
        >>> curve.table()[["recovery", "degradation"]].round(1).iloc[-1].to_dict()
        {'recovery': 0.5, 'degradation': 0.6}
    """
    check_numbers(1, most=most)
    check_kinds(str, by=by)
    check_kinds(Sequence, directions=directions)
    if by not in EFFECTS or EFFECTS[by] not in directions:
        raise FeatpatchError(
            f"by={by!r} with directions={list(directions)}: expected 'recovery' (denoising) or 'degradation' (noising), and "
            "its direction among directions"
        )
    check_kinds(bool, across=across)
    options = Options(positions=positions, directions=directions, metric=metric, batch_rows=batch_rows, noise=noise)
    single_features = partial(feature_study, model, saes, combine=combine, joint=True, **options)
    study, found = single_features(pairs)
    single = study.complete(progress=progress)
    ranking = single if rank_on is None else single_features(rank_on)[0].complete(progress=progress)
    features: dict[Key, list[Node]] = {}
    for node in ranking.top(len(ranking), by=by, kind="feature").nodes:
        best = features.setdefault((ALL if across else node.sae, node.position), [])
        if len(best) < most:
            best.append(node)
    sizes = {key: _sizes(len(best)) for key, best in features.items()}
    alone = [d for d in found if len(d.outputs) == 1 and not across]
    parts = []
    for dictionary in alone:
        own = {position: best for (name, position), best in features.items() if name == dictionary.name}
        sets = {
            position: [[dictionary.number(node) for node in best[:k]] for k in sizes[dictionary.name, position]]
            for position, best in own.items()
        }
        parts.append(SetPart(dictionary, sets))
    tables = [replace(study, parts=parts).complete(progress=progress)] if parts else []
    names = {dictionary.name for dictionary in alone}
    if joined := {key: best for key, best in features.items() if key[0] not in names}:
        asked = {key: [Patch(tuple(best[:k])) for k in sizes[key]] for key, best in joined.items()}
        patches = [patch for some in asked.values() for patch in some]
        joint_study, _ = node_study(model, saes, pairs, patches, combine=combine, **options)
        tables.append(_named_sets(joint_study.complete(progress=progress), asked))
    if not tables:
        raise FeatpatchError("no feature differs between the runs at these positions: expected at least one; choose others")
    shown = {key: [node.index or 0 for node in best] if key[0] in names else best for key, best in features.items()}
    return Curve(shown, single, concatenated(tables), sizes)


def _named_sets(effects: Effects, asked: Mapping[Key, Sequence[Patch]]) -> Effects:
    """Return the table of joint patches with each row named by dictionary, position and the number of its set."""
    names = [
        Node(f"{sae}{TOGETHER}", "set", number, position, sae)
        for (sae, position), some in asked.items()
        for number in range(len(some))
    ]
    others = {name: _named_sets(effects.for_metric(name), asked) for name in effects.others}
    return replace(effects, nodes=tuple(names[node.index or 0] for node in effects.nodes), others=others)


def _sizes(most: int) -> list[int]:
    """Return the sizes of the sets: 1, 2, 3, ... and then growing by a sixth, up to the largest."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(most, sizes[-1] + max(1, sizes[-1] // 6)))
    return sizes
