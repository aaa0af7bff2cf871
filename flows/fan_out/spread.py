"""Spread a search over processes: its parts run elsewhere, and this process waits for them."""

import os
from contextlib import closing
from dataclasses import dataclass

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.context import FlowRunContext

from layerwise.flows.fan_out.dispatch import FanOut
from layerwise.flows.fan_out.executor import Executor
from layerwise.flows.fan_out.local_processes import LocalProcesses
from layerwise.flows.fan_out.part import PartFailed, SearchParts
from layerwise.flows.fan_out.store_workers import StoreWorkers
from layerwise.flows.fan_out.work_pool import WorkPool, require_server
from layerwise.flows.orchestration.server_check import server_problem
from layerwise.flows.pipeline.lookup import look_up
from layerwise.flows.pipeline.time_limit import is_too_late, stop_after_tried
from layerwise.flows.runtime import FanOutRuntime
from layerwise.flows.settings import Search
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sources.model_source import HubSource, find_source


@dataclass(frozen=True)
class SharedSearch:
    """A search in the form that all its processes use.

    Attributes:
        settings: settings with the commit of a hub model, so that all processes prune the same weights even if the
            model's owner changes it meanwhile.
        runtime: runtime with an absolute path of the store, so that it is the same in every working folder.
        existing: roles of the artifacts that the store had before.
    """

    settings: Search
    runtime: FanOutRuntime
    existing: frozenset[str]


@stage_task(about=lambda settings, **_: settings.title)
def share(store: ArtifactStore, settings: Search, runtime: FanOutRuntime) -> SharedSearch:
    """Resolve the commit of the model and the path of the store once for all processes; commit the token counts."""
    source = find_source(settings.model)
    if isinstance(source, HubSource):
        settings = settings.model_copy(update={"model": source.label})
    if "://" not in runtime.store:
        runtime = runtime.model_copy(update={"store": os.path.abspath(runtime.store)})
    found = look_up(store, settings)
    found.inputs.texts.keep(store)
    existing = (role for role, artifact in found.stages.items() if artifact is not None)
    return SharedSearch(settings, runtime, frozenset(existing))


@stage_task(about=lambda shared, **_: f"{shared.settings.title} over {shared.runtime.fan_out}")
def spread(store: ArtifactStore, shared: SharedSearch, deadline: float) -> Search:
    """Have other processes build the missing artifacts of a search.

    Args:
        deadline: time after which no further lanes are started, on the clock ``time.monotonic``.

    Returns:
        The settings of a search with all artifacts in the store. If the time limit was reached, they have
        ``stop_after``.

    Raises:
        ValueError: the work pool does not exist or cannot run this search; raised before any work.
        PartFailed: a part failed, or Prefect's server refused a request.
        CancelledRun: the search was cancelled.
    """
    try:
        return _spread(store, shared, deadline)
    except httpx.HTTPError as error:  # the fan-out itself waits for a server that does not answer
        raise PartFailed(server_problem(error)) from None


def _spread(store: ArtifactStore, shared: SharedSearch, deadline: float) -> Search:
    settings, runtime = shared.settings, shared.runtime
    found = look_up(store, settings)
    if not found.missing:
        return settings
    tag = f"search:{digest({'settings': settings.model_dump(mode='json'), 'store': runtime.store})[:12]}"
    with (
        get_client(sync_client=True) as client,
        closing(open_executor(client, store, runtime, tag)) as executor,
    ):
        fan_out = FanOut(client, store, executor, tag)
        parts = SearchParts(store, settings, runtime)
        if not found.next_lanes.are_known:
            fan_out.run([parts.capture()])
            found = look_up(store, settings)
        while missing := found.next_lanes.missing:
            lanes, step = found.next_lanes.stages, found.next_lanes.step
            begins = len(missing) == len(lanes) and not step.request.continues
            if begins and is_too_late(step.tried, deadline):
                settings = stop_after_tried(settings, step.tried)
                parts = SearchParts(store, settings, runtime)
            else:
                fan_out.run(parts.groups(found, fan_out.running("branch"), executor.workers))
            found = look_up(store, settings)
        if found.missing:
            fan_out.run([parts.export_and_test()])
            found = look_up(store, settings)
    if found.missing:
        raise PartFailed(
            f"{store.url} lacks {', '.join(found.missing)}, although all parts of the search are done. "
            "Check whether the model or a text has changed during the search, and start the search again."
        )
    return settings


def open_executor(
    client: SyncPrefectClient, store: ArtifactStore, runtime: FanOutRuntime, tag: str
) -> Executor:
    """Return the executor that ``runtime`` asks for.

    Args:
        tag: tag of the search, the same in every run of it.

    Raises:
        ValueError: there is no such work pool, or this run occupies one of the pool's own slots.
    """
    if runtime.fan_out == "store":
        return StoreWorkers(client, store, tag)
    if runtime.processes is not None:
        return LocalProcesses(client, runtime.processes, runtime.device)
    assert runtime.pool is not None, "a local search is not spread"
    require_server()
    pool = WorkPool(client, runtime.pool)
    context = FlowRunContext.get()
    own = None if context is None or context.flow_run is None else context.flow_run.work_pool_name
    if own == runtime.pool:
        raise ValueError(
            f"this search runs on the work pool {own!r} itself, and would occupy a slot there that its lane groups "
            "need. Deploy the search on another pool, which needs no GPU, or set fan_out to local."
        )
    return pool
