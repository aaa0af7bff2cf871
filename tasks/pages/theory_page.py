"""The theory page: a self-contained HTML file in the style of the report, with three figures."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.charts.drawing import svg_inside, write_figures
from layerwise.tasks.charts.theory_figures import TITLES, figures_of_theory
from layerwise.tasks.pages.page_template import render
from layerwise.tasks.pages.theory_section import read_section
from layerwise.tasks.running.stage_task import stage_task

PAGE_FILE = "theory.html"


def page_stage(measured: Artifact, title: str, settings: Mapping[str, Any]) -> Stage:
    """Return the stage of a page. The title and settings that it shows are settings of the stage."""
    return Stage("theory_page", 2, {"title": title, "settings": settings}, {"theory": measured.key})


@stage_task(about=lambda title, **_: title)
def theory_page(
    store: ArtifactStore, measured: Artifact, title: str, settings: Mapping[str, Any]
) -> Artifact:
    """Write the page of a measurement: ``theory.html``, ``figures/*.svg``, ``figures/*.png``.

    Args:
        measured: artifact of ``layerwise.tasks.theory.measure_theory``.
        title: subject of the measurement, e.g. "demo at sparsity 0.6, wanda".
        settings: settings to show, by name.
    """

    def build(draft: Draft) -> None:
        theory = read_section(store, measured)
        charts = figures_of_theory(theory.layers, theory.found)
        figures = {name: Markup(svg_inside(chart, name)) for name, chart in charts.items()}
        page = render("theory_page.html", title=title, settings=settings, theory=theory, figures=figures)
        draft.write(PAGE_FILE, page.encode())
        write_figures(draft, charts, TITLES, title)
        draft.facts |= {"title": title}

    return store.get_or_build(page_stage(measured, title, settings), build)
