"""Compare: several searches of one model, with several allocators, pruners, sparsities and calibration samples."""

import json
import logging
from collections.abc import Sequence
from itertools import product
from math import prod
from typing import Annotated, Any, Literal, cast

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.logging import get_run_logger
from pydantic import BaseModel, BeforeValidator, Field, model_validator

from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.flows.pipeline.compared_searches import search_all, with_common_reports
from layerwise.flows.pipeline.comparison_tables import Compared, markdown_of, rows_of, summary_of
from layerwise.flows.pipeline.damage_repair import mending
from layerwise.flows.pipeline.stages import check_inputs
from layerwise.flows.pipeline.time_budget import refuse_minutes
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import AllocatorChoice, PrunerChoice, Strategy
from layerwise.flows.settings import Search
from layerwise.storage.draft import Draft
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.running.progress import going_on_without_prefect
from layerwise.tasks.running.stopping import stopping_on_sigterm

logger = logging.getLogger(__name__)

COLUMNS = (
    "Perplexities. Gain: how far the best plan's is below uniform's on the test text; t: of the paired difference of "
    "their losses, over the test windows, negative if the best plan's is lower."
)
MOST_SEARCHES = 1000  # a table of more is read by nobody; a list by mistake ends here
# Of a two-parameter search that is asked for by name: attention loses up to a tenth more or less than the MLP.
OFFSETS = (-0.1, -0.05, 0.05, 0.1)


def _by_name(value: Any) -> Any:
    """A way of allocating by the allocator's name, or by the allocator with its settings."""
    if value == "atp+offset":
        return {"allocator": "atp", "offsets": OFFSETS, "strategy": "two-parameter"}
    if value == "atp+projections":
        return {"allocator": "atp", "offsets": (), "strategy": "projections"}
    if isinstance(value, str) or (isinstance(value, dict) and "method" in value):
        return {"allocator": value}
    return value


class Allocation(BaseModel):
    """A way of allocating: the settings of a search that it changes; what is left out is as in the common search."""

    model_config = Search.model_config

    allocator: AllocatorChoice | None = Field(default=None, description="As for a search.")
    granularity: Literal["layer", "linear"] | None = Field(default=None, description="As for a search.")
    betas: tuple[float, ...] | None = Field(default=None, description="As for a search.")
    offsets: tuple[float, ...] | None = Field(default=None, description="As for a search.")
    strategy: Strategy | None = Field(default=None, description="As for a search.")
    trials: int | None = Field(default=None, description="As for a search.")

    def of(self, common: Search) -> Search:
        """The search with this way of allocating."""
        changes = {name: value for name, value in dict(self).items() if value is not None}
        no_stops: dict[str, None] = {"trials": None, "stop_after": None}
        if self.strategy is not None and self.strategy != common.strategy:
            # The common ones are of the common strategy.
            changes = no_stops | changes
        if self.allocator is not None and self.allocator != common.allocator:
            # The common betas are ATP's, or another allocator's strengths.
            no_betas = {"betas": None, "beta_count": None, "beta_step": None}
            changes = {**no_betas, "strategy": "grid", **no_stops} | changes
        return Search(**dict(common) | changes)

    def title(self, common: Search) -> str:
        """What it is called in a table."""
        return self.of(common).allocation_title


class Compare(BaseModel):
    """Search one model several times: every sparsity with every pruner, every allocator and every seed."""

    model_config = Search.model_config

    search: Search = Field(description="What all searches have in common.")
    sparsities: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(), description="Overall sparsities, each between 0 and 1; empty: the common one."
    )
    pruners: tuple[PrunerChoice, ...] = Field(
        default=(), description="How the weights to remove are chosen; empty: the common way."
    )
    allocators: tuple[Annotated[Allocation, BeforeValidator(_by_name)], ...] = Field(
        default=(),
        description="How sparsity is spread over the layers: names (atp, atp+offset, atp+projections, owl, ...), "
        "allocators with settings of their own, or a search's settings about it. The first is what the others are "
        "compared with. Empty: the common way.",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="Seeds of the random calibration windows; each asks for a pass of the dense model of its own. "
        "Empty: the common one.",
    )

    @model_validator(mode="after")
    def _each_search_once(self) -> "Compare":
        lists = ("sparsities", "pruners", "allocators", "seeds")
        if (count := prod(max(len(getattr(self, name)), 1) for name in lists)) > MOST_SEARCHES:
            raise ValueError(
                f"these are {count} searches, and at most {MOST_SEARCHES} can be compared. Give fewer sparsities, "
                "pruners, allocators or seeds."
            )
        for name in lists:
            values = getattr(self, name)
            if twice := [value for index, value in enumerate(values) if value in values[:index]]:
                shown = getattr(twice[0], "method", twice[0])
                raise ValueError(f"{name} has {shown} more than once; give each of them once.")
        _ = self.searches
        return self

    @property
    def searches(self) -> tuple[Search, ...]:
        """Every combination, by sparsity first, in the order in which they were given."""
        return tuple(search for search, _ in self.named_searches)

    @property
    def named_searches(self) -> tuple[tuple[Search, str], ...]:
        """The searches, each with what its way of allocating is called."""
        common = dict(self.search)
        combinations = product(
            self.sparsities or (self.search.sparsity,),
            self.pruners or (self.search.pruner,),
            self.seeds or (self.search.seed,),
            self.allocators or (Allocation(),),
        )
        named = []
        for sparsity, pruner, seed, allocation in combinations:
            search = Search(**common | {"sparsity": sparsity, "pruner": pruner, "seed": seed})
            # Of a checkpoint for each combination nobody has a use; a search for the best one finds all else done.
            named.append(
                (allocation.of(search).model_copy(update={"export": False}), allocation.title(search))
            )
        return tuple(named)

    @property
    def title(self) -> str:
        """The searches in some words, for lists of runs."""
        more = "".join(f", {sparsity:g}" for sparsity in self.sparsities[1:])
        pruners = ", ".join(pruner.method for pruner in self.pruners or (self.search.pruner,))
        allocators = f", {len(self.allocators)} allocators" if len(self.allocators) > 1 else ""
        seeds = f", {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        return f"{self.searches[0].title}{more}: {pruners}{allocators}{seeds}"


@flow(name="compare", flow_run_name="{settings.title}", persist_result=False)
def compare(settings: Compare, runtime: Runtime) -> list[Compared]:
    """Search a model with several allocators, pruners, sparsities or seeds, one after the other; compare the results.

    What the searches have in common is computed once. Safe to stop and start again.

    Args:
        settings: The searches; decides the results.
        runtime: Where and how; changes nothing in the results.

    Raises:
        ValueError: ``runtime`` has a limit of time.
        SearchFailed: one of them cannot be done; the results of those before it stay in the store.
        CancelledRun: with ``fan_out``, somebody cancelled the run or a part of it.
    """
    refuse_minutes(runtime, "compare")
    store = ArtifactStore(runtime.store)
    with stopping_on_sigterm(), announced(store, f"compare: {settings.title}"):
        try:
            _warn_of_common_windows(store, settings)
            results = with_common_reports(store, search_all(settings.named_searches, runtime))
        except (CancelledRun, TerminationSignal) as ending:
            return cast(list[Compared], cancelled(ending))
    _publish(store, results)
    return results


def _warn_of_common_windows(store: ArtifactStore, settings: Compare) -> None:
    """Say so if the samples of several seeds have most of their windows in common: they would tell too little apart."""
    if len(settings.seeds) < 2:
        return
    texts = mending(store, lambda: check_inputs(store, settings.searches[0])).texts
    if texts.samples_overlap:
        logger.warning(
            "each of the %d seeds takes %d of the %d calibration windows that the text gives, so their samples have "
            "most windows in common, and the spread over seeds is too small. Use a longer text (calibration) or fewer "
            "windows (calibration_windows).",
            len(settings.seeds),
            texts.windows["calibration"],
            texts.fitting("calibration"),
        )


def _publish(store: ArtifactStore, results: Sequence[Compared]) -> None:
    """The tables as an artifact of the store, and on Prefect's pages."""
    rows, summary = rows_of(results), summary_of(results)
    # The artifact holds what was found; how long this run took is no part of that, and would differ with every run.
    lasting = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    found = {
        f"search {number:03d}": each.result.stages["evaluate"].key for number, each in enumerate(results)
    }
    names = [[each.allocator, each.result.settings.model_dump(mode="json")] for each in results]
    title = f"{plain(results[0].result.source)}. {COLUMNS}"

    def build(draft: Draft) -> None:
        draft.write(
            "comparison.json", json.dumps({"searches": lasting, "summary": summary}, indent=1).encode()
        )
        page = f"{title}\n\n{markdown_of(summary)}\n\n{markdown_of(lasting)}\n"
        draft.write("comparison.md", page.encode())

    artifact = store.get_or_build(Stage("compare", 1, names, found), build)
    get_run_logger().info("the tables are in %s/comparison.md", store.location(artifact))
    with going_on_without_prefect():
        create_table_artifact(key="compare-result", table=rows, description=title)
        create_markdown_artifact(key="compare-summary", markdown=f"{title}\n\n{markdown_of(summary)}")
