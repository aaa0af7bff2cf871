"""Theory: measure on the selection windows what the theorems of ATP state (arXiv:2502.14770, section 3)."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from layerwise.models.skeleton import Linear
from layerwise.scoring.perplexity import perplexity
from layerwise.scoring.theorem_checks import Findings
from layerwise.scoring.theorem_plans import TheoryPlan
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import write_table
from layerwise.tasks.charts.drawing import svg_inside, write_figures
from layerwise.tasks.charts.theory_figures import TITLES, figures_of_theory
from layerwise.tasks.evaluate import LOCAL_WINDOWS
from layerwise.tasks.lanes.lane_group import GroupResult, LaneInputs, PlannedLane, advance_group
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.models.streamed import layer_sizes_of
from layerwise.tasks.pages.page_template import render
from layerwise.tasks.pages.theory_section import read_section
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.results.theory_findings import (
    LAYERS_FILE,
    PLANS_FILE,
    THEORY_STAGE,
    Rows,
    findings_of,
    verdicts,
)
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task

THEORY_FILE = "theory.json"
PAGE_FILE = "theory.html"


def theory_stage(inputs: LaneInputs, plans: Sequence[TheoryPlan], settings: PruneSettings) -> Stage:
    """Describe the measurement of these plans."""
    tried = [[each.order, each.target, list(each.plan.layers)] for each in plans]
    own = {"plans": tried, "local_windows": LOCAL_WINDOWS, "prune": settings.identity}
    return Stage(THEORY_STAGE, 1, own, inputs.keys(settings))


@stage_task(
    name=THEORY_STAGE,
    about=lambda inputs, plans, settings, **_: (
        f"{model_title(inputs.checkpoint)} at {settings.target:g}, {len(plans)} plans"
    ),
)
def measure_theory(
    store: ArtifactStore,
    inputs: LaneInputs,
    plans: Sequence[TheoryPlan],
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> Artifact:
    """Run all plans in one group, and record every layer's error and its parts.

    The artifact holds ``layers.parquet`` (one row per plan and layer), ``plans.parquet``, and ``theory.json`` with the
    findings.

    Args:
        plans: see ``theory_plans``.
        settings: ``target`` is the overall sparsity of the orders.

    Raises:
        ValueError: an error is not finite, because it exceeds the range of the dtype.
    """

    def build(draft: Draft) -> None:
        title = f"theory: {len(plans)} plans and the dense model"
        planned = [
            PlannedLane(replace(settings, target=each.target).removed(each.plan, linears)) for each in plans
        ]
        result = advance_group(store, draft, inputs, planned, settings, execution, title, LOCAL_WINDOWS)
        sizes = layer_sizes_of(settings.prunable(linears))
        layers, of_plans = _layer_rows(plans, result, sizes), _plan_rows(plans, result)
        _require_finite(layers, settings)
        write_table(draft, LAYERS_FILE, pa.Table.from_pylist(layers))
        write_table(draft, PLANS_FILE, pa.Table.from_pylist(of_plans))
        found = findings_of(layers, of_plans)
        draft.write(THEORY_FILE, json.dumps(_document(found), indent=1).encode())
        draft.facts |= {f"holds {name}": holds for name, holds in verdicts(found).items()}

    return store.get_or_build(theory_stage(inputs, plans, settings), build)


def _layer_rows(plans: Sequence[TheoryPlan], result: GroupResult, sizes: Sequence[int]) -> Rows:
    rows = []
    for lane, each in enumerate(plans, 1):
        for layer, outcomes in enumerate(result.outcomes):
            outcome = outcomes[lane]
            assert outcome.parts is not None, "the errors of every pruned lane are split"
            rows.append(
                {
                    "order": each.order,
                    "target": each.target,
                    "beta": each.plan.beta,
                    "layer": layer,
                    "weights": sizes[layer],
                    "sparsity": each.plan.layers[layer],
                    "error": outcome.error,
                    "dense_energy": outcome.energy,
                    **asdict(outcome.parts),
                    "factor": outcome.parts.factor,
                }
            )
    return rows


def _plan_rows(plans: Sequence[TheoryPlan], result: GroupResult) -> Rows:
    return [
        {
            "order": each.order,
            "target": each.target,
            "beta": each.plan.beta,
            "perplexity": perplexity(losses),
            "losses": losses,
        }
        for each, losses in zip(plans, result.losses[1:], strict=True)
    ]


def _require_finite(layers: Rows, settings: PruneSettings) -> None:
    for row in layers:
        if not math.isfinite(row["error"] + row["local"] + row["propagated"]):
            raise ValueError(
                f"layer {row['layer']} of the {row['order']} plan at sparsity {row['target']:g} has an error that is "
                f"not finite in {settings.dtype}. Compute in float32 or bfloat16 (--dtype)."
            )


def _document(found: Findings) -> dict[str, object]:
    """Return the findings as JSON, for people and for programs that do not read Parquet."""
    propagations = [
        {"sparsity": level, "layers": [asdict(layer) for layer in each.layers]}
        for level, each in found.propagations.items()
    ]
    return {
        "holds": verdicts(found),
        "3.1": {"levels": found.levels, **asdict(found.rise)},
        "3.2": propagations,
        "3.5": {
            "orders": [asdict(outcome) for outcome in found.orders.outcomes],
            "uniform": asdict(found.uniform),
            "runner-up": found.orders.runner_up.order,
            "gain": asdict(found.orders.gain),
        },
    }


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
