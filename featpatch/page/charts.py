"""Charts as HTML with inline SVG, which need no script, follow the width of the page and print as they are shown.

Horizontal coordinates are percentages and text keeps its size, so that a chart is as readable on a phone as on a wide screen.
Series differ in shape as well as in colour.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from featpatch.page.page import Block, block

Value = tuple[float, float, float]
"""A value with the ends of its interval, which are NaN if there is none."""

TICKS = 5
"""The number of ticks that an axis has at least about half of."""

APART = 30.0, 5.0
"""How far apart, in percent of a chart's width or height, points with labels are; one closer to another goes without."""

STYLES = 8
"""The number of shapes and colours."""

DOTS = 400
"""The resolution of a scatter chart: of several dots that fall into one of `DOTS` x `DOTS` cells, one is drawn."""


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart.

    Attributes:
        name: the text beside the bars.
        values: one value per series.
        text: the numbers as text, shown at the end of the row.
        anchor: the name of the anchor that the row's name links to; empty for none.
    """

    name: str
    values: Sequence[Value]
    text: str = ""
    anchor: str = ""


@dataclass(frozen=True)
class Points:
    """A series of points.

    Attributes:
        name: the name of the series in the legend.
        x, y: the coordinates.
        texts: the tooltip of each point; without tooltips the points are drawn as small dots, several at one place as one.
        named: the number of points, from the first, that are labelled with their text.
        low, high: the ends of the intervals of `y`; empty for none.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    texts: Sequence[str] = ()
    named: int = 0
    low: Sequence[float] = ()
    high: Sequence[float] = ()


@dataclass(frozen=True)
class Axis:
    """An axis that covers all finite values and, unless it is logarithmic, 0.

    Attributes:
        title: the title.
        low, high: the values at its ends.
        log: whether it is logarithmic.
    """

    title: str
    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, title: str, values: Sequence[float], *, log: bool = False) -> "Axis":
        """Return the axis that the values need, with a margin of 4 %."""
        finite = [float(value) for value in values if math.isfinite(value)]
        low, high = min(finite, default=1.0 if log else 0.0), max(finite, default=1.0)
        if log:
            return cls(title, low / 1.15, high * 1.15, log)
        low, high = min(low, 0.0), max(high, 0.0)
        margin = 0.04 * (high - low or 1.0)
        return cls(title, low - margin if low < 0 else 0.0, high + margin)

    def at(self, value: float) -> float:
        """Return the place of a value, from 0 to 100."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return round(100 * (value - low) / (high - low), 2)

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The place and the text of every tick."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            marks = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            return [(self.at(mark), f"{mark:g}") for mark in marks if self.low <= mark <= self.high]
        rough = (self.high - self.low) / TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
        first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [(self.at(n * step), f"{n * step:.6g}") for n in range(first, last + 1)]


def bars(rows: Sequence[Bar], series: Sequence[str], *, title: str) -> Block:
    """Return a chart with a group of horizontal bars per row, one per series, with their intervals.

    Args:
        rows: the rows, from top to bottom.
        series: the names of the series.
        title: what the lengths mean.
    """
    axis = Axis.over(title, [number for row in rows for value in row.values for number in value])
    drawn = [
        {
            "row": row,
            "bars": [
                {
                    "left": min(axis.at(value), axis.at(0.0)),
                    "width": abs(axis.at(value) - axis.at(0.0)),
                    "end": axis.at(value),
                    "interval": (axis.at(low), axis.at(high)) if math.isfinite(low) else None,
                }
                if math.isfinite(value)
                else None
                for value, low, high in row.values
            ],
        }
        for row in rows
    ]
    step = 14 if len(series) < 3 else 10
    return block("bars.html", rows=drawn, series=series, axis=axis, zero=axis.at(0.0), step=step)


def points(
    series: Sequence[Points],
    x: str,
    y: str,
    *,
    log: bool = False,
    joined: bool = False,
    diagonal: bool = False,
    lines: tuple[Sequence[float], Sequence[float]] = ((), ()),
) -> Block:
    """Return a chart of points.

    Args:
        series: the series; the place in this list decides the shape and the colour, and those without points are left out.
        x, y: the titles of the axes.
        log: whether the horizontal axis is logarithmic.
        joined: whether the points of a series are joined by lines.
        diagonal: whether the line of equal coordinates is drawn; both axes then are the same.
        lines: the coordinates of dashed vertical lines, and of dashed horizontal ones.
    """
    all_x = [number for each in series for number in each.x] + list(lines[0])
    all_y = [number for each in series for number in (*each.y, *each.low, *each.high)] + list(lines[1])
    if diagonal:
        all_x = all_y = all_x + all_y
    across, up = Axis.over(x, all_x, log=log), Axis.over(y, all_y)
    shown = [{**_drawn(each, across, up), "style": n % STYLES} for n, each in enumerate(series) if len(each.x)]
    drawn = sorted(shown, key=lambda each: not each["dots"])
    dashed = [[axis.at(number) for number in of_axis] for axis, of_axis in zip((across, up), lines, strict=True)]
    return block("points.html", series=drawn, across=across, up=up, joined=joined, diagonal=diagonal, dashed=dashed)


def _drawn(each: Points, across: Axis, up: Axis) -> dict[str, object]:
    """Return a series as places on the axes; points that are not finite are left out."""
    found = [
        (across.at(a), 100 - up.at(b), n)
        for n, (a, b) in enumerate(zip(each.x, each.y, strict=True))
        if math.isfinite(a) and math.isfinite(b)
    ]
    if not each.texts:
        cell = 100 / DOTS
        dots = dict.fromkeys((round(round(a / cell) * cell, 2), round(round(b / cell) * cell, 2)) for a, b, _ in found)
        return {"name": each.name, "dots": list(dots), "marks": [], "whiskers": []}
    named: dict[int, tuple[float, float]] = {}
    for a, b, n in found[: each.named]:
        if all(abs(a - x) > APART[0] or abs(b - y) > APART[1] for x, y in named.values()):
            named[n] = a, b
    ends = zip(each.low, each.high, strict=True) if each.low else ()
    whiskers = {n: (100 - up.at(low), 100 - up.at(high)) for n, (low, high) in enumerate(ends) if math.isfinite(low)}
    return {
        "name": each.name,
        "dots": [],
        "marks": [(a, b, each.texts[n], n in named) for a, b, n in found],
        "whiskers": [(a, *whiskers[n]) for a, _, n in found if n in whiskers],
    }


def grid(values: Sequence[Sequence[float | None]], rows: Sequence[str], columns: Sequence[str], *, title: str) -> Block:
    """Return a table whose cells are coloured by their values, blue for positive and orange for negative ones.

    Args:
        values: the value of every cell, by row; None where there is none. A value that is not finite has an empty cell too.
        rows: the names of the rows.
        columns: the names of the columns.
        title: the caption.
    """
    finite = [[None if value is None or not math.isfinite(value) else value for value in line] for line in values]
    largest = max((abs(value) for line in finite for value in line if value is not None), default=0.0)
    lines = [
        (
            name,
            [(None, 0) if value is None else (round(value, 2) + 0.0, round(100 * value / (largest or 1.0))) for value in line],
        )
        for name, line in zip(rows, finite, strict=True)
    ]
    return block("grid.html", lines=lines, columns=columns, title=title)


def strips(rows: Sequence[tuple[str, Sequence[float]]], texts: Sequence[str]) -> Block:
    """Return a chart with a line of dots per row, all on one horizontal axis; of dots within half a percent one is drawn.

    Args:
        rows: the name of each row with its values; those that are not finite are left out.
        texts: the tooltip of each value, the same for all rows.
    """
    axis = Axis.over("", [value for _, values in rows for value in values])
    drawn = []
    for name, values in rows:
        dots: dict[float, str] = {}
        for value, text in zip(values, texts, strict=True):
            if math.isfinite(value):
                dots.setdefault(round(2 * axis.at(value)) / 2, f"{text}: {value:.3g}")
        drawn.append((name, list(dots.items())))
    return block("strips.html", rows=drawn, axis=axis, zero=axis.at(0.0))
