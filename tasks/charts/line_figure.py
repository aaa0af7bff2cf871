"""A figure of lines, some of them more important than the others: by layer, or by sparsity."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair

from layerwise.tasks.charts.drawing import chart_of, figure_of, line_colors

FEW = 40  # places; of more the points of a line are drawn small, they would touch
THIN = 1.5  # up to this width a line has no points


def line_figure(
    rows: Sequence[Mapping[str, Any]],
    marks: Mapping[str, tuple[str, float]],
    x_axis: Mapping[str, Any],
    y_axis: Mapping[str, Any],
) -> altair.LayerChart:
    """Lines with points that say what they are.

    Args:
        rows: a point each: ``x``, ``y``, the name of its ``line``, what it is about in ``detail`` where several lines
            have one name, and ``said`` when it is pointed at.
        marks: colour and width of each line by its name, the important ones first: they are on top.
    """
    look = line_colors(marks)
    x = altair.X("x:Q", **x_axis, scale=altair.Scale(nice=False, zero=False, padding=8))
    y = altair.Y("y:Q", **y_axis)
    layers = [
        chart_of([row for row in rows if row["line"] == name])
        .mark_line(strokeWidth=marks[name][1], aria=False)
        .encode(x=x, y=y, color=look, detail="detail:N")
        for name in reversed(list(marks))
    ]
    strong = [row for row in rows if marks[row["line"]][1] > THIN]
    few = len({row["x"] for row in rows}) <= FEW
    dots = chart_of(strong).mark_circle(size=34 if few else 16, opacity=1)
    return figure_of(*layers, dots.encode(x=x, y=y, color=look, description="said:N"))
