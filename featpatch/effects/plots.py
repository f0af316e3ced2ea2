"""Plotly figures of effects, such as `effects.plot.quadrants()`; save one with `figure.write_html` or `write_image`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from featpatch.effects.frames import by_site
from featpatch.effects.measured import Measured
from featpatch.errors import FeatpatchError
from featpatch.nodes import Effect
from featpatch.sites import layer_of
from featpatch.untrusted import in_figure

SHOWN = ("activation", "all_features", "error")
WORDS = {"activation": "whole activation", "all_features": "all features", "error": "error term"}


@dataclass(frozen=True)
class Plots:
    """The figures of one table; each method returns a `plotly.graph_objects.Figure`.

    Example:
        >>> [trace.name for trace in effects.plot.quadrants().data][:2]
        ['blocks.1.hook_resid_pre', 'blocks.3.hook_resid_post']
    """

    effects: Measured

    def quadrants(self) -> Any:
        """Plot degradation against recovery of the ranked rows, with a colour per SAE or hook point.

        Raises:
            FeatpatchError: only one direction was run.

        Example:
            >>> effects.plot.quadrants().write_html(folder / "quadrants.html")
            >>> (folder / "quadrants.html").exists()
            True
        """
        import plotly.graph_objects as go  # type: ignore[import-untyped]

        if len(self.effects.directions_run()) < 2:
            raise FeatpatchError(
                "only one direction was measured: expected both, to plot recovery against degradation; rank with both "
                "directions"
            )
        rows = self.effects.take(self.effects.ranked)
        names = np.array([in_figure(node.sae or node.site) for node in rows.nodes])
        text = [in_figure(str(node)) for node in rows.nodes]
        x, y = rows.pooled("recovery"), rows.pooled("degradation")
        figure = go.Figure(layout={"xaxis_title": "denoising: recovery (sufficient?)",
                                   "yaxis_title": "noising: degradation (necessary?)"})  # fmt: skip
        for name in dict.fromkeys(names.tolist()):
            at = np.flatnonzero(names == name)
            figure.add_trace(
                go.Scattergl(x=x[at], y=y[at], text=[text[row] for row in at], mode="markers", name=name, marker={"size": 5})
            )
        return figure

    def sites(self, effect: Effect | None = None) -> Any:
        """Plot the effects of the whole activation, all features and the error term at each hook point and position as bars.

        Args:
            effect: the effect to plot; by default recovery if it was run, else degradation.

        Example:
            >>> effects.plot.sites("degradation").layout.yaxis.title.text
            'degradation'
        """
        import plotly.graph_objects as go

        chosen, table = effect or self.effects.directions_run()[0], by_site(self.effects)
        figure = go.Figure(layout={"yaxis_title": self.effects.titled(chosen), "barmode": "group"})
        if len(table):
            names = [in_figure(f"{row['sae']} @ {row['position']}") for _, row in table.iterrows()]
            for kind in SHOWN:
                figure.add_bar(x=names, y=table[f"{chosen}_{kind}"], name=WORDS[kind])
        return figure

    def heatmap(self, effect: Effect | None = None, *, kind: str = "activation") -> Any:
        """Plot effects by layer and position, with a heatmap for each hook point of a layer.

        A cell holds the sum of the effects of all rows of one kind that are at the same hook point and position, for example of
        features that were patched one at a time.

        Args:
            effect: the effect to plot; by default recovery if it was run, else degradation.
            kind: the kind of node, such as `"activation"`, `"head"` or `"feature"`.

        Raises:
            FeatpatchError: the table has no row of this kind.

        Example:
            >>> heads = fp.rank_components(model, pairs, sites="z", layers=[1], positions=["S2", "end"], progress=False)
            >>> figure = heads.plot.heatmap("recovery", kind="head")
            >>> figure.data[0].type
            'heatmap'
        """
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots  # type: ignore[import-untyped]

        chosen = effect or self.effects.directions_run()[0]
        rows = self.effects.take([row for row, node in enumerate(self.effects.nodes) if node.kind == kind])
        if not len(rows):
            raise FeatpatchError(f"the table has no row of kind {kind!r}: expected one of {', '.join(self._kinds())}")
        cells: dict[str, dict[tuple[int, str], float]] = {}
        for node, value in zip(rows.nodes, rows.pooled(chosen), strict=True):
            of_component = cells.setdefault(in_figure(node.site.split(".", 2)[-1]), {})
            key = layer_of(node.site), in_figure(str(node.position))
            of_component[key] = of_component.get(key, 0.0) + float(value)
        positions = list(dict.fromkeys(in_figure(str(node.position)) for node in rows.nodes))
        layers = sorted({layer for of_component in cells.values() for layer, _ in of_component})
        figure = make_subplots(rows=1, cols=len(cells), subplot_titles=list(cells), shared_yaxes=True)
        for column, of_component in enumerate(cells.values(), 1):
            values = [[of_component.get((layer, position)) for position in positions] for layer in layers]
            figure.add_trace(
                go.Heatmap(x=positions, y=layers, z=values, coloraxis="coloraxis", hovertemplate="layer %{y} @ %{x}: %{z:.3f}"),
                row=1,
                col=column,
            )
        scale = {"colorscale": "RdBu", "cmid": 0, "colorbar": {"title": self.effects.titled(chosen)}}
        figure.update_layout(coloraxis=scale, yaxis_title="layer")
        figure.update_yaxes(dtick=1)
        return figure

    def _kinds(self) -> list[str]:
        return sorted({node.kind for node in self.effects.nodes})
