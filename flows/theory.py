"""Theory: measure on a model whether ATP's theorems hold (arXiv:2502.14770, section 3), as numbers and as a page."""

from dataclasses import dataclass
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.logging import get_run_logger
from pydantic import Field, model_validator

from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.comparison_tables import markdown_of
from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.flows.pipeline.graph import capture_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.pipeline.prefect_artifacts import where_the_report_is
from layerwise.flows.report import make_report_with_theory
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import Settings
from layerwise.flows.settings import Search
from layerwise.scoring.perplexity import format_perplexity
from layerwise.scoring.theorem_checks import Findings
from layerwise.scoring.theorem_plans import theory_plans
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.models.streamed import layer_sizes_of
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.pages.theory_section import sentences
from layerwise.tasks.results.theory_findings import findings_of, read_tables
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.progress import going_on_without_prefect
from layerwise.tasks.theory import PAGE_FILE, measure_theory, theory_page

# Settings of a search that the theory does not use. It has its own plans, and calibrates all of them on the dense model,
# because the theorems compare prunings of a layer for the same inputs.
UNUSED = (
    "pattern",
    "allocator",
    "granularity",
    "offsets",
    "calibration_mode",
    "betas",
    "beta_count",
    "beta_step",
    "strategy",
    "trials",
    "stop_after",
    "recover",
    "recover_windows",
    "criterion",
)
WITHOUT_OPTION = (*UNUSED, "export", "retain")


class Theory(Settings):
    """Measure ATP's theorems on one model: at several sparsities, and with the same sparsities in several orders."""

    search: Search = Field(
        description="Model, overall sparsity, pruner, texts and windows. Errors are measured on the selection windows."
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        description="Common difference of the sparsities that are put into several orders. Empty: a sixth of the largest "
        "legal beta.",
    )

    @model_validator(mode="after")
    def _only_what_is_used(self) -> "Theory":
        for name in UNUSED:
            default, value = Search.model_fields[name].default, getattr(self.search, name)
            if value != default:
                shown = getattr(value, "method", value)
                raise ValueError(
                    f"search.{name} is {shown}, but the theory does not use this setting: its plans are uniform, or "
                    "orders of one arithmetic progression, without a pattern, without recovery, calibrated on the dense model. "
                    "Leave it out."
                )
        return self

    @property
    def used_search(self) -> Search:
        """Search whose first stages are used. It includes beta, so that an illegal beta is refused before any work."""
        betas = None if self.beta is None else (self.beta,)
        return self.search.model_copy(update={"betas": betas, "export": False})

    @property
    def shown(self) -> dict[str, Any]:
        """Settings that are used, by name."""
        everything = self.search.model_dump(mode="json")
        used = {name: value for name, value in everything.items() if name not in WITHOUT_OPTION}
        return used | {"beta": self.beta}

    @property
    def title(self) -> str:
        """Short description for lists of runs."""
        return f"{self.search.title}, {self.search.pruner.method}"


@dataclass(frozen=True)
class TheoryResult:
    """Findings, and where they are.

    Attributes:
        measured: artifact with the tables of the measurements.
        page: location of the page.
    """

    settings: Theory
    findings: Findings
    measured: Artifact
    page: str


@flow(name="theory", flow_run_name="{settings.title}: theory", persist_result=False)
def theory(settings: Theory, runtime: Runtime) -> TheoryResult:
    """Measure on ``settings.search.model`` whether the theorems of ATP hold. Safe to stop and start again.

    The findings are added to the report of the newest search of the same model, sparsity, pruner and windows.

    Args:
        settings: What to measure. Determines the result.
        runtime: Where and how to run. Does not change the result.

    Raises:
        ValueError: The model does not allow these settings.
        CancelledRun: The run was cancelled.
    """
    store, execution = runtime.open_store(), runtime.execution()
    return run_announced(
        store,
        f"theory: {settings.title}",
        lambda: rebuild_damaged(store, lambda: _measure(store, settings, execution)),
    )


def _measure(store: ArtifactStore, settings: Theory, execution: Execution) -> TheoryResult:
    inputs = check_inputs(store, settings.used_search)
    before, _ = build(capture_steps(store, settings.used_search, inputs), execution)
    sizes = layer_sizes_of(before.pruning.prunable(before.linears))
    plans = theory_plans(settings.search.sparsity, settings.beta, sizes)
    measured = measure_theory(
        store, before.inputs("selection"), plans, before.linears, before.pruning, execution
    )
    page = theory_page(store, measured, settings.title, settings.shown)
    findings = findings_of(*read_tables(store, measured))
    result = TheoryResult(settings, findings, measured, store.location(page, PAGE_FILE))
    make_report_with_theory(store, measured)
    _publish(result)
    return result


def _publish(result: TheoryResult) -> None:
    """Log the findings, and show them in Prefect."""
    theorems, title = sentences(result.findings), plain(result.settings.title)
    for name, sentence in theorems.items():
        get_run_logger().info("theorem %s: %s", name, sentence)
    paragraphs = "\n\n".join(f"**{name}** {sentence}" for name, sentence in theorems.items())
    outcomes = (*result.findings.orders.outcomes, result.findings.uniform)
    orders = [
        {
            "order": outcome.order,
            "sum of all E": f"{outcome.total:.5g}",
            "E of the last layer": f"{outcome.last:.5g}",
            "perplexity": format_perplexity(outcome.perplexity),
        }
        for outcome in outcomes
    ]
    with going_on_without_prefect():
        create_markdown_artifact(
            key="theory",
            markdown=f"# {title}: the theorems of ATP\n\n{paragraphs}\n\n{markdown_of(orders)}\n\n"
            f"## The page\n\n{where_the_report_is(result.page)}",
            description=title,
        )
