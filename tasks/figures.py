"""The figures of a search, from the rows of its report.

What a mark says when it is pointed at is its ``description``: it ends up in the SVG as the mark's label, which screen
readers read, too. Altair draws them: one grammar for all figures, rendered in this process without a browser.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair

from tasks.drawing import BLUE, GREEN, GREY, PURPLE, SKY, VERMILION, YELLOW, styled
from tasks.findings import number
from tasks.report_extras import TheoryFigure
from tasks.report_tables import BEST, COMPARED, TRIED, UNIFORM, Row, Rows

WIDTH, HEIGHT = 400, 270  # small, so that text is readable where the figure is as wide as a phone
# Highest value over the lowest, from which on orders of magnitude are drawn.
WIDE_RANGE = 5.0
FEW = 40  # layers; of more the points of a line are not drawn, they would touch
LINES = (BLUE, PURPLE, SKY, YELLOW)  # beside those of uniform and best
DEPTH = "decoder layer (0 is nearest to the input)"


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
    axis = _measure(perplexities + ends, "perplexity")
    y = altair.Y("perplexity:Q", **axis)
    meaning = " (each layer's sparsity above that of the one before)" if parameter == "beta" else ""
    scale_of_x = altair.Scale(padding=14, nice=False, zero=False)
    x = altair.X("beta:Q", title=f"{parameter}{meaning}", scale=scale_of_x, axis=altair.Axis(tickCount=6))
    look = _looking(
        {row["looks"]: _mark(row) for row in curve} | {f"dense: {number(dense)}": (GREY, "stroke", GREY)}
    )
    level = [{"perplexity": dense, "looks": f"dense: {number(dense)}", "said": f"dense: {number(dense)}"}]
    of_shown, of_failed = _chart(shown), _chart([row for row in curve if row["failed"]])
    bars = _chart([row for row in shown if row["low"] < row["high"]])
    line = of_shown.mark_line(strokeWidth=1.5, color=BLUE, opacity=0.5)
    return _layered(
        _chart(level)
        .mark_rule(strokeDash=[6, 4], strokeWidth=1.5, color=GREY)
        .encode(y=y, description="said:N"),
        line.encode(x=x, y=y),
        bars.mark_rule(color=BLUE, strokeWidth=1.5, clip=True).encode(
            x=x, y=altair.Y("low:Q", **axis), y2="high:Q"
        ),
        of_shown.mark_point(size=95, strokeWidth=2, opacity=1).encode(x=x, y=y, description="said:N", **look),
        of_failed.mark_point(size=95, strokeWidth=2, opacity=1).encode(
            x=x, y=altair.value(8), description="said:N", **look
        ),
    )


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
    return _lines(rows, marks, "sparsity (fraction of weights removed)")


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
    return _lines(rows, marks, "squared error over dense energy")


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
        _chart(rows)
        .mark_rect(strokeWidth=0)
        .encode(
            x=altair.X("layer:O", title=DEPTH, axis=altair.Axis(values=ticks, labelAngle=0)),
            y=altair.Y("linear:N", title=None, sort=names, axis=altair.Axis(labelLimit=150)),
            color=color,
            description="said:N",
        )
    )
    return styled(altair.layer(map_of_all).properties(width=WIDTH, height=max(26 * len(names), 80)))


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
        _chart(rows)
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
    return styled(altair.layer(bars).properties(width=WIDTH, height=24 * len(names)))


def theory_figure(figure: TheoryFigure) -> altair.LayerChart:
    """Lines of what the theory predicts and what was measured."""
    rows = [
        {"line": name, "plan": name, "layer": x, "value": y, "said": f"{name}: {x:g}, {y:.4g}"}
        for name, points in figure.lines
        for x, y in points
    ]
    marks = {
        name: (color, 2.0) for (name, _), color in zip(figure.lines, LINES * len(figure.lines), strict=False)
    }
    return _lines(rows, marks, figure.y, figure.x)


def _lines(
    rows: Sequence[Row], marks: Mapping[str, tuple[str, float]], y_title: str, x_title: str = DEPTH
) -> altair.LayerChart:
    """Lines by layer; ``marks`` are colour and width of each by its name, the important ones first and on top."""
    names = list(marks)
    look = altair.Color(
        "line:N",
        title=None,
        scale=altair.Scale(domain=names, range=[color for color, _ in marks.values()]),
        legend=altair.Legend(columns=2, symbolType="stroke"),
    )
    width = altair.StrokeWidth(
        "line:N", scale=altair.Scale(domain=names, range=[width for _, width in marks.values()]), legend=None
    )
    y = altair.Y("value:Q", **_measure([row["value"] for row in rows], y_title))
    x = altair.X(
        "layer:Q", title=x_title, axis=altair.Axis(tickMinStep=1), scale=altair.Scale(nice=False, padding=8)
    )
    layers = [
        _chart([row for row in rows if row["line"] == name])
        .mark_line()
        .encode(x=x, y=y, color=look, strokeWidth=width, detail="plan:N")
        for name in reversed(names)
    ]
    strong = [row for row in rows if marks[row["line"]][1] > 1.5]
    few = len({row["layer"] for row in rows}) <= FEW
    dots = _chart(strong).mark_circle(size=34 if few else 16, opacity=1)
    return _layered(*layers, dots.encode(x=x, y=y, color=look, description="said:N"))


def _layered(*layers: altair.Chart) -> altair.LayerChart:
    return styled(altair.layer(*layers).properties(width=WIDTH, height=HEIGHT))


def _chart(rows: Iterable[Row]) -> altair.Chart:
    return altair.Chart(altair.InlineData(list(rows)))


def _measure(values: Sequence[float], title: str) -> dict[str, Any]:
    """The vertical axis of a quantity whose zero says nothing; by orders of magnitude if its values span some."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    if high > WIDE_RANGE * low and len(positive) == len(values):
        domain, ticks = [low / 1.25, high * 1.25], _decades(low / 1.25, high * 1.25)
        axis = altair.Axis(values=ticks, format="~g")
        return {"title": title, "axis": axis, "scale": altair.Scale(type="log", domain=domain)}
    margin = 0.08 * (high - low) or 0.05 * high
    domain = [min(values) - margin, high + margin]
    scale = altair.Scale(domain=domain, nice=False, zero=False)
    return {"title": title, "axis": altair.Axis(tickCount=6), "scale": scale}


def _decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two numbers; powers alone if these are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


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


def _plan_label(plan: str, kind: str) -> str:
    return {BEST: f"best, {plan}", TRIED: "others that were tried"}.get(kind, plan)
