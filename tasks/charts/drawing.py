"""Draw charts as SVG and PNG: Altair describes them, and Vega renders them in this process, without browser or network.

The ``description`` of a mark becomes its label in the SVG. Screen readers read it, and the page shows it under the
pointer.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import altair
import vl_convert

from layerwise.storage.draft import Draft
from layerwise.tasks.running.printable import printable

# Colours of Okabe and Ito, two of them darker. Colour-blind people can distinguish them, and all have enough contrast
# on white and on near-black.
BLUE, VERMILION, GREEN, YELLOW, PURPLE, SKY = "#1F7FC1", "#D55E00", "#009E73", "#B88A00", "#B5588F", "#35A0D6"
GREY = "#808080"
# Vega computes text widths for these fonts. A wider font would be cut off.
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
INK = "currentColor"  # text colour of the surrounding page; black in a separate file
WIDTH, HEIGHT = 400, 270  # small, so that text is readable at the width of a phone
PIXELS = 2.0  # pixels of the PNG per unit
IDENTIFIER = re.compile(r'\bid="([^"]+)"')
REFERENCE = re.compile(r"url\(#([^)]+)\)")


def figure_of(*layers: altair.Chart, height: int = HEIGHT) -> altair.LayerChart:
    """Combine layers into a figure with the common style."""
    # In one call: each of Altair's methods, such as ``properties``, copies the chart with all its data.
    return cast(altair.LayerChart, altair.layer(*layers, width=WIDTH, height=height, config=_style()))


def chart_of(rows: Iterable[Mapping[str, Any]]) -> altair.Chart:
    """Return a chart with these rows as inline data."""
    return altair.Chart(altair.InlineData(list(rows)))


def line_colors(marks: Mapping[str, tuple[str, float]]) -> altair.Color:
    """Return the colour encoding of the field ``line``, with a legend.

    Args:
        marks: colour and width of each line, by its name.
    """
    return altair.Color(
        "line:N",
        title=None,
        scale=altair.Scale(domain=list(marks), range=[color for color, _ in marks.values()]),
        legend=altair.Legend(columns=2, symbolType="stroke"),
    )


def svg_inside(chart: altair.LayerChart, name: str) -> str:
    """Render a figure as inline SVG, in the text colour of the page.

    Args:
        name: prefix of the identifiers in the SVG, which must be unique on the page.
    """
    return _with_own_identifiers(_svg(chart.to_dict()), name)


def svg_file(chart: altair.LayerChart, name: str, title: Sequence[str]) -> str:
    """Render a figure as a separate SVG file, on white in case that it is shown on a dark page.

    Args:
        name: see ``svg_inside``.
        title: lines above the figure.
    """
    return _with_own_identifiers(_svg(_picture(chart, title)), name)


def png_file(svg: str) -> bytes:
    """Render the SVG file of a figure as PNG, which is three times as fast as rendering the chart again."""
    png: bytes = vl_convert.svg_to_png(svg, scale=PIXELS)
    return png


def write_figures(
    draft: Draft, charts: Mapping[str, altair.LayerChart], titles: Mapping[str, str], subject: str
) -> None:
    """Write every figure as SVG and PNG into the folder ``figures``.

    Args:
        charts: figures by name.
        titles: titles of the figures, by the same names.
        subject: second line of all titles.
    """
    for name, chart in charts.items():
        svg = svg_file(chart, name, [titles[name], subject])
        draft.write(figure_file(name), svg.encode())
        draft.write(f"figures/{name}.png", png_file(svg))


def figure_file(name: str) -> str:
    """Return the name of a figure's SVG file in the artifact."""
    return f"figures/{name}.svg"


def _picture(chart: altair.LayerChart, title: Sequence[str]) -> dict[str, Any]:
    heading = {"text": list(title), "anchor": "start", "fontSize": 14, "offset": 12, "color": INK}
    return {**chart.to_dict(), "background": "white", "padding": 12, "title": heading}


def _svg(spec: dict[str, Any]) -> str:
    svg: str = vl_convert.vegalite_to_svg(_printable(spec), allowed_base_urls=[])
    return svg


def _printable(part: Any) -> Any:
    """Make all texts in a part of a specification printable: XML forbids some characters that names may contain."""
    if isinstance(part, str):
        return printable(part)
    if isinstance(part, Mapping):
        return {name: _printable(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_printable(value) for value in part]
    return part


def _with_own_identifiers(svg: str, name: str) -> str:
    """Renumber the identifiers. Vega counts them over all figures of a process; equal figures must have equal bytes."""
    numbers = {old: f"{name}-{new}" for new, old in enumerate(dict.fromkeys(IDENTIFIER.findall(svg)))}
    svg = IDENTIFIER.sub(lambda match: f'id="{numbers[match[1]]}"', svg)
    return REFERENCE.sub(lambda match: f"url(#{numbers.get(match[1], match[1])})", svg)


def _style() -> altair.Config:
    """Return the common style: no frame, faint grid, text in the colour of the page."""
    text: dict[str, Any] = {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 13,
        "titleFontSize": 13,
        "titleFontWeight": "normal",
    }
    lines: dict[str, Any] = {"gridColor": INK, "gridOpacity": 0.13, "domainColor": INK, "domainOpacity": 0.5}
    ticks: dict[str, Any] = {"tickColor": INK, "tickOpacity": 0.5, "titlePadding": 8}
    return altair.Config(
        font=FONT,
        background="transparent",
        view=altair.ViewConfig(stroke=None),
        axis=altair.AxisConfig(**text, **lines, **ticks),
        legend=altair.LegendConfig(**text, orient="top", labelLimit=420, symbolSize=95, symbolStrokeWidth=2),
    )


# Ratio of the highest to the lowest value above which the axis is logarithmic.
WIDE_RANGE = 5.0
# Ratio above which only the powers of ten are labelled, because there is no room for 2 and 5 times these.
MANY_DECADES = 3000.0
# Up to FEW_LAYERS, every layer is labelled; up to MANY_LAYERS, every fifth one; above that, every tenth one.
FEW_LAYERS, MANY_LAYERS = 12, 80


def measure_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """Return the vertical axis of a quantity; logarithmic if its values are positive and span a wide range."""
    positive = [value for value in values if value > 0] or [1.0]
    low, high = min(positive), max(positive)
    if high > WIDE_RANGE * low and len(positive) == len(values):
        domain, ticks = [low / 1.25, high * 1.25], _decades(low / 1.25, high * 1.25)
        axis = altair.Axis(values=ticks, format="~g")
        return {"title": title, "axis": axis, "scale": altair.Scale(type="log", domain=domain)}
    return linear_axis(values, title)


def linear_axis(values: Sequence[float], title: str) -> dict[str, Any]:
    """Return a linear vertical axis with a margin around the values."""
    low, high = min(values), max(values)
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    domain = [low - margin, high + margin]
    scale = altair.Scale(domain=domain, nice=False, zero=False)
    return {"title": title, "axis": altair.Axis(tickCount=6), "scale": scale}


def layer_axis(layers: Iterable[int]) -> dict[str, Any]:
    """Return the horizontal axis of the decoder layers, with ticks at whole layers."""
    there = sorted(set(layers))
    step = 1 if len(there) <= FEW_LAYERS else 5 if len(there) <= MANY_LAYERS else 10
    ticks = [layer for layer in there if layer % step == 0]
    title = "decoder layer (0 is next to the input)"
    return {"title": title, "axis": altair.Axis(values=ticks, format="d", labelAngle=0)}


def _decades(low: float, high: float) -> list[float]:
    """Return the ticks between two numbers: 1, 2 and 5 times each power of ten, or only the powers if the range is large."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if high < MANY_DECADES * low else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


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
