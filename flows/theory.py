"""Theory: look at what ATP's theorems say on a model, as numbers and as a page."""

from dataclasses import dataclass
from typing import Any, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.logging import get_run_logger
from pydantic import BaseModel, Field, model_validator

from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.flows.orchestration.prefect_artifacts import where_the_report_is
from layerwise.flows.pipeline.comparison_tables import markdown_of
from layerwise.flows.pipeline.damage_repair import mending
from layerwise.flows.pipeline.stages import captured
from layerwise.flows.pipeline.time_budget import refuse_minutes
from layerwise.flows.report import make_report_with_theory
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.scoring.theory import Findings
from layerwise.scoring.theory_plans import theory_plans
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.signs_of_life import announced
from layerwise.tasks.models.streamed import layer_sizes_of
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.pages.theory_page import PAGE_FILE, theory_page
from layerwise.tasks.pages.theory_text import sentences
from layerwise.tasks.results.summary import number
from layerwise.tasks.results.theory_findings import findings_of, read_tables
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.progress import going_on_without_prefect
from layerwise.tasks.running.stopping import stopping_on_sigterm
from layerwise.tasks.theory import measure_theory

# The plans are the theory's own, and all of them are calibrated on the dense model: the theorems compare prunings of
# a layer by the same inputs.
OF_A_SEARCH = (
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
)
WITHOUT_OPTION = (*OF_A_SEARCH, "export", "retain")


class Theory(BaseModel):
    """Look at ATP's theorems on one model: at several sparsities, and with the same sparsities in several orders."""

    model_config = Search.model_config

    search: Search = Field(
        description="The model, the overall sparsity, the pruner, the texts and the windows; the selection windows are "
        "those that errors are measured on."
    )
    beta: float | None = Field(
        default=None,
        gt=0,
        description="Common difference of the sparsities that are put into several orders; empty: a sixth of the "
        "largest legal one.",
    )

    @model_validator(mode="after")
    def _only_what_is_used(self) -> "Theory":
        for name in OF_A_SEARCH:
            default, value = Search.model_fields[name].default, getattr(self.search, name)
            if value != default:
                shown = getattr(value, "method", value)
                raise ValueError(
                    f"search.{name} is {shown}, which the theory has no use for: its plans are uniform ones without a "
                    "pattern, and orders of one arithmetic progression, calibrated on the dense model. Leave it out."
                )
        return self

    @property
    def used_search(self) -> Search:
        """The search whose first stages are used; with beta among its betas it is refused as early as theirs."""
        betas = None if self.beta is None else (self.beta,)
        return self.search.model_copy(update={"betas": betas, "export": False})

    @property
    def shown(self) -> dict[str, Any]:
        """The settings that have a part in it, by name."""
        everything = self.search.model_dump(mode="json")
        used = {name: value for name, value in everything.items() if name not in WITHOUT_OPTION}
        return used | {"beta": self.beta}

    @property
    def title(self) -> str:
        """What is looked at, in some words."""
        return f"{self.search.title}, {self.search.pruner.method}"


@dataclass(frozen=True)
class TheoryResult:
    """What was found, and where it lies.

    Attributes:
        measured: the artifact with the tables.
        page: where the page lies.
    """

    settings: Theory
    findings: Findings
    measured: Artifact
    page: str


@flow(name="theory", flow_run_name="{settings.title}: theory", persist_result=False)
def theory(settings: Theory, runtime: Runtime) -> TheoryResult:
    """Measure on ``settings.search.model`` what the theorems of ATP say. Safe to stop and start again.

    The newest search of the same model, sparsity, pruner and windows gets it into its report.

    Args:
        settings: what is looked at; decides the result.
        runtime: where and how; changes nothing in the result.

    Raises:
        ValueError: ``runtime`` asks for other processes or has a limit of time, or the model does not allow what is
            asked for.
        CancelledRun: the run was cancelled.
    """
    if runtime.fan_out != "local":
        raise ValueError(
            f"fan_out is {runtime.fan_out}, but all plans of the theory advance in one group, in this process. Leave "
            "fan_out out; to compute elsewhere, start the command there with the same store."
        )
    refuse_minutes(runtime, "theory")
    store = ArtifactStore(runtime.store)
    with stopping_on_sigterm(), announced(store.fs, store.root, f"theory: {settings.title}"):
        try:
            execution = runtime.execution()
            return mending(store, lambda: _run_stages(store, settings, execution))
        except (CancelledRun, TerminationSignal) as ending:
            return cast(TheoryResult, cancelled(ending))


def _run_stages(store: ArtifactStore, settings: Theory, execution: Execution) -> TheoryResult:
    before = captured(store, settings.used_search, execution)
    sizes = layer_sizes_of(before.pruning.prunable(before.linears))
    plans = theory_plans(settings.search.sparsity, settings.beta, sizes)
    inputs = before.inputs("selection")
    measured = measure_theory(store, inputs, plans, before.linears, before.pruning, execution)
    page = theory_page(store, measured, settings.title, settings.shown)
    findings = findings_of(*read_tables(store, measured))
    result = TheoryResult(settings, findings, measured, store.location(page, PAGE_FILE))
    make_report_with_theory(store, measured)
    _publish(result)
    return result


def _publish(result: TheoryResult) -> None:
    """The findings on Prefect's pages."""
    found, title = sentences(result.findings), plain(result.settings.title)
    for name, sentence in found.items():
        get_run_logger().info("theorem %s: %s", name, sentence)
    said = "\n\n".join(f"**{name}** {sentence}" for name, sentence in found.items())
    outcomes = (*result.findings.orders.outcomes, result.findings.uniform)
    orders = [
        {
            "order": outcome.order,
            "sum of all E": f"{outcome.total:.5g}",
            "E of the last layer": f"{outcome.last:.5g}",
            "perplexity": number(outcome.perplexity),
        }
        for outcome in outcomes
    ]
    with going_on_without_prefect():
        create_markdown_artifact(
            key="theory",
            markdown=f"# {title}: the theorems of ATP\n\n{said}\n\n{markdown_of(orders)}\n\n"
            f"## The page\n\n{where_the_report_is(result.page)}",
            description=title,
        )
