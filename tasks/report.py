"""Report: write a self-contained page on a finished search, its figures as SVG and PNG, its numbers as Parquet."""

from collections.abc import Mapping
from dataclasses import asdict

import pyarrow as pa

from layerwise.scoring.criterion import KL
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import write_table
from layerwise.tasks.charts.drawing import Figure, svg_inside, write_figures
from layerwise.tasks.charts.perplexity_figure import perplexity_by_beta
from layerwise.tasks.charts.search_figures import (
    error_by_layer,
    sparsity_by_layer,
    sparsity_by_linear,
    time_by_stage,
)
from layerwise.tasks.charts.theory_figures import TITLES as THEORY_TITLES
from layerwise.tasks.charts.theory_figures import figures_of_theory
from layerwise.tasks.pages.report_data import Extras, ReportData, report_data
from layerwise.tasks.pages.report_page import report_page
from layerwise.tasks.results.report_tables import by_kind
from layerwise.tasks.results.search_result import read_search
from layerwise.tasks.running.stage_task import stage_task

PAGE_FILE = "report.html"
REPORT_STAGE = "report"
TITLES = {
    "perplexity": "Perplexity on the selection text",
    "sparsity": "Sparsity of every decoder layer",
    "errors": "Reconstruction error of every decoder layer",
    "linears": "Realised sparsity of every linear, best plan",
    "stages": "Time of every stage",
    **THEORY_TITLES,
}

KL_TITLE = f"{KL} from the dense model on the selection text"


def report_stage(data: ReportData, compared: Mapping[str, Artifact]) -> Stage:
    """Describe a report. The times of the stages are a setting, because the keys of the stages do not cover them."""
    extras = asdict(data.extras) | {"zero_shot": [row.columns for row in data.extras.zero_shot]}
    keys = {"theory": extras.pop("theory"), "distill": extras.pop("distilled")}
    settings = {
        "made": [
            {name: row[name] for name in ("key", "committed", "seconds", "peak_memory")}
            for row in data.tables["stages"]
        ],
        "versions": dict(data.versions),
        "command": data.command,
        "extras": extras,
        "compared": list(compared),
    }
    others = {f"compared {number:03d}": artifact.key for number, artifact in enumerate(compared.values())}
    measured = {role: key for role, key in keys.items() if key}
    return Stage(REPORT_STAGE, 4, settings, {"search": data.search, **others, **measured})


@stage_task(about=lambda search, **_: str(search.facts.get("source", "")))
def report(
    store: ArtifactStore,
    search: Artifact,
    command: str = "",
    extras: Extras = Extras(),  # noqa: B008  frozen
    compared: Mapping[str, Artifact] | None = None,
) -> Artifact:
    """Write ``report.html``, ``figures/*.svg``, ``figures/*.png`` and ``data/*.parquet`` for a search.

    Args:
        search: the artifact of a finished search.
        command: command that repeats the search, shown on the page.
        extras: measurements made after the search; missing ones are left out of the page.
        compared: other searches of a comparison by name; their best plans are drawn next to this one's.

    Raises:
        ValueError: ``search`` is not the artifact of a search.
        KeyError: an artifact of the search is no longer in the store.
    """
    others = {name: read_search(store, other) for name, other in (compared or {}).items()}
    data = report_data(store, read_search(store, search), others, command, extras)

    def build(draft: Draft) -> None:
        figures = figures_of(data)
        inside = {name: svg_inside(figure, name) for name, figure in figures.items()}
        draft.write(PAGE_FILE, report_page(data, inside).encode())
        titles = TITLES if data.criterion == "perplexity" else TITLES | {"perplexity": KL_TITLE}
        write_figures(draft, figures, titles, data.title)
        for name, rows in data.tables.items():
            if rows:
                write_table(draft, f"data/{name}.parquet", pa.Table.from_pylist(rows))
        draft.facts |= {"search": data.search, "title": data.title}

    return store.get_or_build(report_stage(data, compared or {}), build)


def figures_of(data: ReportData) -> dict[str, Figure]:
    """Return the figures of a report by name."""
    tables = data.tables
    return {
        "perplexity": perplexity_by_beta(
            tables["betas"], tables["models"][0]["selection_perplexity"], data.parameter, data.criterion
        ),
        "sparsity": sparsity_by_layer(tables["sparsities"]),
        "errors": error_by_layer(tables["errors"]),
        "linears": sparsity_by_linear(by_kind(tables["linears"])),
        "stages": time_by_stage(tables["stages"]),
        **({} if data.theory is None else figures_of_theory(data.theory.layers, data.theory.found)),
    }
