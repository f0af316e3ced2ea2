"""Plotly figures of effects, such as `effects.plot.quadrants()`; save one with `figure.write_html` or `write_image`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featpatch.effects.frames import by_site, sample
from featpatch.effects.grid import Grid, chosen, grid, in_order, kind_of
from featpatch.effects.measured import Measured
from featpatch.effects.selection import measured_effect
from featpatch.errors import FeatpatchError, check_kinds
from featpatch.nodes import Effect, Position
from featpatch.sites import within
from featpatch.untrusted import in_figure, visible

SHOWN = ("activation", "all_features", "error")
WORDS = {"activation": "whole activation", "all_features": "all features", "error": "error term", "head": "attention heads"}

GREY = "#c8c8c8"
"""The colour of cells that were not measured, which is no colour of the scale."""
DIVERGING = ((0.0, "#b2182b"), (0.25, "#f4a582"), (0.5, "#ffffff"), (0.75, "#92c5de"), (1.0, "#2166ac"))
"""A diverging scale that is white at 0."""
FACETS, COLUMNS = 12, 4
"""The largest number of heat maps in a figure, and of those in one row."""


def tick(position: int, token: str) -> str:
    """Return the text of a tick at a token, which differs from that of an equal token at another position."""
    return f"{position} {token!r}"


@dataclass(frozen=True)
class Plots:
    """The figures of one table; each method returns a `plotly.graph_objects.Figure`.

    Examples:
        >>> [trace.name for trace in effects.plot.quadrants().data][:2]
        ['blocks.1.hook_resid_pre', 'blocks.3.hook_resid_post']
    """

    _effects: Measured

    def quadrants(self, *, title: str = "") -> Any:
        """Plot degradation against recovery of the ranked rows, with a colour per SAE or hook point.

        Args:
            title: the title of the figure.

        Raises:
            FeatpatchError: only one direction was run, or the title is not a string.

        Examples:
            >>> effects.plot.quadrants().write_html(folder / "quadrants.html")
            >>> (folder / "quadrants.html").exists()
            True
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        if len(self._effects.directions_run()) < 2:
            raise FeatpatchError(
                "only one direction was measured: expected both, to plot recovery against degradation; rank with both "
                "directions"
            )
        rows = self._effects.take(self._effects.ranked)
        names = np.array([in_figure(node.sae or node.site) for node in rows.nodes])
        text = [in_figure(str(node)) for node in rows.nodes]
        x, y = rows.pooled("recovery"), rows.pooled("degradation")
        figure = go.Figure(layout={"title": in_figure(title), "xaxis_title": "denoising: recovery (sufficient?)",
                                   "yaxis_title": "noising: degradation (necessary?)"})  # fmt: skip
        for name in dict.fromkeys(names.tolist()):
            at = np.flatnonzero(names == name)
            figure.add_trace(
                go.Scattergl(x=x[at], y=y[at], text=[text[row] for row in at], mode="markers", name=name, marker={"size": 5})
            )
        return figure

    def sites(self, effect: Effect | None = None, *, title: str = "") -> Any:
        """Plot the effects of the whole activation, all features and the error term at each hook point and position as bars.

        Args:
            effect: the effect to plot; by default recovery if it was run, else degradation.
            title: the title of the figure.

        Raises:
            FeatpatchError: the effect was not run, or the title is not a string.

        Examples:
            >>> effects.plot.sites("degradation").layout.yaxis.title.text
            'degradation'
        """
        import plotly.graph_objects as go

        check_kinds(str, title=title)
        shown, table = measured_effect(effect, self._effects.directions_run()), by_site(self._effects)
        figure = go.Figure(layout={"title": in_figure(title), "yaxis_title": self._effects.titled(shown), "barmode": "group"})
        if len(table):
            names = [in_figure(f"{row['sae']} @ {row['position']}") for _, row in table.iterrows()]
            for kind in SHOWN:
                figure.add_bar(x=names, y=table[f"{shown}_{kind}"], name=WORDS[kind])
        return figure

    def heatmap(
        self, effect: Effect | None = None, *, kind: str | None = None, site: str | None = None,
        position: Position | None = None, title: str = "",
    ) -> Any:  # fmt: skip
        """Plot effects by layer and position, or by layer and head, with a heat map for each hook point of a layer.

        White is no effect. A node that is the same in both runs has exactly no effect; cells that were not measured are grey. A
        cell of features holds the sum of the effects of the features in the table, which were patched one at a time. If all
        clean prompts are the same, token indices are shown with their tokens.

        Args:
            effect: the effect to plot; by default recovery if it was run, else degradation.
            kind: the kind of node: `"activation"`, `"all_features"`, `"error"`, `"head"` or `"feature"`; by default the first
                of them that the table has, of this hook point and position.
            site: a hook point, or the name of a component such as `"z"`; by default all.
            position: a position; by default all, which for heads are a heat map each.
            title: the title; by default the kind of node, the effect and the number of pairs.

        Raises:
            FeatpatchError: the effect was not run, no row fits, or there would be more than 12 heat maps.

        Examples:
            >>> heads = fp.rank_components(model, pairs, sites="z", layers=[1], positions=["S2", "end"], progress=False)
            >>> figure = heads.plot.heatmap("recovery", kind="head", position="end")
            >>> figure.data[0].z.shape
            (1, 8)
        """
        from plotly.subplots import make_subplots  # type: ignore[import-untyped]

        check_kinds(str, title=title)
        shown, of = measured_effect(effect, self._effects.directions_run()), self._effects
        kind = kind_of(chosen(of, None, site, position)) if kind is None and len(of) else kind
        of_kind = chosen(of, kind, site, position)
        kind = of_kind.nodes[0].kind
        across = "head" if kind == "head" else "position"
        at: list[Position | None] = [position]
        if kind == "head":
            at = [*in_order(of, [node.position for node in of_kind.nodes])]
        found = {(within(node.site), node.position if kind == "head" else position) for node in of_kind.nodes}
        names = dict.fromkeys(within(node.site) for node in of_kind.nodes)
        facets = [facet for facet in product(names, at) if facet in found]
        if len(facets) > FACETS:
            raise FeatpatchError(
                f"the table has {kind}s at {len(facets)} hook points and positions: expected at most {FACETS} heat maps; "
                "choose with position= or site="
            )
        grids = [grid(chosen(of_kind, kind, *facet), ("layer", across), shown) for facet in facets]
        layers = sorted({layer for each in grids for layer in each.axes["layer"]})
        titles = [in_figure(visible(name if at is None else f"{name} @ {at}")) for name, at in facets]
        columns = min(len(facets), COLUMNS)
        figure = make_subplots(rows=-(-len(facets) // columns), cols=columns, subplot_titles=titles, shared_yaxes=True)
        values = [self._rows(each, layers) for each in grids]
        for number, (each, cells) in enumerate(zip(grids, values, strict=True)):
            row, column = divmod(number, columns)
            figure.add_heatmap(
                x=[self._name(entry, across) for entry in each.axes[across]], y=[str(layer) for layer in layers], z=cells,
                coloraxis="coloraxis", xgap=1, ygap=1,
                hovertemplate=f"layer %{{y}}, {across} %{{x}}: %{{z:.3f}}<extra></extra>",
                row=row + 1, col=column + 1,
            )  # fmt: skip
        largest = max(float(np.nanmax(np.abs(cells), initial=0.0)) for cells in values) or 1.0
        what = f"sum over features ({len(of_kind):,})" if kind == "feature" else WORDS.get(kind, kind)
        lines = [title or f"{what}: {of.titled(shown)} over {sample(of)}"]
        if any(np.isnan(cells).any() for cells in values):
            lines.append("grey: not measured")
        figure.update_layout(
            title="<br>".join(map(in_figure, lines)), plot_bgcolor=GREY, margin_t=80 + 20 * len(lines),
            coloraxis={"colorscale": DIVERGING, "cmin": -largest, "cmax": largest, "colorbar": {"title": of.titled(shown)}},
        )  # fmt: skip
        figure.update_xaxes(type="category", showgrid=False, title=across)
        if across == "position" and "tokens" in of.metadata:
            figure.update_xaxes(tickangle=-90, dtick=1)
        figure.update_yaxes(type="category", showgrid=False)
        figure.update_yaxes(title="layer", col=1)
        return figure

    @staticmethod
    def _rows(each: Grid, layers: Sequence[int]) -> NDArray[np.float64]:
        """Return the values of a grid with a row for each of the layers, NaN in layers that it lacks."""
        rows = np.full((len(layers), each.values.shape[1]), np.nan)
        rows[[layers.index(layer) for layer in each.axes["layer"]]] = each.values.numpy()
        return rows

    def _name(self, entry: Any, across: str) -> str:
        """Return the text of a tick: a head, or a position with its token if all clean prompts are the same."""
        tokens = self._effects.metadata.get("tokens", ())
        known = across == "position" and isinstance(entry, int) and -len(tokens) <= entry < len(tokens)
        return in_figure(tick(entry, tokens[entry]) if known else visible(str(entry)))
