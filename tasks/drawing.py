"""Charts as files: SVG that takes the colour of its page, and PNG; by Vega in this process, no browser, no network."""

import re
from typing import Any

import altair
import vl_convert

# Okabe and Ito's, two of them darker: the colour-blind tell them apart, and all stand out on white and on near-black.
BLUE, VERMILION, GREEN, YELLOW, PURPLE, SKY = "#1F7FC1", "#D55E00", "#009E73", "#B88A00", "#B5588F", "#35A0D6"
GREY = "#808080"
INK = "currentColor"  # of the text of the page around it; black in a file of its own
PIXELS = 2.0  # of the PNG for each unit of a figure
IDENTIFIER = re.compile(r'\bid="([^"]+)"')
REFERENCE = re.compile(r"url\(#([^)]+)\)")


def styled(chart: altair.LayerChart) -> altair.LayerChart:
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
        chart.configure(font="sans-serif", background="transparent")
        .configure_view(stroke=None)
        .configure_axis(**text, **lines, **ticks)
        .configure_legend(**text, orient="top", labelLimit=420, symbolSize=95, symbolStrokeWidth=2)
    )
    return styled


def svg_of(chart: altair.LayerChart, name: str, background: str = "transparent") -> str:
    """The figure as SVG.

    Args:
        name: identifiers in it begin with this: several figures may be on one page. They are numbered anew, as Vega
            counts on from one figure of a process to the next, and the same figure is to have the same bytes.
        background: colour behind it, for a page that shows it as a picture.
    """
    spec = {**chart.to_dict(), "background": background}
    svg = vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
    numbers = {old: f"{name}-{new}" for new, old in enumerate(dict.fromkeys(IDENTIFIER.findall(svg)))}
    svg = IDENTIFIER.sub(lambda match: f'id="{numbers[match[1]]}"', svg)
    return REFERENCE.sub(lambda match: f"url(#{numbers.get(match[1], match[1])})", svg)


def png_of(chart: altair.LayerChart) -> bytes:
    """The figure as PNG, on white."""
    spec = {**chart.to_dict(), "background": "white"}
    png: bytes = vl_convert.vegalite_to_png(spec, scale=PIXELS, allowed_base_urls=[])
    return png
