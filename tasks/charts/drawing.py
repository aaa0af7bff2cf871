"""Charts as files: SVG that takes the colour of its page, and PNG; by Vega in this process, no browser, no network."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import altair
import vl_convert

from layerwise.tasks.running.printable import printable

# Okabe and Ito's, two of them darker: the colour-blind tell them apart, and all stand out on white and on near-black.
BLUE, VERMILION, GREEN, YELLOW, PURPLE, SKY = "#1F7FC1", "#D55E00", "#009E73", "#B88A00", "#B5588F", "#35A0D6"
GREY = "#808080"
# With the widths that Vega reckons with: in a wider font labels would be cut off.
FONT = "Arial, Helvetica, Liberation Sans, sans-serif"
INK = "currentColor"  # of the text of the page around it; black in a file of its own
WIDTH, HEIGHT = 400, 270  # small, so that text is readable where the figure is as wide as a phone
PIXELS = 2.0  # of the PNG for each unit of a figure
IDENTIFIER = re.compile(r'\bid="([^"]+)"')
REFERENCE = re.compile(r"url\(#([^)]+)\)")


def figure_of(*layers: altair.Chart, height: int = HEIGHT) -> altair.LayerChart:
    """The layers, one upon the other, as all figures look."""
    return _styled(cast(altair.LayerChart, altair.layer(*layers).properties(width=WIDTH, height=height)))


def chart_of(rows: Iterable[Mapping[str, Any]]) -> altair.Chart:
    """A chart of these rows, which go into it as they are."""
    return altair.Chart(altair.InlineData(list(rows)))


def line_colors(marks: Mapping[str, tuple[str, float]]) -> altair.Color:
    """Colours of the field ``line``, with a legend.

    Args:
        marks: colour and width of each line by its name.
    """
    return altair.Color(
        "line:N",
        title=None,
        scale=altair.Scale(domain=list(marks), range=[color for color, _ in marks.values()]),
        legend=altair.Legend(columns=2, symbolType="stroke"),
    )


def svg_inside(chart: altair.LayerChart, name: str) -> str:
    """The figure as SVG for the inside of a page, whose text colour it takes.

    Args:
        name: identifiers in it begin with this, as several figures may be on one page.
    """
    return _with_own_identifiers(_svg(chart.to_dict()), name)


def svg_file(chart: altair.LayerChart, name: str, title: Sequence[str]) -> str:
    """The figure as a picture of its own, on white: whoever shows it may have a dark page.

    Args:
        name: as for ``svg_inside``.
        title: lines above it.
    """
    return _with_own_identifiers(_svg(_picture(chart, title)), name)


def png_file(chart: altair.LayerChart, title: Sequence[str]) -> bytes:
    """The same as PNG."""
    png: bytes = vl_convert.vegalite_to_png(
        _printable(_picture(chart, title)), scale=PIXELS, allowed_base_urls=[]
    )
    return png


def _picture(chart: altair.LayerChart, title: Sequence[str]) -> dict[str, Any]:
    heading = {"text": list(title), "anchor": "start", "fontSize": 14, "offset": 12, "color": INK}
    return {**chart.to_dict(), "background": "white", "padding": 12, "title": heading}


def _svg(spec: dict[str, Any]) -> str:
    svg: str = vl_convert.vegalite_to_svg(_printable(spec), allowed_base_urls=[])
    return svg


def _printable(part: Any) -> Any:
    """The part of a specification with all its texts printable: names come from outside, and XML forbids some."""
    if isinstance(part, str):
        return printable(part)
    if isinstance(part, Mapping):
        return {name: _printable(value) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return [_printable(value) for value in part]
    return part


def _with_own_identifiers(svg: str, name: str) -> str:
    """Number what Vega has numbered on from one figure of a process to the next: the same figure, the same bytes."""
    numbers = {old: f"{name}-{new}" for new, old in enumerate(dict.fromkeys(IDENTIFIER.findall(svg)))}
    svg = IDENTIFIER.sub(lambda match: f'id="{numbers[match[1]]}"', svg)
    return REFERENCE.sub(lambda match: f"url(#{numbers.get(match[1], match[1])})", svg)


def _styled(chart: altair.LayerChart) -> altair.LayerChart:
    """``chart`` as all figures look: no frame, faint grid, text in the colour of the page."""
    text: dict[str, Any] = {
        "labelColor": INK,
        "titleColor": INK,
        "labelFontSize": 13,
        "titleFontSize": 13,
        "titleFontWeight": "normal",
    }
    lines = {"gridColor": INK, "gridOpacity": 0.13, "domainColor": INK, "domainOpacity": 0.5}
    ticks = {"tickColor": INK, "tickOpacity": 0.5, "titlePadding": 8}
    styled: altair.LayerChart = (
        chart.configure(font=FONT, background="transparent")
        .configure_view(stroke=None)
        .configure_axis(**text, **lines, **ticks)
        .configure_legend(**text, orient="top", labelLimit=420, symbolSize=95, symbolStrokeWidth=2)
    )
    return styled
