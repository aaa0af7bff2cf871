"""The figure of perplexity against beta."""

from collections.abc import Mapping, Sequence

import altair

from layerwise.tasks.charts.axes import measure_axis
from layerwise.tasks.charts.drawing import BLUE, GREEN, GREY, VERMILION, chart_of, figure_of
from layerwise.tasks.pages.report_tables import BEST, UNIFORM, Row
from layerwise.tasks.results.selection import TRIAL
from layerwise.tasks.results.summary import number


def perplexity_by_beta(betas: Sequence[Row], dense: float, parameter: str = "beta") -> altair.LayerChart:
    """Perplexity on the selection text: one point per plan, the dense model as a line.

    A bar is the 95 % interval of the paired difference to the best plan, drawn around the plan's own perplexity. A
    hollow point is not significantly worse than the best. Crosses at the upper edge are plans that failed.

    Args:
        betas: as of ``betas_table``. Of those with an offset only the best one is drawn.
        dense: the dense model's perplexity.
    """
    curve = [
        {**row, "looks": _looks(row), "said": _said(row)}
        for row in betas
        if not row["offset"] or row["kind"] == BEST
    ]
    shown = [row for row in curve if not row["failed"]]
    perplexities = [dense, *(row["perplexity"] for row in shown)]
    # Of bars that leave the others far behind only a part is seen.
    ends = [max(row["low"], min(perplexities) / 2) for row in shown]
    ends += [min(row["high"], 2 * max(perplexities)) for row in shown]
    axis = measure_axis(perplexities + ends, "perplexity")
    y = altair.Y("perplexity:Q", **axis)
    meaning = " (each layer's sparsity above that of the one before)" if parameter == "beta" else ""
    scale_of_x = altair.Scale(padding=14, nice=False, zero=False)
    x = altair.X("beta:Q", title=f"{parameter}{meaning}", scale=scale_of_x, axis=altair.Axis(tickCount=6))
    look = _looking(
        {row["looks"]: _mark(row) for row in curve} | {f"dense: {number(dense)}": (GREY, "stroke", GREY)}
    )
    level = [{"perplexity": dense, "looks": f"dense: {number(dense)}", "said": f"dense: {number(dense)}"}]
    of_shown, of_failed = chart_of(shown), chart_of([row for row in curve if row["failed"]])
    bars = chart_of([row for row in shown if row["low"] < row["high"]])
    joined = [] if parameter == TRIAL else shown
    line = chart_of(joined).mark_line(strokeWidth=1.5, color=BLUE, opacity=0.5, aria=False)
    return figure_of(
        chart_of(level).mark_rule(strokeDash=[6, 4], strokeWidth=1.5, color=GREY, aria=False).encode(y=y),
        line.encode(x=x, y=y),
        bars.mark_rule(color=BLUE, strokeWidth=1.5, clip=True, aria=False).encode(
            x=x, y=altair.Y("low:Q", **axis), y2="high:Q"
        ),
        of_shown.mark_point(size=95, strokeWidth=2, opacity=1).encode(x=x, y=y, description="said:N", **look),
        of_failed.mark_point(size=95, strokeWidth=2, opacity=1).encode(
            x=x, y=altair.value(8), description="said:N", **look
        ),
    )


def _looking(marks: Mapping[str, tuple[str, str, str]]) -> dict[str, object]:
    """Colour, shape and filling of points by what ``looks`` says, with one legend."""
    names, columns = list(marks), list(zip(*marks.values(), strict=True))
    scales = [altair.Scale(domain=names, range=list(column)) for column in columns]
    legend = altair.Legend(columns=2)
    return {
        "stroke": altair.Stroke("looks:N", title=None, scale=scales[0], legend=legend),
        "shape": altair.Shape("looks:N", title=None, scale=scales[1], legend=legend),
        "fill": altair.Fill("looks:N", title=None, scale=scales[2], legend=legend),
    }


def _looks(row: Row) -> str:
    """The entry of the legend that a plan belongs to."""
    if row["failed"]:
        return "failed"
    if row["kind"] == BEST:
        return f"best, {row['plan']}: {number(row['perplexity'])}"
    if row["kind"] == UNIFORM:
        return f"uniform: {number(row['perplexity'])}"
    return "worse" if row["worse"] else "not surely worse"


def _mark(row: Row) -> tuple[str, str, str]:
    """Colour, shape and filling of a plan's point."""
    if row["failed"]:
        return GREY, "cross", "transparent"
    if row["kind"] == BEST:
        return GREEN, "diamond", GREEN
    if row["kind"] == UNIFORM:
        return VERMILION, "square", VERMILION
    return BLUE, "circle", BLUE if row["worse"] else "transparent"


def _said(row: Row) -> str:
    if row["failed"]:
        return f"{row['plan']}: failed, perplexity {number(row['perplexity'])}"
    bar = f", 95 % from {number(row['low'])} to {number(row['high'])}" if row["low"] < row["high"] else ""
    return f"{row['plan']}: perplexity {number(row['perplexity'])}{bar}"
