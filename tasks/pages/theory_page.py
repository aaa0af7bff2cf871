"""The page on the theory: one HTML file that needs nothing else, in the style of the report, with three figures."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.charts.drawing import svg_inside
from layerwise.tasks.charts.figure_files import write_figures
from layerwise.tasks.charts.theory_figures import TITLES, figures_of_theory
from layerwise.tasks.pages.page_template import render
from layerwise.tasks.pages.report_page import FILTERS
from layerwise.tasks.pages.theory_section import read_section
from layerwise.tasks.running.stage_task import stage_task

PAGE_FILE = "theory.html"


def page_stage(measured: Artifact, title: str, settings: Mapping[str, Any]) -> Stage:
    """The stage of a page: what it shows beside the numbers are settings of its own."""
    return Stage("theory_page", 2, {"title": title, "settings": settings}, {"theory": measured.key})


@stage_task(about=lambda title, **_: title)
def theory_page(
    store: ArtifactStore, measured: Artifact, title: str, settings: Mapping[str, Any]
) -> Artifact:
    """The page on what was measured: ``theory.html``, ``figures/*.svg``, ``figures/*.png``.

    Args:
        measured: the artifact of ``layerwise.tasks.theory.measure_theory``.
        title: what was looked at, e.g. "demo at sparsity 0.6, wanda".
        settings: by name, for people.
    """

    def build(draft: Draft) -> None:
        theory = read_section(store, measured)
        charts = figures_of_theory(theory)
        figures = {name: Markup(svg_inside(chart, name)) for name, chart in charts.items()}
        page = render(
            "theory_page.html", FILTERS, title=title, settings=settings, theory=theory, figures=figures
        )
        draft.write(PAGE_FILE, page.encode())
        write_figures(draft, charts, TITLES, title)
        draft.facts |= {"title": title}

    return store.get_or_build(page_stage(measured, title, settings), build)
