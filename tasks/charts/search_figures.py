"""Figures of a search by layer, by linear and by stage, drawn from the tables of its report."""

import math
from collections.abc import Sequence
from dataclasses import replace

import altair

from layerwise.tasks.charts.drawing import (
    BLUE,
    GREY,
    OF_BEST,
    OF_UNIFORM,
    PURPLE,
    SKY,
    YELLOW,
    Figure,
    Look,
    chart_of,
    layer_axis,
    line_figure,
    linear_axis,
    measure_axis,
)
from layerwise.tasks.results.report_tables import BEST, COMPARED, TRIED, UNIFORM, Row

# Looks of lines other than uniform and best.
OTHERS = (
    Look(BLUE, dash=(2, 2), shape="circle"),
    Look(PURPLE, dash=(10, 3, 2, 3), shape="triangle-up"),
    Look(SKY, dash=(14, 4), shape="triangle-down"),
    Look(YELLOW, dash=(5, 2, 2, 2, 2, 2), shape="cross"),
)


def sparsity_by_layer(sparsities: Sequence[Row]) -> Figure:
    """Draw the realised sparsity of every decoder layer, by plan.

    Args:
        sparsities: rows of ``sparsities_table``.
    """
    plans = {row["plan"]: row["kind"] for row in sparsities}
    names = {plan: _plan_label(plan, kind) for plan, kind in plans.items()}
    others = iter(OTHERS * len(plans))
    looks = {}
    for plan, kind in sorted(plans.items(), key=lambda item: (UNIFORM, BEST, COMPARED, TRIED).index(item[1])):
        known = {UNIFORM: OF_UNIFORM, BEST: OF_BEST, TRIED: Look(GREY, 1.2, shape="stroke")}
        looks[names[plan]] = known.get(kind) or next(others)
    rows = [
        {
            "line": names[row["plan"]],
            "detail": row["plan"],
            "x": row["layer"],
            "y": row["sparsity"],
            "label": f"{row['plan']}, layer {row['layer']}: sparsity {row['sparsity']:.4f}",
        }
        for row in sparsities
    ]
    # A linear axis, because ATP's plans are straight lines.
    axis = linear_axis([row["y"] for row in rows], "sparsity (fraction of weights removed)")
    return line_figure(rows, looks, layer_axis(row["x"] for row in rows), axis)


def error_by_layer(errors: Sequence[Row]) -> Figure:
    """Draw the reconstruction error of every layer's output relative to the dense energy, for uniform and best.

    The error that the layer itself adds (``relative_local_error``) is drawn as a thin line if the rows have it.

    Args:
        errors: rows of ``errors_table``.
    """
    rows, looks = [], {}
    whole = {UNIFORM: OF_UNIFORM, BEST: OF_BEST}
    parts = {"relative_error": "", "relative_local_error": ", added by the layer itself"}
    for column, part in parts.items():
        for row in errors:
            if row.get(column) is not None:
                name = f"{row['model']}{part}"
                look = whole[row["model"]]
                looks[name] = replace(look, width=1.1, shape="stroke") if part else look
                label = f"{name}, layer {row['layer']}: {row[column]:.4g} of the dense output's energy"
                rows.append(
                    {"line": name, "detail": name, "x": row["layer"], "y": row[column], "label": label}
                )
    axis = measure_axis([row["y"] for row in rows], "squared error / dense energy")
    return line_figure(rows, looks, layer_axis(row["x"] for row in rows), axis)


def sparsity_by_linear(linears: Sequence[Row]) -> Figure:
    """Draw the realised sparsity of every linear of the best plan, as a map of layers and linears.

    Args:
        linears: rows of ``linears_table``.
    """
    rows = [
        {
            **row,
            "label": f"layer {row['layer']}, {row['linear']}: {row['sparsity']:.4f}, "
            f"{row['zeros']:,} of {row['weights']:,} weights",
        }
        for row in linears
    ]
    values = [row["sparsity"] for row in rows]
    low, high = math.floor(10 * min(values)) / 10, math.ceil(10 * max(values) + 1e-9) / 10
    names = list(dict.fromkeys(row["linear"] for row in rows))
    legend = altair.Legend(gradientLength=200, gradientThickness=12, title="sparsity", tickCount=5)
    color = altair.Color(
        "sparsity:Q", scale=altair.Scale(scheme="viridis", domain=[low, high]), legend=legend
    )
    map_of_all = (
        chart_of(rows)
        .mark_rect()
        .encode(
            x=altair.X("layer:O", **layer_axis(row["layer"] for row in rows)),
            y=altair.Y("linear:N", title=None, sort=names, axis=altair.Axis(labelLimit=150)),
            color=color,
            description="label:N",
        )
    )
    return Figure((map_of_all,), height=max(26 * len(names), 80))


def time_by_stage(stages: Sequence[Row]) -> Figure:
    """Draw the running times of the stages, without pauses.

    Args:
        stages: rows of ``stages_table``.
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
            "label": f"{row['stage']}: {row['seconds']:.1f} s",
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
                title=f"{unit} since the start, without pauses",
                scale=altair.Scale(zero=True),
            ),
            x2="end:Q",
            y=altair.Y("stage:N", title=None, sort=names, axis=altair.Axis(labelLimit=150)),
            description="label:N",
        )
    )
    return Figure((bars,), height=24 * len(names))


def _plan_label(plan: str, kind: str) -> str:
    return {BEST: f"best, {plan}", TRIED: "other plans"}.get(kind, plan)
