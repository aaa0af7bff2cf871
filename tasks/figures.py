"""The figures of a search, from the rows of its report.

What a mark says when it is pointed at is its ``description``: it ends up in the SVG as the mark's label, which screen
readers read, too. Altair draws them: one grammar for all figures, rendered in this process without a browser.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import altair

from tasks.axes import linear_axis, measure_axis
from tasks.drawing import BLUE, GREEN, GREY, PURPLE, SKY, VERMILION, YELLOW, chart_of, figure_of, line_colors
from tasks.report_tables import BEST, COMPARED, TRIED, UNIFORM, Row

FEW = 40  # layers; of more the points of a line are not drawn, they would touch
LINES = (BLUE, PURPLE, SKY, YELLOW)  # beside those of uniform and best
DEPTH = "decoder layer (0 is nearest to the input)"


def sparsity_by_layer(sparsities: Sequence[Row]) -> altair.LayerChart:
    """Realised sparsity of every decoder layer, by plan.

    Args:
        sparsities: as of ``sparsities_table``.
    """
    plans = {row["plan"]: row["kind"] for row in sparsities}
    names = {plan: _plan_label(plan, kind) for plan, kind in plans.items()}
    others = iter(LINES * len(plans))
    marks = {}
    for plan, kind in sorted(plans.items(), key=lambda item: (UNIFORM, BEST, COMPARED, TRIED).index(item[1])):
        color = {UNIFORM: VERMILION, BEST: GREEN, TRIED: GREY}.get(kind) or next(others)
        marks[names[plan]] = (color, 1.2 if kind == TRIED else 2.2)
    rows = [
        {
            "line": names[row["plan"]],
            "plan": row["plan"],
            "layer": row["layer"],
            "value": row["sparsity"],
            "said": f"{row['plan']}, layer {row['layer']}: sparsity {row['sparsity']:.4f}",
        }
        for row in sparsities
    ]
    axis = linear_axis([row["value"] for row in rows], "sparsity (fraction of weights removed)")
    return _lines(rows, marks, axis)  # linear: ATP's plans are straight lines


def error_by_layer(errors: Sequence[Row]) -> altair.LayerChart:
    """Reconstruction error of every layer's output over the energy of the dense one's, for uniform and best.

    Where the rows tell an error of the layer itself (``relative_local_error``), it is drawn thin.

    Args:
        errors: as of ``errors_table``.
    """
    rows, marks = [], {}
    colors = {UNIFORM: VERMILION, BEST: GREEN}
    parts = {"relative_error": "", "relative_local_error": ", added by the layer itself"}
    for column, part in parts.items():
        for row in errors:
            if row.get(column) is not None:
                name = f"{row['model']}{part}"
                marks[name] = (colors[row["model"]], 1.1 if part else 2.2)
                said = f"{name}, layer {row['layer']}: {row[column]:.4g} of the dense output's energy"
                rows.append(
                    {"line": name, "plan": name, "layer": row["layer"], "value": row[column], "said": said}
                )
    return _lines(
        rows, marks, measure_axis([row["value"] for row in rows], "squared error over dense energy")
    )


def sparsity_by_linear(linears: Sequence[Row]) -> altair.LayerChart:
    """Realised sparsity of every linear of the best plan, as a map of layers and linears.

    Args:
        linears: as of ``linears_table``.
    """
    rows = [
        {
            **row,
            "said": f"layer {row['layer']}, {row['linear']}: {row['sparsity']:.4f}, "
            f"{row['zeros']:,} of {row['weights']:,} weights",
        }
        for row in linears
    ]
    values = [row["sparsity"] for row in rows]
    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values) + 1e-9) / 10
    names = list(dict.fromkeys(row["linear"] for row in rows))
    layers = max(row["layer"] for row in rows) + 1
    ticks = [layer for layer in range(layers) if layer % (5 if layers > 12 else 1) == 0]
    legend = altair.Legend(gradientLength=200, gradientThickness=12, title="sparsity", tickCount=5)
    color = altair.Color(
        "sparsity:Q", scale=altair.Scale(scheme="viridis", domain=[low, high]), legend=legend
    )
    map_of_all = (
        chart_of(rows)
        .mark_rect()
        .encode(
            x=altair.X("layer:O", title=DEPTH, axis=altair.Axis(values=ticks, labelAngle=0)),
            y=altair.Y("linear:N", title=None, sort=names, axis=altair.Axis(labelLimit=150)),
            color=color,
            description="said:N",
        )
    )
    return figure_of(map_of_all, height=max(26 * len(names), 80))


def time_by_stage(stages: Sequence[Row]) -> altair.LayerChart:
    """When which stage was at work; pauses are left out.

    Args:
        stages: as of ``stages_table``.
    """
    unit, divisor = ("hours", 3600) if max(row["end"] for row in stages) > 3 * 3600 else ("seconds", 1)
    if unit == "seconds" and max(row["end"] for row in stages) > 600:
        unit, divisor = "minutes", 60
    rows = [
        {
            "stage": row["stage"],
            "key": row["key"],
            "start": row["start"] / divisor,
            "end": row["end"] / divisor,
            "said": f"{row['stage']}: {row['seconds']:.1f} s",
        }
        for row in stages
    ]
    names = list(dict.fromkeys(row["stage"] for row in rows))
    bars = (
        chart_of(rows)
        .mark_bar(color=BLUE, stroke=BLUE, strokeWidth=1.5, height=13)
        .encode(
            x=altair.X(
                "start:Q",
                title=f"{unit} at work since the beginning, pauses left out",
                scale=altair.Scale(zero=True),
            ),
            x2="end:Q",
            y=altair.Y("stage:N", title=None, sort=names, axis=altair.Axis(labelLimit=150)),
            description="said:N",
        )
    )
    return figure_of(bars, height=24 * len(names))


def _lines(
    rows: Sequence[Row], marks: Mapping[str, tuple[str, float]], axis: Mapping[str, Any]
) -> altair.LayerChart:
    """Lines by layer.

    Args:
        marks: colour and width of each line by its name, the important ones first: they are on top.
        axis: the vertical one.
    """
    names = list(marks)
    look = line_colors(marks)
    y = altair.Y("value:Q", **axis)
    x = altair.X(
        "layer:Q", title=DEPTH, axis=altair.Axis(tickMinStep=1), scale=altair.Scale(nice=False, padding=8)
    )
    layers = [
        chart_of([row for row in rows if row["line"] == name])
        .mark_line(strokeWidth=marks[name][1], aria=False)
        .encode(x=x, y=y, color=look, detail="plan:N")
        for name in reversed(names)
    ]
    strong = [row for row in rows if marks[row["line"]][1] > 1.5]
    few = len({row["layer"] for row in rows}) <= FEW
    dots = chart_of(strong).mark_circle(size=34 if few else 16, opacity=1)
    return figure_of(*layers, dots.encode(x=x, y=y, color=look, description="said:N"))


def _plan_label(plan: str, kind: str) -> str:
    return {BEST: f"best, {plan}", TRIED: "others that were tried"}.get(kind, plan)
