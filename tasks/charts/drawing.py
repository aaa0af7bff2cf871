"""Draw charts as SVG and PNG: Altair describes them, and Vega renders them in this process, without browser or network.

The ``description`` of a mark becomes its label in the SVG. Screen readers read it, and the page shows it under the
pointer. Lines and points differ in dash and shape as well as in colour.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from xml.sax.saxutils import escape

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
# Widths of the plot. With its axis and the names next to it, a figure is about as wide as the page, or as a phone.
WIDE, WIDE_WITH_NAMES, NARROW = 860, 680, 300
HEIGHT = 290
PADDING, LINE = 14, 20  # of the title in a file, in units
SAMPLE, NAME_GAP = 26, 18  # length of a line next to its name, and distance of two names, in units
NAME_LIMIT = 260  # units of a name, after which it is cut
PIXELS = 2.0  # pixels of the PNG per unit
IDENTIFIER = re.compile(r'\bid="([^"]+)"')
REFERENCE = re.compile(r"url\(#([^)]+)\)")
SIZE = re.compile(r'<svg [^>]*?\bwidth="([\d.]+)" height="([\d.]+)"')


@dataclass(frozen=True)
class Look:
    """Look of a line and its points.

    Attributes:
        width: of the line.
        dash: lengths of strokes and gaps; empty for a solid line.
        shape: shape of the points, by Vega's name.
    """

    color: str
    width: float = 2.2
    dash: tuple[float, ...] = ()
    shape: str = "circle"


# The same in all figures.
OF_UNIFORM = Look(VERMILION, dash=(7, 4), shape="square")
OF_BEST = Look(GREEN, shape="diamond")


@dataclass(frozen=True)
class Figure:
    """A figure in two layouts: wide for a desktop, print and files; narrow for a phone.

    Attributes:
        layers: marks of both layouts.
        only_wide, only_narrow: marks of one layout, such as the names of lines.
        width: of the plot in the wide layout.
        height: of the plot.
    """

    layers: tuple[altair.Chart, ...]
    only_wide: tuple[altair.Chart, ...] = ()
    only_narrow: tuple[altair.Chart, ...] = ()
    width: int = WIDE
    height: int = HEIGHT

    @cached_property
    def wide(self) -> str:
        """SVG of the wide layout, in the text colour of its surroundings."""
        layers = self._spec["layer"]
        return _svg(
            {**self._spec, "width": self.width, "layer": layers[: len(layers) - len(self.only_narrow)]}
        )

    @cached_property
    def narrow(self) -> str:
        """SVG of the narrow layout, in the text colour of its surroundings."""
        layers, own = self._spec["layer"], len(self.layers)
        chosen = [*layers[:own], *layers[own + len(self.only_wide) :]]
        return _svg({**self._spec, "width": NARROW, "layer": chosen})

    def _repr_svg_(self) -> str:
        """Return what a notebook shows."""
        return self.wide

    @cached_property
    def _spec(self) -> dict[str, Any]:
        # In one call: each of Altair's methods, such as ``properties``, copies the chart with all its data.
        layers = (*self.layers, *self.only_wide, *self.only_narrow)
        spec: dict[str, Any] = altair.layer(*layers, height=self.height, config=_style()).to_dict()
        return spec


def chart_of(rows: Iterable[Mapping[str, Any]]) -> altair.Chart:
    """Return a chart with these rows as inline data."""
    return altair.Chart(altair.InlineData(list(rows)))


def line_encodings(looks: Mapping[str, Look]) -> dict[str, Any]:
    """Return the encodings of colour, dash and shape by the field ``line``, without a legend.

    Args:
        looks: look of each line, by its name.
    """
    ranges: dict[Any, list[Any]] = {
        altair.Color: [look.color for look in looks.values()],
        altair.StrokeDash: [list(look.dash) or [1, 0] for look in looks.values()],
        altair.Shape: [look.shape for look in looks.values()],
    }
    color, dash, shape = (
        channel("line:N", legend=None, scale=altair.Scale(domain=list(looks), range=values))
        for channel, values in ranges.items()
    )
    return {"color": color, "strokeDash": dash, "shape": shape}


def svg_inside(figure: Figure, name: str) -> str:
    """Return both layouts as inline SVG, in the text colour of the page. The style of the page shows one of them.

    Args:
        name: prefix of the identifiers in the SVG, which must be unique on the page.
    """
    wide, narrow = (
        with_own_identifiers(figure.wide, name),
        with_own_identifiers(figure.narrow, f"{name}-narrow"),
    )
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}</div>'


def svg_file(figure: Figure, name: str, title: Sequence[str]) -> str:
    """Return the wide layout as a separate SVG file, on white in case that it is shown on a dark page.

    Args:
        name: see ``svg_inside``.
        title: lines above the figure.
    """
    inner = with_own_identifiers(figure.wide, name)
    size = SIZE.match(inner)
    assert size is not None, "Vega writes the size of a figure"
    top = 2 * PADDING + LINE * len(title)
    width, height = float(size[1]) + 2 * PADDING, float(size[2]) + top + PADDING
    lines = "".join(
        f'<text x="{PADDING}" y="{PADDING + LINE * (number + 0.7):g}" font-family="{FONT}" font-size="14" '
        f'font-weight="{"normal" if number else "bold"}">{escape(printable(line))}</text>'
        for number, line in enumerate(title)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}"><rect width="100%" height="100%" fill="white"/>{lines}'
        f'{inner.replace("<svg ", f"""<svg x="{PADDING}" y="{top}" """, 1)}</svg>'
    )


def png_file(svg: str) -> bytes:
    """Render the SVG file of a figure as PNG, which is three times as fast as rendering the chart again."""
    png: bytes = vl_convert.svg_to_png(svg, scale=PIXELS)
    return png


def write_figures(
    draft: Draft, figures: Mapping[str, Figure], titles: Mapping[str, str], subject: str
) -> None:
    """Write every figure as SVG and PNG into the folder ``figures``.

    Args:
        figures: figures by name.
        titles: titles of the figures, by the same names.
        subject: second line of all titles.
    """
    for name, figure in figures.items():
        svg = svg_file(figure, name, [titles[name], subject])
        draft.write(figure_file(name), svg.encode())
        draft.write(f"figures/{name}.png", png_file(svg))


def figure_file(name: str) -> str:
    """Return the name of a figure's SVG file in the artifact."""
    return f"figures/{name}.svg"


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


def with_own_identifiers(svg: str, name: str) -> str:
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
    looks: Mapping[str, Look],
    x_axis: Mapping[str, Any],
    y_axis: Mapping[str, Any],
) -> Figure:
    """Draw lines with labelled points. The names are next to the ends of the lines, or above the narrow layout.

    Args:
        rows: one row per point: ``x``, ``y``, the name of its ``line``, ``detail`` to separate lines of the same name,
            and the ``label`` of the point.
        looks: look of each line, by name. The first ones are drawn on top.
        y_axis: see ``measure_axis``.
    """
    encodings = line_encodings(looks)
    of_point = {name: encodings[name] for name in ("color", "shape")}
    of_line = {name: encodings[name] for name in ("color", "strokeDash")}
    x = altair.X("x:Q", **x_axis, scale=altair.Scale(nice=False, zero=False, padding=8))
    y = altair.Y("y:Q", **y_axis)
    lines = [
        chart_of([row for row in rows if row["line"] == name])
        .mark_line(strokeWidth=looks[name].width, aria=False)
        .encode(x=x, y=y, detail="detail:N", **of_line)
        for name in reversed(list(looks))
    ]
    strong = [row for row in rows if looks[row["line"]].width > THIN]
    few = len({row["x"] for row in rows}) <= FEW
    dots = chart_of(strong).mark_point(size=42 if few else 18, filled=True, opacity=1)
    above = {name: (number - len(looks)) * NAME_GAP for number, name in enumerate(looks)}
    return Figure(
        (*lines, dots.encode(x=x, y=y, description="label:N", **of_point)),
        line_names(looks, WIDE_WITH_NAMES + 10, beside(rows, y_axis)),
        line_names(looks, 0, above),
        WIDE_WITH_NAMES,
    )


def line_names(
    looks: Mapping[str, Look], left: float, heights: Mapping[str, float]
) -> tuple[altair.Chart, ...]:
    """Return the names of lines as text, each after a sample of the line and its point.

    Args:
        left: left end of the samples, in units from that of the plot.
        heights: height of every name, in units from the top of the plot; negative above it.
    """
    encodings = line_encodings(looks)
    rows: list[dict[str, Any]] = [
        {"line": name, "at": height, "width": looks[name].width} for name, height in heights.items()
    ]
    at = altair.Y("at:Q", scale=None, axis=None)
    samples = chart_of(rows).mark_rule(aria=False)
    strong = chart_of([row for row in rows if looks[row["line"]].width > THIN])
    points = strong.mark_point(size=60, filled=True, opacity=1, aria=False)
    text = chart_of(rows).mark_text(align="left", fontSize=13, color=INK, limit=NAME_LIMIT, aria=False)
    return (
        samples.encode(
            x=altair.value(left),
            x2=altair.value(left + SAMPLE),
            y=at,
            strokeWidth=altair.StrokeWidth("width:Q", scale=None),
            color=encodings["color"],
            strokeDash=encodings["strokeDash"],
        ),
        points.encode(
            x=altair.value(left + SAMPLE / 2), y=at, color=encodings["color"], shape=encodings["shape"]
        ),
        text.encode(x=altair.value(left + SAMPLE + 6), y=at, text="line:N"),
    )


def beside(rows: Sequence[Mapping[str, Any]], y_axis: Mapping[str, Any]) -> dict[str, float]:
    """Return the heights of names next to the ends of their lines, in units from the top, moved apart."""
    scale = y_axis["scale"].to_dict()
    of_axis = math.log if scale.get("type") == "log" else float
    low, high = map(of_axis, scale["domain"])
    ends = {row["line"]: of_axis(row["y"]) for row in sorted(rows, key=lambda row: row["x"])}
    heights: dict[str, float] = {}
    free = 0.0
    for name, end in sorted(ends.items(), key=lambda item: -item[1]):
        heights[name] = max(HEIGHT * (high - end) / (high - low), free)
        free = heights[name] + NAME_GAP
    free = max(HEIGHT, NAME_GAP * (len(heights) - 1))
    for name in reversed(list(heights)):
        heights[name] = min(heights[name], free)
        free = heights[name] - NAME_GAP
    return heights
