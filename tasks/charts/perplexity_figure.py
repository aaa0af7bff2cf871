"""The figure of perplexity, or of the divergence from the dense model, against beta."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair

from layerwise.scoring.criterion import KL, Criterion
from layerwise.scoring.perplexity import format_divergence, format_perplexity
from layerwise.tasks.charts.drawing import (
    BLUE,
    GREEN,
    GREY,
    INK,
    VERMILION,
    WIDE,
    Figure,
    chart_of,
    measure_axis,
)
from layerwise.tasks.results.report_tables import BEST, UNIFORM, Row
from layerwise.tasks.results.selection import TRIAL


def perplexity_by_beta(
    betas: Sequence[Row], dense: float, parameter: str = "beta", criterion: Criterion = "perplexity"
) -> Figure:
    """Draw the perplexities on the selection text: one point per plan, the dense model as a dashed line.

    With the criterion ``kl``, the divergences from the dense model are drawn instead; that of the dense model is 0. A bar
    is the 95 % interval of the paired difference to the best plan, drawn around the plan's figure. A hollow
    point is not significantly worse than the best plan. Crosses at the upper edge are plans that failed.

    Args:
        betas: rows of ``betas_table``. A plan with an offset is drawn only if it is the best one.
        dense: perplexity of the dense model.
        parameter: name of beta for the allocator of the search.
        criterion: figure that the plans were compared by.
    """
    of_perplexity = criterion == "perplexity"
    curve = [
        {**row, "category": _category(row), "label": _label(row), "figure": _figure(row)}
        for row in betas
        if not row["offset"] or row["kind"] == BEST
    ]
    shown = [row for row in curve if not row["failed"]]
    figures = [*([dense] if of_perplexity else []), *(row["figure"] for row in shown)]
    # Very long bars are clipped, so that they do not flatten the others.
    ends = [max(row["low"], min(figures) / 2) for row in shown]
    ends += [min(row["high"], 2 * max(figures)) for row in shown]
    axis = measure_axis(figures + ends, criterion if of_perplexity else f"{KL}, nats")
    y = altair.Y("figure:Q", **axis)
    meaning = " (increase in sparsity from one layer to the next)" if parameter == "beta" else ""
    scale_of_x = altair.Scale(padding=14, nice=False, zero=False)
    x = altair.X("beta:Q", title=f"{parameter}{meaning}", scale=scale_of_x, axis=altair.Axis(tickCount=6))
    named = f"dense: {format_perplexity(dense)}"
    of_dense = {named: (GREY, "stroke", GREY)} if of_perplexity else {}
    look = _encoding({row["category"]: _mark(row) for row in curve} | of_dense)
    level = [{"figure": dense, "category": named, "label": named}] if of_perplexity else []
    of_shown, of_failed = chart_of(shown), chart_of([row for row in curve if row["failed"]])
    bars = chart_of([row for row in shown if row["low"] < row["high"]])
    joined = [] if parameter == TRIAL else shown
    line = chart_of(joined).mark_line(strokeWidth=1.5, color=BLUE, opacity=0.5, aria=False)
    layers = (
        chart_of(level).mark_rule(strokeDash=[6, 4], strokeWidth=1.5, color=GREY, aria=False).encode(y=y),
        line.encode(x=x, y=y),
        bars.mark_rule(color=BLUE, strokeWidth=1.5, clip=True, aria=False).encode(
            x=x, y=altair.Y("low:Q", **axis), y2="high:Q"
        ),
        of_shown.mark_point(size=95, strokeWidth=2, opacity=1).encode(
            x=x, y=y, description="label:N", **look
        ),
        of_failed.mark_point(size=95, strokeWidth=2, opacity=1).encode(
            x=x, y=altair.value(8), description="label:N", **look
        ),
    )
    text: dict[str, Any] = {"fontSize": 13, "color": INK, "aria": False}
    of_uniform = chart_of([row for row in shown if row["kind"] == UNIFORM])
    of_best = chart_of([row for row in shown if row["kind"] == BEST])
    names = (
        of_uniform.mark_text(**text, align="left", dx=10, dy=-8).encode(x=x, y=y, text="kind:N"),
        of_best.mark_text(**text, dy=20).encode(x=x, y=y, text="kind:N"),
        chart_of(level)
        .mark_text(**text, align="right", dy=-8)
        .encode(x=altair.value(WIDE), y=y, text=altair.value("dense")),
    )
    return Figure(layers, names)


def _encoding(marks: Mapping[str, tuple[str, str, str]]) -> dict[str, object]:
    """Return the encodings of colour, shape and fill by the field ``category``, with a common legend."""
    names, columns = list(marks), list(zip(*marks.values(), strict=True))
    scales = [altair.Scale(domain=names, range=list(column)) for column in columns]
    legend = altair.Legend(columns=2)
    return {
        "stroke": altair.Stroke("category:N", title=None, scale=scales[0], legend=legend),
        "shape": altair.Shape("category:N", title=None, scale=scales[1], legend=legend),
        "fill": altair.Fill("category:N", title=None, scale=scales[2], legend=legend),
    }


def _category(row: Row) -> str:
    """Return the legend entry of a plan."""
    if row["failed"]:
        return "failed"
    if row["kind"] == BEST:
        return f"best, {row['plan']}: {_text(row, _figure(row))}"
    if row["kind"] == UNIFORM:
        return f"uniform: {_text(row, _figure(row))}"
    return "worse" if row["worse"] else "not significantly worse"


def _mark(row: Row) -> tuple[str, str, str]:
    """Return colour, shape and fill of a plan's point."""
    if row["failed"]:
        return GREY, "cross", "transparent"
    if row["kind"] == BEST:
        return GREEN, "diamond", GREEN
    if row["kind"] == UNIFORM:
        return VERMILION, "square", VERMILION
    return BLUE, "circle", BLUE if row["worse"] else "transparent"


def _label(row: Row) -> str:
    name = KL if "kl" in row else "perplexity"
    if row["failed"]:
        return f"{row['plan']}: failed, {name} {_text(row, _figure(row))}"
    bar = (
        f", 95 % interval {_text(row, row['low'])} to {_text(row, row['high'])}"
        if row["low"] < row["high"]
        else ""
    )
    return f"{row['plan']}: {name} {_text(row, _figure(row))}{bar}"


def _figure(row: Row) -> float:
    """Return the figure of a plan that is drawn: divergence or perplexity."""
    figure: float = row["kl"] if "kl" in row else row["perplexity"]
    return figure


def _text(row: Row, value: float) -> str:
    return format_divergence(value) if "kl" in row else format_perplexity(value)
