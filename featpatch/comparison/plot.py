"""A scatter plot of the effects of components against the summed effects of features at the same place."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go  # type: ignore[import-untyped]

from featpatch.comparison.cells import cells
from featpatch.effects import Effect
from featpatch.untrusted import in_figure


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
    return figure.update_layout(xaxis_title="sum over single features", yaxis_title="whole component")
