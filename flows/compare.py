"""Compare: run several searches of one model, with several allocators, pruners, recoveries, sparsities and seeds.

Searches with the same sparsity, pruner, recovery and seed differ only in their way of allocating. On this machine they advance
together: their lanes share groups and reads of the model, and their chosen plans share the test. A lane's
artifact does not depend on its group, so each search then finds all its artifacts in the store.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from itertools import groupby, product
from math import prod
from typing import Annotated, Any, Literal, NamedTuple

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.exceptions import CancelledRun
from prefect.logging import get_run_logger
from pydantic import BeforeValidator, Field, model_validator

from layerwise.allocators.sparsity_plan import Granularity, SparsityPlan
from layerwise.flows.observers.search_tracker import require_tracking
from layerwise.flows.options import compare_command, parsed, search_command
from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.comparison_tables import (
    Compared,
    markdown_of,
    pruner_title,
    recovery_title,
    rows_of,
    summary_of,
)
from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.flows.pipeline.graph import Scored, capture_steps, lane_step, scoring_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.pipeline.lookup import NextLanes, look_up
from layerwise.flows.pipeline.search_strategy import LaneRequest
from layerwise.flows.presets.atp_paper import MODELS, preset_notes, preset_options
from layerwise.flows.runtime import FanOutRuntime
from layerwise.flows.search import run_search
from layerwise.flows.setting_types import (
    AllocatorChoice,
    PrunerChoice,
    RecoverChoice,
    Settings,
    StrategyName,
)
from layerwise.flows.settings import Search
from layerwise.flows.zero_shot import ZeroShot, compare_models
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.evaluate import evaluate_together
from layerwise.tasks.lanes.group_membership import MOST_PLANS
from layerwise.tasks.lm_eval_tasks.comparison import DISTILLED
from layerwise.tasks.lm_eval_tasks.task_loading import load_tasks
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.report import PAGE_FILE, report
from layerwise.tasks.results.evaluation import best_losses
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.progress import going_on_without_prefect

logger = logging.getLogger(__name__)

COLUMNS = (
    "Perplexities. Gain: reduction of the test perplexity by the best plan, relative to uniform. t: t value of the "
    "paired difference of their losses over the test windows; negative if the best plan's losses are lower."
)
MOST_SEARCHES = 1000  # a longer table is not readable; the limit stops a list that is given by mistake
# Offsets of a two-parameter search that is given by its name: attention loses up to 0.1 more or less than the MLP.
OFFSETS = (-0.1, -0.05, 0.05, 0.1)


class SearchFailed(RuntimeError):
    """One of the searches failed. The message names the search and the reason."""


class NamedSearch(NamedTuple):
    """A search and the name of its way of allocating."""

    search: Search
    allocator: str

    @property
    def title(self) -> str:
        """Settings in which the searches of a comparison differ."""
        search = self.search
        recovery = "" if search.recover is None else f", {recovery_title(search.recover)}"
        return f"sparsity {search.sparsity:g}, {pruner_title(search.pruner)}{recovery}, seed {search.seed}, {self.allocator}"


class Allocation(Settings):
    """A way of allocating: settings that replace those of the common search. Empty settings are as in that search."""

    allocator: AllocatorChoice | None = Field(default=None, description="As for a search.")
    granularity: Granularity | None = Field(default=None, description="As for a search.")
    betas: tuple[float, ...] | None = Field(default=None, description="As for a search.")
    beta_step: float | None = Field(default=None, description="As for a search.")
    offsets: tuple[float, ...] | None = Field(default=None, description="As for a search.")
    strategy: StrategyName | None = Field(default=None, description="As for a search.")
    trials: int | None = Field(default=None, description="As for a search.")

    def of(self, common: Search) -> Search:
        """Return the common search with this way of allocating."""
        changes = {name: value for name, value in dict(self).items() if value is not None}
        no_stops: dict[str, None] = {"trials": None, "stop_after": None}
        if self.strategy is not None and self.strategy != common.strategy:
            # The common limits are meant for the common strategy.
            changes = no_stops | changes
        if self.allocator is not None and self.allocator != common.allocator:
            # The common betas belong to the common allocator.
            no_betas = {"betas": None, "beta_count": None, "beta_step": None}
            strategy = common.strategy if common.strategy == "grid" else "auto"
            changes = {**no_betas, "strategy": strategy, **no_stops} | changes
        return Search(**dict(common) | changes)

    def title(self, common: Search) -> str:
        """Return the name of this way of allocating in a table."""
        step = "" if self.beta_step is None else f" step {self.beta_step:g}"
        return self.of(common).allocation_title + step


def _allocation_by_name(value: Any) -> Any:
    """Return the settings of a way of allocating that is given by name, or as an allocator with its settings."""
    if value == "atp+offset":
        return {"allocator": "atp", "offsets": OFFSETS, "strategy": "two-parameter"}
    if value == "atp+projections":
        return {"allocator": "atp", "offsets": (), "strategy": "projections"}
    if value in ("er", "er_plus"):  # defined by linear only
        return {"allocator": value, "granularity": "linear"}
    if isinstance(value, str) or (isinstance(value, dict) and "method" in value):
        return {"allocator": value}
    return value


def _recovery_by_name(value: Any) -> Any:
    """Accept "none" for a search without recovery."""
    return None if value == "none" else value


class Compare(Settings):
    """Search one model several times: every sparsity with every pruner, recovery, allocator and seed."""

    search: Search = Field(description="Settings that all searches have in common.")
    sparsities: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        default=(), description="Overall sparsities, each between 0 and 1. Empty: that of the common search."
    )
    pruners: tuple[PrunerChoice, ...] = Field(
        default=(),
        description="Pruners, which choose the weights to remove. Empty: that of the common search.",
    )
    recoveries: tuple[Annotated[RecoverChoice | None, BeforeValidator(_recovery_by_name)], ...] = Field(
        default=(),
        description="Recoveries of the remaining weights: none, refit, train. Empty: that of the common search.",
    )
    allocators: tuple[Annotated[Allocation, BeforeValidator(_allocation_by_name)], ...] = Field(
        default=(),
        description="Ways of spreading the sparsity over the layers: names (atp, atp+offset, atp+projections, owl, "
        "...), allocators with their own settings, or the settings of a search that concern allocation. The others are "
        "compared with the first one. Empty: that of the common search.",
    )
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(),
        description="Seeds of the random calibration windows; each seed needs its own pass of the dense model. Empty: "
        "that of the common search.",
    )

    preset: Literal["atp-paper"] | None = Field(
        default=None,
        description="Settings of a published table for all settings that are not given. atp-paper: a table of the ATP paper; "
        "its published numbers stand next to the measured ones where they are known. It fits any model; those of the paper "
        f"are {MODELS}.",
    )
    table: Literal["1", "2", "3", "4", "5", "6", "9", "14", "15"] | None = Field(
        default=None,
        description="Table of the preset. 1: zero-shot accuracy. 2: perplexity at 70 %. 3: perplexity from 50 to 80 %. 4: other "
        "architectures. 5: step of the betas. 6: Bayesian search. 9: GSM8K and MMLU. 14: global, er, er_plus and lamp. 15: "
        "other pruners. Empty: 3.",
    )
    tasks: tuple[str, ...] = Field(
        default=(),
        description="Tasks of lm-eval on which the models of every search are tested, as by zero-shot. Needs room in the store "
        "for two pruned checkpoints per search. Empty: none.",
    )
    way: Literal["streamed", "memory"] = Field(
        default="streamed", description="How a model runs the tasks, as for zero-shot."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        """Set the settings of the preset that are not given."""
        if not isinstance(data, Mapping) or data.get("preset") is None:
            return data
        search = data.get("search")
        if isinstance(search, Search):
            search = {name: getattr(search, name) for name in search.model_fields_set}
        own = search if isinstance(search, Mapping) else {}
        given = [name for name, value in {**data, **own}.items() if value is not None]
        options = preset_options(str(data["preset"]), data.get("table"), given)
        values = {name: parsed(name, text) for name, text in options.items()}
        ours = {name: value for name, value in values.items() if name in cls.model_fields}
        theirs = {name: value for name, value in values.items() if name in Search.model_fields}
        sparsities = data.get("sparsities") or ours.get("sparsities")
        if "sparsity" not in own and isinstance(sparsities, Sequence):
            theirs["sparsity"] = sparsities[0]
        return {**ours, **data, "search": {**theirs, **own}}

    @model_validator(mode="before")
    @classmethod
    def _common_search_may_recover(cls, data: Any) -> Any:
        """Accept ``recover_windows`` in the common search if only the list of recoveries says what they are for."""
        if not isinstance(data, Mapping) or not isinstance(search := data.get("search"), Mapping):
            return data
        recoveries = data.get("recoveries")
        names = (
            [each for each in recoveries if each not in ("none", None)]
            if isinstance(recoveries, list | tuple)
            else []
        )
        if search.get("recover_windows") is None or search.get("recover") is not None or not names:
            return data
        return {**data, "search": {**search, "recover": names[0]}}

    @model_validator(mode="after")
    def _each_search_once(self) -> "Compare":
        if self.table is not None and self.preset is None:
            raise ValueError(f"table is {self.table}, but there is no preset. Set preset to atp-paper.")
        lists = ("sparsities", "pruners", "recoveries", "allocators", "seeds")
        if (count := prod(max(len(getattr(self, name)), 1) for name in lists)) > MOST_SEARCHES:
            raise ValueError(
                f"these are {count} searches, and at most {MOST_SEARCHES} can be compared. Give fewer sparsities, "
                "pruners, recoveries, allocators or seeds."
            )
        for name in lists:
            values = getattr(self, name)
            if twice := [value for index, value in enumerate(values) if value in values[:index]]:
                shown = getattr(twice[0], "method", twice[0])
                raise ValueError(f"{name} has {shown} more than once; give each of them once.")
        _ = self.searches  # validates every combination
        return self

    @property
    def searches(self) -> tuple[Search, ...]:
        """Every combination in the given order, sparsities outermost."""
        return tuple(each.search for each in self.named_searches)

    @property
    def named_searches(self) -> tuple[NamedSearch, ...]:
        """The searches, each with the name of its way of allocating."""
        common = dict(self.search)
        combinations = product(
            self.sparsities or (self.search.sparsity,),
            self.pruners or (self.search.pruner,),
            self.recoveries or (self.search.recover,),
            self.seeds or (self.search.seed,),
            self.allocators or (Allocation(),),
        )
        named = []
        for sparsity, pruner, recover, seed, allocation in combinations:
            # The windows that the common search recovers on do not concern a search without recovery.
            windows = None if recover is None else self.search.recover_windows
            own = {"sparsity": sparsity, "pruner": pruner, "recover": recover, "seed": seed}
            search = Search(**common | own | {"recover_windows": windows})
            # Most of the pruned models would not be used; a later search for one of them reuses everything else.
            without_export = allocation.of(search).model_copy(update={"export": False})
            named.append(NamedSearch(without_export, allocation.title(search)))
        return tuple(named)

    @property
    def title(self) -> str:
        """Short description for lists of runs."""
        more = "".join(f", {sparsity:g}" for sparsity in self.sparsities[1:])
        pruners = ", ".join(pruner.method for pruner in self.pruners or (self.search.pruner,))
        recoveries = f", {len(self.recoveries)} recoveries" if len(self.recoveries) > 1 else ""
        allocators = f", {len(self.allocators)} allocators" if len(self.allocators) > 1 else ""
        seeds = f", {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
        return f"{self.searches[0].title}{more}: {pruners}{recoveries}{allocators}{seeds}"


@flow(name="compare", flow_run_name="{settings.title}", persist_result=False)
def compare(settings: Compare, runtime: FanOutRuntime) -> list[Compared]:
    """Search a model with several allocators, pruners, sparsities or seeds, and compare the results.

    Work that the searches have in common is done once. Safe to stop and start again.

    Args:
        settings: The searches. Determine the results.
        runtime: Where and how to run. Does not change the results.

    Raises:
        ImportError: The package for ``track`` is not installed. Raised before any work.
        SearchFailed: A search failed. The results of the searches before it stay in the store.
        CancelledRun: With ``fan_out``, the run of this comparison or of a part was cancelled.
    """
    require_tracking(runtime.track)
    store = runtime.open_store()

    def run() -> list[Compared]:
        _warn_if_samples_overlap(store, settings)
        if settings.tasks:  # before any work: raises if a task is not available
            _require_tasks(settings)
        searched = [
            replace(each, preset=settings.preset) for each in _run_searches(settings.named_searches, runtime)
        ]
        results = _add_common_reports(store, _test_on_tasks(store, settings, searched, runtime.execution()))
        _publish(store, results, settings)
        return results

    return run_announced(
        store,
        f"compare: {settings.title}",
        run,
        search=digest(settings.model_dump(mode="json")),
        command=compare_command(settings.search, settings, runtime),
        role=runtime.role,
    )


def _require_tasks(settings: Compare) -> None:
    """Load the tasks, and refuse those that cannot be done in the way that is asked for.

    Raises:
        ValueError: see ``load_tasks``; or answers are generated, and the model is streamed.
    """
    generated = [each.task for each in load_tasks(settings.tasks).questions if each.generated]
    if generated and settings.way == "streamed":
        raise ValueError(
            f"{', '.join(generated)}: the model writes answers, and way is streamed, which would read all layers for every "
            "token. Use --way memory, or choose tasks that are scored by log-probabilities."
        )


def _test_on_tasks(
    store: ArtifactStore, settings: Compare, searched: Sequence[Compared], execution: Execution
) -> list[Compared]:
    """Test the models of every search on the tasks."""
    results = []
    for number, each in enumerate(searched, 1):
        if settings.tasks:
            key = _artifact_of(each).key
            get_run_logger().info("tasks of search %d of %d: %s", number, len(searched), key)
            asked = ZeroShot(search=key, tasks=settings.tasks, way=settings.way)
            with _naming_failures(f"tasks of search {number} of {len(searched)}"):
                table = rebuild_damaged(store, partial(compare_models, store, asked, execution))
            each = replace(each, accuracy=table.average, tasks=settings.tasks)
        results.append(each)
    return results


def _warn_if_samples_overlap(store: ArtifactStore, settings: Compare) -> None:
    """Warn if the calibration samples of the seeds share most of their windows, so that they differ too little."""
    if len(settings.seeds) < 2:
        return
    texts = rebuild_damaged(store, lambda: check_inputs(store, settings.searches[0])).texts
    if (sample := texts.overlapping_sample) is not None:
        logger.warning(
            "each of the %d seeds uses %d of the %d calibration windows in %s. Their samples share most windows, "
            "so the spread over the seeds is too small. Use a longer text (calibration) or fewer windows "
            "(calibration_windows).",
            len(settings.seeds),
            sample.windows,
            texts.fitting(sample),
            sample.corpus.label,
        )


def _run_searches(searches: Sequence[NamedSearch], runtime: FanOutRuntime) -> list[Compared]:
    results: list[Compared] = []
    # The searches of a cell differ in their way of allocating only.
    for _, cell in groupby(
        searches,
        key=lambda each: (each.search.sparsity, each.search.pruner, each.search.recover, each.search.seed),
    ):
        results += _run_cell([*cell], len(results), len(searches), runtime)
    return results


def _run_cell(cell: Sequence[NamedSearch], before: int, total: int, runtime: FanOutRuntime) -> list[Compared]:
    """Run the searches of one cell: those with the same sparsity, pruner, recovery and seed.

    Args:
        before: number of searches before them.
        total: number of all searches.
    """
    log, results = get_run_logger(), []
    began = time.monotonic()
    if runtime.fan_out == "local" and len(cell) > 1:
        with _naming_failures(
            f"searches {before + 1} to {before + len(cell)} of {total}: {cell[0].title}, ..."
        ):
            store, execution = runtime.open_store(), runtime.execution()
            searches = [each.search for each in cell]
            rebuild_damaged(store, lambda: _advance_together(store, searches, execution))
    together = time.monotonic() - began
    for number, each in enumerate(cell, before + 1):
        which = f"search {number} of {total}: {each.title}"
        log.info(which)
        began = time.monotonic()
        with _naming_failures(which):
            # Each search gets its own store object, which records what that search has built.
            store = runtime.open_store()
            result = run_search(store, each.search, runtime)
            losses = best_losses(store, result.stages["evaluate"])
        results.append(Compared(result, each.allocator, losses, time.monotonic() - began))
    plans = sum(len(each.result.selection.rows) for each in results)
    return [
        replace(each, seconds=each.seconds + together * len(each.result.selection.rows) / plans)
        for each in results
    ]


@contextmanager
def _naming_failures(which: str) -> Iterator[None]:
    """Turn an error into ``SearchFailed``, whose message names the search."""
    try:
        yield
    except CancelledRun:
        raise
    except Exception as error:
        problem = str(error) or type(error).__name__
        raise SearchFailed(f"{which}: {problem}") from error


def _advance_together(store: ArtifactStore, searches: Sequence[Search], execution: Execution) -> None:
    """Score the plans that the searches request, and test those that they choose.

    The requests of all searches share one read of the model, one pass of the dense model, and one set of factors for a
    pruner that corrects weights.

    Args:
        searches: searches of one cell, whose lanes depend on the same settings, except for the plan.
    """
    captured = [
        build(capture_steps(store, search, check_inputs(store, search)), execution)[0] for search in searches
    ]
    while requests := _missing_lanes([look_up(store, search).next_lanes for search in searches]):
        lane_step(store, captured[0], captured[0].plans, requests[0]).build(execution)
    scored = [_score(store, search, execution) for search in searches]
    before, uniform = scored[0].captured, scored[0].uniform.plan
    best = [each.best.plan for each in scored]
    evaluate_together(store, before.inputs("test"), uniform, best, before.linears, before.pruning, execution)


def _missing_lanes(lanes: Sequence[NextLanes]) -> list[LaneRequest]:
    """Return requests for the lanes that the store lacks, one for each range of windows."""
    plans: dict[tuple[int, int] | None, dict[str, SparsityPlan]] = {}
    for each in lanes:
        for number in each.missing:
            of_windows = plans.setdefault(each.step.request.windows, {})
            of_windows.setdefault(each.stages[number].key, each.step.request.plans[number])
    return [LaneRequest(tuple(by_key.values())[:MOST_PLANS], windows) for windows, by_key in plans.items()]


def _score(store: ArtifactStore, search: Search, execution: Execution) -> Scored:
    scored, _ = build(scoring_steps(store, search, check_inputs(store, search)), execution)
    return scored


def _add_common_reports(store: ArtifactStore, results: Sequence[Compared]) -> list[Compared]:
    """Make the reports of the first allocator's searches again, with the best plans of the others in them.

    Returns:
        All results, with the locations of the new reports.
    """
    common = []
    for _, cell in groupby(results, key=lambda each: each.cell):
        first, *others = cell
        if others:
            compared: dict[str, Artifact] = {}
            for number, other in enumerate(others, 2):
                name = f"{other.allocator} ({number})" if other.allocator in compared else other.allocator
                compared[name] = _artifact_of(other)
            settings = first.result.settings
            page = report(store, _artifact_of(first), search_command(settings), compared=compared)
            first = replace(first, result=replace(first.result, report=store.location(page, PAGE_FILE)))
        common += [first, *others]
    return common


def _artifact_of(compared: Compared) -> Artifact:
    assert compared.result.artifact is not None, "the result of a finished search is committed"
    return compared.result.artifact


def _publish(store: ArtifactStore, results: Sequence[Compared], settings: Compare) -> None:
    """Commit the tables to the store, and show them in Prefect."""
    rows, summary = rows_of(results), summary_of(results)
    # The artifact must not depend on the run, so it holds no times.
    lasting = [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
    found = {
        f"search {number:03d}": each.result.stages["evaluate"].key for number, each in enumerate(results)
    }
    names: list[object] = [[each.allocator, each.result.settings.model_dump(mode="json")] for each in results]
    if settings.preset or settings.tasks:  # a comparison without them has the key of older versions
        names.append([settings.preset, settings.table, settings.tasks, settings.way])
        # The data of a task may have changed since another run of the same comparison.
        # The distilled model is not asked; without its columns, the key is that of older versions.
        accuracies = [asdict(each.accuracy) for each in results if each.accuracy is not None]
        names.append(
            [
                {name: value for name, value in row.items() if not name.startswith(DISTILLED)}
                for row in accuracies
            ]
        )
    notes = [] if settings.preset is None else preset_notes(settings.table)
    title = f"{plain(results[0].result.source)}. {COLUMNS}"

    def build_tables(draft: Draft) -> None:
        draft.write(
            "comparison.json", json.dumps({"searches": lasting, "summary": summary}, indent=1).encode()
        )
        page = f"{title}\n\n{markdown_of(summary)}\n\n{markdown_of(lasting)}\n"
        page += "".join(f"\n- {plain(note)}" for note in notes) + "\n" * bool(notes)
        draft.write("comparison.md", page.encode())

    artifact = store.get_or_build(Stage("compare", 1, names, found), build_tables)
    get_run_logger().info("the tables are in %s/comparison.md", store.location(artifact))
    with going_on_without_prefect():
        create_table_artifact(key="compare-result", table=rows, description=title)
        create_markdown_artifact(key="compare-summary", markdown=f"{title}\n\n{markdown_of(summary)}")
