"""Search: find the beta that serves a model best at one overall sparsity, and export the model pruned by it."""

from collections.abc import Collection
from math import inf

from prefect import flow

from layerwise.flows.fan_out.spread import share, spread
from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.orchestration.prefect_artifacts import publish_to_prefect
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.damage_repair import mending
from layerwise.flows.pipeline.graph import search_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.pipeline.result import SearchResult, commit_result
from layerwise.flows.pipeline.time_budget import check_minutes, deadline_of
from layerwise.flows.runtime import FanOutRuntime, SearchRuntime
from layerwise.flows.settings import Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.evaluate import read_test
from layerwise.tasks.running.execution import Execution


@flow(name="search", flow_run_name="{settings.title}", persist_result=False)
def search(settings: Search, runtime: SearchRuntime) -> SearchResult:
    """Prune ``settings.model`` with every beta, choose the best, export and test it. Safe to stop and start again.

    Args:
        settings: what to search for; decides the result.
        runtime: where and how to run; changes nothing in the result, except that ``minutes`` may end it earlier.

    Raises:
        ValueError: the model, the texts or the settings cannot be used; raised before any work.
        PartFailed: with ``fan_out``, another process could not do its part.
        CancelledRun: with ``fan_out``, this run or the run of a part was cancelled.
    """
    check_minutes(settings, runtime)
    store = ArtifactStore(runtime.store)
    deadline = deadline_of(runtime)
    return run_announced(
        store, f"search: {settings.title}", lambda: run_search(store, settings, runtime, deadline)
    )


def run_search(
    store: ArtifactStore, settings: Search, runtime: FanOutRuntime, deadline: float = inf
) -> SearchResult:
    """Search as a part of a flow.

    Args:
        deadline: time after which no further plans are begun, on the clock ``time.monotonic``.

    Raises:
        PartFailed: with ``fan_out``, another process could not do its part.
        CancelledRun: with ``fan_out``, this run or the run of a part was cancelled.
    """
    if runtime.fan_out == "local":
        execution = runtime.execution()
        return mending(store, lambda: _run_steps(store, settings, settings, execution, deadline))
    # This process only reads what the others have made: it needs no device.
    execution = runtime.model_copy(update={"device": "cpu"}).execution()
    shared = mending(store, lambda: share(store, settings, runtime))

    def wait_and_collect() -> SearchResult:
        tried = spread(store, shared, deadline)
        return _run_steps(store, settings, tried, execution, there=shared.there)

    return mending(store, wait_and_collect)


def _run_steps(
    store: ArtifactStore,
    asked: Search,
    settings: Search,
    execution: Execution,
    deadline: float = inf,
    there: Collection[str] | None = None,
) -> SearchResult:
    """Run the steps of a search, and publish the result.

    Args:
        asked: the search as the user started it.
        settings: the search as all processes see it.
        deadline: time after which no further plans are begun, on the clock ``time.monotonic``.
        there: roles of the artifacts that existed before other processes worked for this search; None if none did.
    """
    inputs = check_inputs(store, settings)
    chosen, stages = build(search_steps(store, settings, inputs, deadline), execution)
    checkpoint = chosen.scored.captured.checkpoint
    built = [
        role
        for role, artifact in stages.items()
        if artifact.key in store.built or (there is not None and role not in there)
    ]
    result = SearchResult(
        asked.model_copy(update={"stop_after": chosen.scored.settings.stop_after}),
        str(checkpoint.artifact.facts["source"]),
        chosen.selection,
        read_test(store, chosen.tested),
        None if chosen.exported is None else store.location(chosen.exported),
        stages,
        tuple(built),
        checkpoint.bytes_read,
    )
    result, page = commit_result(store, result)
    publish_to_prefect(store, result, page)
    return result
