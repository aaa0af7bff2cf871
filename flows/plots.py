"""Two figures of a finished search, as SVG: perplexity against beta, and the sparsity of every decoder layer."""

import io
import math
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flows.findings import number
from layerwise.perplexity import DIVERGED, T_BOUNDS
from tasks.select import ScoreRow, Selection

# Okabe and Ito's, which the colour-blind tell apart.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
# Times the best perplexity: a beta beyond it has failed, by how much says nothing and would flatten all the others.
WORST_SHOWN = 1000.0
# Highest perplexity over the lowest, from which on orders of magnitude are drawn.
WIDE_RANGE = 5.0
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "layerwise",  # ids inside of the file: the same figure, the same bytes
    "svg.fonttype": "none",  # text stays text: smaller, and in a font that the page's reader has
    "text.parse_math": False,  # a name with a dollar is no formula
    "font.family": "sans-serif",
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E0E0E0",
    "legend.frameon": False,
}


def perplexity_by_beta(selection: Selection, title: str) -> bytes:
    """Perplexity on the selection text: one point per beta, the dense model as a line.

    A bar is the 95 % interval of the paired difference to the best beta, drawn around the beta's own perplexity. A
    hollow point is not significantly worse than the best. Crosses at the upper edge are betas that failed.

    Args:
        title: what was searched, e.g. "demo at 0.6".
    """
    best, uniform, dense = selection.best_row, selection.rows[0], selection.dense_perplexity
    worst = min(WORST_SHOWN * best.perplexity, math.exp(DIVERGED / 2))
    # One curve: of the plans with an offset between attention and MLP the best one only.
    curve = [row for row in selection.rows if not row.offset or row == best]
    shown = [row for row in curve if row.perplexity <= worst]
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(f"Perplexity on the selection text\n{title}", "perplexity")
        rule = " (sparsity that each decoder layer gets above the one before it)"
        axes.set_xlabel(selection.parameter + (rule if selection.parameter == "beta" else ""))
        axes.plot([row.beta for row in shown], [row.perplexity for row in shown], color=BLUE, linewidth=1)
        _bars(axes, shown)
        worse = [row for row in shown if _is_worse(row)]
        _points(axes, worse, "o", BLUE, 7, "worse")
        perhaps = [row for row in shown if row not in worse and row != best]
        _points(axes, perhaps, "o", BLUE, 7, "not surely worse", markerfacecolor="white")
        if uniform in shown:
            _points(axes, [uniform], "s", ORANGE, 9, f"uniform: {number(uniform.perplexity)}")
        if best in shown:
            name = selection.name(selection.best)
            _points(axes, [best], "*", GREEN, 15, f"best, {name}: {number(best.perplexity)}")
        axes.axhline(dense, color=GREY, linestyle="--", linewidth=1.5, label=f"dense: {number(dense)}")
        _crosses(axes, [row.beta for row in curve if row not in shown])
        perplexities = [dense, *(row.perplexity for row in shown)]
        if max(perplexities) > WIDE_RANGE * min(perplexities):
            _make_logarithmic(axes)
        return _svg(figure)


def sparsity_by_layer(uniform: Sequence[float], best: Sequence[float] | None, name: str, title: str) -> bytes:
    """Sparsity of every decoder layer in the uniform and in the best plan.

    Args:
        uniform: by layer.
        best: by layer; None if it is the uniform one.
        name: of the best plan.
        title: what was searched, e.g. "demo at 0.6".
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(
            f"Sparsity of every decoder layer\n{title}", "sparsity (fraction of weights removed)"
        )
        axes.set_xlabel("decoder layer (0 is nearest to the input)")
        layers = range(len(uniform))
        axes.plot(layers, uniform, "s-", color=ORANGE, markersize=6, label="uniform")
        if best is not None:
            axes.plot(layers, best, "*-", color=GREEN, markersize=10, label=f"best ({name})")
        axes.set_ylim(0, 1)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return _svg(figure)


def perplexity_interval(row: ScoreRow) -> tuple[float, float]:
    """The 95 % interval of the paired difference to the best beta, as perplexities around the row's own.

    It has no width where it is undefined (the best one, one window, no spread), and ends where nothing is shown.
    """
    difference = row.above_best
    if difference is None or not difference.t:
        return row.perplexity, row.perplexity
    bound = T_BOUNDS[max(degrees for degrees in T_BOUNDS if degrees < difference.windows)]
    half = min(bound * abs(difference.mean / difference.t), math.log(WORST_SHOWN))
    return row.perplexity * math.exp(-half), row.perplexity * math.exp(half)


def _figure(title: str, unit: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.8), layout="constrained", facecolor="white")  # also where the page is dark
    axes = figure.subplots()
    axes.set_title(title, loc="left")
    axes.set_ylabel(unit)
    axes.set_axisbelow(True)
    return figure, axes


def _is_worse(row: ScoreRow) -> bool:
    return row.above_best is not None and row.above_best.significant


def _points(
    axes: Axes, rows: Sequence[ScoreRow], marker: str, color: str, size: float, label: str, **style: Any
) -> None:
    if rows:
        betas, perplexities = [row.beta for row in rows], [row.perplexity for row in rows]
        axes.plot(betas, perplexities, marker, color=color, markersize=size, label=label, zorder=3, **style)


def _crosses(axes: Axes, betas: Sequence[float]) -> None:
    if betas:
        edge = axes.get_xaxis_transform()  # height 1 is the upper edge
        heights = [0.98] * len(betas)
        axes.plot(betas, heights, "x", color=GREY, transform=edge, markersize=8, label="failed")


def _bars(axes: Axes, rows: Sequence[ScoreRow]) -> None:
    for row in rows:
        low, high = perplexity_interval(row)
        if low < high:
            error = [[row.perplexity - low], [high - row.perplexity]]
            axes.errorbar(row.beta, row.perplexity, yerr=error, color=BLUE, linewidth=1.2, capsize=4)


def _make_logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _svg(figure: Figure) -> bytes:
    figure.legend(loc="outside lower center", ncols=3, fontsize=11)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()
