"""Spread a search over processes: its steps run elsewhere, and this one only waits."""

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import cast

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from layerwise.flows.fan_out.dispatch import FanOut
from layerwise.flows.fan_out.executor import Place
from layerwise.flows.fan_out.lane_groups import lane_groups
from layerwise.flows.fan_out.local_processes import LocalProcesses
from layerwise.flows.fan_out.step import Step, StepFailed, parameters_of
from layerwise.flows.fan_out.work_pool import WorkPool, require_server
from layerwise.flows.orchestration.server_check import server_problem
from layerwise.flows.pipeline.lookup import Found, look_up
from layerwise.flows.pipeline.memory_estimate import SearchSizes
from layerwise.flows.pipeline.time_budget import is_too_late, stopped
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.storage.keys import digest
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.run_names import plans_title, windows_title
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.model_source import HubSource, find_source


@dataclass(frozen=True)
class Shared:
    """A search as all processes that work on it have to see it.

    Attributes:
        settings: with a hub model's commit, so that all prune the same one, even if its owner changes it now.
        runtime: with a store that is the same place in every folder.
        there: roles of the artifacts that the store has from before.
    """

    settings: Search
    runtime: Runtime
    there: frozenset[str]


@stage_task(about=lambda settings, **_: settings.title)
def share(store: ArtifactStore, settings: Search, runtime: Runtime) -> Shared:
    """Look once, for all processes, at what changes with time and place."""
    source = find_source(settings.model)
    if isinstance(source, HubSource):
        settings = settings.model_copy(update={"model": source.label})
    if "://" not in runtime.store:
        runtime = runtime.model_copy(update={"store": os.path.abspath(runtime.store)})
    found = look_up(store, settings)
    found.inputs.texts.keep(store)
    there = (role for role, artifact in found.stages.items() if artifact is not None)
    return Shared(settings, runtime, frozenset(there))


@stage_task(about=lambda shared, **_: f"{shared.settings.title} over {shared.runtime.fan_out}")
def spread(store: ArtifactStore, shared: Shared, end: float) -> Search:
    """Have others build what the store lacks of a search.

    Args:
        end: no plans are begun any more from then on, on the clock ``time.monotonic``.

    Returns:
        The search of which all is there: where its time was over, the one that stops there.

    Raises:
        ValueError: there is no such place, or it is not a place for this; before any work.
        StepFailed: a step failed, or Prefect's server refuses.
        CancelledRun: the search was cancelled.
    """
    try:
        return _spread(store, shared, end)
    except httpx.HTTPError as error:  # not from the fan-out, which waits for a server that does not answer
        raise StepFailed(server_problem(error)) from None


def _spread(store: ArtifactStore, shared: Shared, end: float) -> Search:
    settings, runtime = shared.settings, shared.runtime
    found = look_up(store, settings)
    if not found.missing:
        return settings
    tag = f"search:{digest({'settings': settings.model_dump(mode='json'), 'store': runtime.store})[:12]}"
    with get_client(sync_client=True) as client, closing(open_place(client, runtime)) as place:
        fan_out = FanOut(client, store, place, tag)
        if not found.is_captured:
            fan_out.run([_capture_step(store, settings, runtime)])
            found = look_up(store, settings)
        while found.missing_lanes:
            if len(found.missing_lanes) == len(found.lanes) and is_too_late(found.tried, end):
                settings = stopped(settings, found.tried)
            else:
                fan_out.run(_branch_steps(store, settings, runtime, found, fan_out, place.workers))
            found = look_up(store, settings)
        if found.missing:
            fan_out.run([_evaluate_step(store, settings, runtime)])
            found = look_up(store, settings)
    if found.missing:
        raise StepFailed(
            f"{store.url} has no {', '.join(found.missing)}, although all steps are done. "
            "Has a text or the model changed meanwhile?"
        )
    return settings


def open_place(client: SyncPrefectClient, runtime: Runtime) -> Place:
    """Where ``runtime`` says that the steps run.

    Raises:
        ValueError: there is no such work pool, or it is the one whose slot this run takes itself.
    """
    if runtime.processes is not None:
        return LocalProcesses(client, runtime.processes, runtime.device)
    assert runtime.pool is not None, "a local search is not spread"
    require_server()
    place = WorkPool(client, runtime.pool)
    context = FlowRunContext.get()
    own = None if context is None or context.flow_run is None else context.flow_run.work_pool_name
    if own == runtime.pool:
        raise ValueError(
            f"this search runs on the work pool {own!r} itself, and would wait there in a slot that its groups need. "
            "Deploy the search on a pool of its own, which needs no GPU, or set fan_out to local."
        )
    return place


def _capture_step(store: ArtifactStore, settings: Search, runtime: Runtime) -> Step:
    return Step(
        "capture",
        "capture",
        f"{settings.title}: capture",
        parameters_of(settings, runtime),
        lambda: look_up(store, settings).is_captured,
    )


def _branch_steps(
    store: ArtifactStore, settings: Search, runtime: Runtime, found: Found, fan_out: FanOut, workers: int
) -> list[Step]:
    """One step for each group: those that others are at already, and those that are to be begun."""
    index, windows = found.inputs.index, found.inputs.texts.windows
    dtype = settings.dtype_for(index.dtype)
    sizes = SearchSizes(settings, index, found.linears, dtype, len(found.plans), windows).of(found.request)
    groups: list[list[int]] = []
    left = set(found.missing_lanes)
    for lanes in (_lanes_of(run, found) for run in fan_out.under_way("branch")):
        if left.intersection(lanes) and not any(lane in group for group in groups for lane in lanes):
            groups.append(lanes)
            left -= set(lanes)
    groups += lane_groups(store, found.lanes, sorted(left), sizes, runtime, workers)
    return [_branch_step(store, settings, runtime, found, n, groups) for n in range(len(groups))]


def _lanes_of(run: FlowRun, found: Found) -> list[int]:
    """Which of the lanes that are to be scored next a run is at; none if it is at other windows."""
    windows = run.parameters["windows"]
    if found.request is None or (windows and tuple(windows)) != found.request.windows:
        return []
    points = {tuple(point) for point in cast(list[list[float]], run.parameters["points"])}
    return [number for number, plan in enumerate(found.requested) if (plan.beta, plan.offset) in points]


def _branch_step(
    store: ArtifactStore,
    settings: Search,
    runtime: Runtime,
    found: Found,
    number: int,
    groups: Sequence[Sequence[int]],
) -> Step:
    assert found.request is not None, "there are lanes to be scored"
    windows, lanes = found.request.windows, [found.lanes[lane] for lane in groups[number]]
    plans = [found.requested[lane] for lane in groups[number]]
    what = f"{plans_title(plans)}{windows_title(windows)}"
    parameters: dict[str, object] = {
        "points": [[plan.beta, plan.offset] for plan in plans],
        "windows": windows and list(windows),
    }
    if settings.makes_plans:
        parameters["layers"] = [list(plan.layers) for plan in plans]
    return Step(
        "branch",
        f"group {number + 1} of {len(groups)}: {what}",
        f"{settings.title}: {what}",
        parameters_of(settings, runtime) | parameters,
        lambda: all(store.find(lane) is not None for lane in lanes),
    )


def _evaluate_step(store: ArtifactStore, settings: Search, runtime: Runtime) -> Step:
    return Step(
        "evaluate",
        "export and test",
        f"{settings.title}: export and test",
        parameters_of(settings, runtime),
        lambda: not look_up(store, settings).missing,
    )
