"""A figure of lines over layers or sparsities, in which wide lines are important and thin ones are not."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair

from layerwise.tasks.charts.drawing import chart_of, figure_of, line_colors

FEW = 40  # positions; with more of them, points are drawn small so that they do not touch
THIN = 1.5  # lines up to this width have no points


def line_figure(
    rows: Sequence[Mapping[str, Any]],
    marks: Mapping[str, tuple[str, float]],
    x_axis: Mapping[str, Any],
    y_axis: Mapping[str, Any],
) -> altair.LayerChart:
    """Draw lines with labelled points.

    Args:
        rows: one row per point: ``x``, ``y``, the name of its ``line``, ``detail`` to separate lines of the same name,
            and the ``label`` of the point.
        marks: colour and width of each line, by name. The first ones are drawn on top.
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
    return figure_of(*layers, dots.encode(x=x, y=y, color=look, description="label:N"))
