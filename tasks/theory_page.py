"""The page on the theory: one HTML file that needs nothing else, in the style of the report, with three figures."""

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from layerwise.theory_plans import UNIFORM
from storage.artifact import Artifact
from storage.draft import Draft
from storage.stage import Stage
from storage.store import ArtifactStore
from tasks.drawing import png_file, svg_file, svg_inside
from tasks.findings import number
from tasks.page_template import render
from tasks.report_page import FILTERS
from tasks.stage_task import stage_task
from tasks.theory import Rows, findings_of, read_tables, verdicts
from tasks.theory_figures import error_by_order, factor_by_layer, local_error_by_sparsity
from tasks.theory_text import CLAIMS, sentences, short

PAGE_FILE = "theory.html"
SUBJECTS = {
    "3.1": "more sparsity, more error of the layer's own",
    "3.2": "the error that arrives is handed on",
    "3.5": "ascending is the order with the least error",
}
TITLES = {
    "rise": "Error of every layer's own, by sparsity",
    "factor": "Factor of the arriving error",
    "orders": "Error after every layer, by order",
}


def page_stage(measured: Artifact, title: str, settings: Mapping[str, Any]) -> Stage:
    """The stage of a page: what it shows beside the numbers are settings of its own."""
    return Stage("theory_page", 1, {"title": title, "settings": settings}, {"theory": measured.key})


@stage_task(about=lambda title, **_: title)
def theory_page(
    store: ArtifactStore, measured: Artifact, title: str, settings: Mapping[str, Any]
) -> Artifact:
    """The page on what was measured: ``theory.html``, ``figures/*.svg``, ``figures/*.png``.

    Args:
        measured: the artifact of ``tasks.theory.measure_theory``.
        title: what was looked at, e.g. "demo at sparsity 0.6, wanda".
        settings: by name, for people.
    """

    def build(draft: Draft) -> None:
        layers, plans = read_tables(store, measured)
        found = findings_of(layers, plans)
        charts = {
            "rise": local_error_by_sparsity(layers),
            "factor": factor_by_layer(found),
            "orders": error_by_order(layers),
        }
        page = render(
            "theory_page.html",
            FILTERS,
            title=title,
            settings=settings,
            key=measured.key,
            done=_what_was_done(layers, plans),
            found=found,
            verdicts=verdicts(found),
            short=short(found),
            found_sentences=sentences(found),
            subjects=SUBJECTS,
            claims=CLAIMS,
            own_errors=_own_errors(layers),
            shifted=_on_sizes(layers),
            number=number,
            figures={name: Markup(svg_inside(chart, name)) for name, chart in charts.items()},
        )
        draft.write(PAGE_FILE, page.encode())
        for name, chart in charts.items():
            heading = [TITLES[name], title]
            draft.write(f"figures/{name}.svg", svg_file(chart, name, heading).encode())
            draft.write(f"figures/{name}.png", png_file(chart, heading))
        draft.facts |= {"title": title}

    return store.get_or_build(page_stage(measured, title, settings), build)


def _what_was_done(layers: Rows, plans: Rows) -> str:
    uniform = sum(plan["order"] == UNIFORM for plan in plans)
    orders = len(plans) - uniform
    beta = max(plan["beta"] for plan in plans)
    depth, windows = len({row["layer"] for row in layers}), len(plans[0]["losses"])
    return (
        f"{uniform} uniform plans, and {orders} orders of the arithmetic progression with beta {beta:.4g}, went "
        f"through all {depth} decoder layers together, on {windows} windows of the selection text; every layer's error "
        f"was taken apart on {layers[0]['windows']} of them. The test text was not touched."
    )


def _own_errors(layers: Rows) -> list[tuple[int, list[float]]]:
    """Of the uniform plans: one line per layer, one value per sparsity."""
    lines: dict[int, list[float]] = {}
    for row in layers:
        if row["order"] == UNIFORM:
            lines.setdefault(row["layer"], []).append(row["local"] / row["energy"])
    return sorted(lines.items())


def _on_sizes(layers: Rows) -> str:
    if len({row["weights"] for row in layers}) == 1:
        return "All layers have the same number of weights: the orders are of exactly the same sparsities."
    return (
        "Layers differ in their number of weights: each order's sparsities are shifted by one common amount, so that "
        "all orders remove the same share of the model."
    )
