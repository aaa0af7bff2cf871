"""The figures of a page as files beside it: SVG and PNG."""

from collections.abc import Mapping

import altair

from layerwise.storage.draft import Draft
from layerwise.tasks.charts.drawing import png_file, svg_file


def write_figures(
    draft: Draft, charts: Mapping[str, altair.LayerChart], titles: Mapping[str, str], subject: str
) -> None:
    """Write every figure twice.

    Args:
        charts: by their names.
        titles: of the figures, by the same names.
        subject: what all of them are about; below the titles.
    """
    for name, chart in charts.items():
        title = [titles[name], subject]
        draft.write(figure_file(name), svg_file(chart, name, title).encode())
        draft.write(f"figures/{name}.png", png_file(chart, title))


def figure_file(name: str) -> str:
    """Where a figure is in the artifact, as SVG."""
    return f"figures/{name}.svg"
