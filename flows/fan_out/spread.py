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
from layerwise.flows.fan_out.part import Part, PartFailed, parameters_of
from layerwise.flows.fan_out.work_pool import WorkPool, require_server
from layerwise.flows.orchestration.server_check import server_problem
from layerwise.flows.pipeline.lane_requests import LaneRequest
from layerwise.flows.pipeline.lookup import Found, NextLanes, look_up
from layerwise.flows.pipeline.memory_estimate import SearchSizes
from layerwise.flows.pipeline.time_budget import is_too_late, stopped
from layerwise.flows.runtime import FanOutRuntime
from layerwise.flows.settings import Search
from layerwise.storage.keys import digest
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.run_names import plans_title, windows_title
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.sources import HubSource, find_source


@dataclass(frozen=True)
class Shared:
    """A search as all processes that work on it have to see it.

    Attributes:
        settings: with a hub model's commit, so that all prune the same one, even if its owner changes it now.
        runtime: with a store that is the same place in every folder.
        there: roles of the artifacts that the store has from before.
    """

    settings: Search
    runtime: FanOutRuntime
    there: frozenset[str]


@stage_task(about=lambda settings, **_: settings.title)
def share(store: ArtifactStore, settings: Search, runtime: FanOutRuntime) -> Shared:
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
def spread(store: ArtifactStore, shared: Shared, deadline: float) -> Search:
    """Have others build what the store lacks of a search.

    Args:
        deadline: time after which no further plans are begun, on the clock ``time.monotonic``.

    Returns:
        The search of which all is there: where its time was over, the one that stops there.

    Raises:
        ValueError: there is no such place, or it is not a place for this; before any work.
        PartFailed: a step failed, or Prefect's server refuses.
        CancelledRun: the search was cancelled.
    """
    try:
        return _spread(store, shared, deadline)
    except httpx.HTTPError as error:  # not from the fan-out, which waits for a server that does not answer
        raise PartFailed(server_problem(error)) from None


def _spread(store: ArtifactStore, shared: Shared, deadline: float) -> Search:
    settings, runtime = shared.settings, shared.runtime
    found = look_up(store, settings)
    if not found.missing:
        return settings
    tag = f"search:{digest({'settings': settings.model_dump(mode='json'), 'store': runtime.store})[:12]}"
    with get_client(sync_client=True) as client, closing(open_place(client, runtime)) as place:
        fan_out = FanOut(client, store, place, tag)
        if not found.next_lanes.are_known:
            fan_out.run([_capture_part(store, settings, runtime)])
            found = look_up(store, settings)
        while missing := found.next_lanes.missing:
            lanes, tried = found.next_lanes.stages, found.next_lanes.step.tried
            if len(missing) == len(lanes) and is_too_late(tried, deadline):
                settings = stopped(settings, tried)
            else:
                fan_out.run(_branch_parts(store, settings, runtime, found, fan_out, place.workers))
            found = look_up(store, settings)
        if found.missing:
            fan_out.run([_evaluate_part(store, settings, runtime)])
            found = look_up(store, settings)
    if found.missing:
        raise PartFailed(
            f"{store.url} has no {', '.join(found.missing)}, although all parts are done. "
            "Has a text or the model changed meanwhile?"
        )
    return settings


def open_place(client: SyncPrefectClient, runtime: FanOutRuntime) -> Place:
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


def _capture_part(store: ArtifactStore, settings: Search, runtime: FanOutRuntime) -> Part:
    return Part(
        "capture",
        "capture",
        f"{settings.title}: capture",
        parameters_of(settings, runtime),
        lambda: look_up(store, settings).next_lanes.are_known,
    )


def _branch_parts(
    store: ArtifactStore,
    settings: Search,
    runtime: FanOutRuntime,
    found: Found,
    fan_out: FanOut,
    workers: int,
) -> list[Part]:
    """Return a part for each group: the groups that other processes are working on, and those to begin."""
    index, linears, windows = found.inputs.index, found.inputs.linears, found.inputs.texts.windows
    next_lanes = found.next_lanes
    request = next_lanes.step.request
    dtype = settings.dtype_for(index.dtype)
    sizes = SearchSizes(settings, index, linears, dtype, len(next_lanes.step.plans), windows).of(request)
    groups: list[list[int]] = []
    left = set(next_lanes.missing)
    for lanes in (_lanes_of(run, request) for run in fan_out.under_way("branch")):
        if left.intersection(lanes) and not any(lane in group for group in groups for lane in lanes):
            groups.append(lanes)
            left -= set(lanes)
    groups += lane_groups(store, next_lanes.stages, sorted(left), sizes, runtime, workers)
    return [_branch_part(store, settings, runtime, next_lanes, n, groups) for n in range(len(groups))]


def _lanes_of(run: FlowRun, request: LaneRequest) -> list[int]:
    """Return which of the requested lanes a run is scoring; none if it scores them on other windows."""
    windows = run.parameters["windows"]
    if (windows and tuple(windows)) != request.windows:
        return []
    points = {tuple(point) for point in cast(list[list[float]], run.parameters["points"])}
    return [number for number, plan in enumerate(request.plans) if (plan.beta, plan.offset) in points]


def _branch_part(
    store: ArtifactStore,
    settings: Search,
    runtime: FanOutRuntime,
    next_lanes: NextLanes,
    number: int,
    groups: Sequence[Sequence[int]],
) -> Part:
    request = next_lanes.step.request
    lanes = [next_lanes.stages[lane] for lane in groups[number]]
    plans = [request.plans[lane] for lane in groups[number]]
    what = f"{plans_title(plans)}{windows_title(request.windows)}"
    parameters: dict[str, object] = {
        "points": [[plan.beta, plan.offset] for plan in plans],
        "windows": request.windows and list(request.windows),
    }
    if settings.makes_plans:
        parameters["layers"] = [list(plan.layers) for plan in plans]
    return Part(
        "branch",
        f"group {number + 1} of {len(groups)}: {what}",
        f"{settings.title}: {what}",
        parameters_of(settings, runtime) | parameters,
        lambda: all(store.find(lane) is not None for lane in lanes),
    )


def _evaluate_part(store: ArtifactStore, settings: Search, runtime: FanOutRuntime) -> Part:
    return Part(
        "evaluate",
        "export and test",
        f"{settings.title}: export and test",
        parameters_of(settings, runtime),
        lambda: not look_up(store, settings).missing,
    )
