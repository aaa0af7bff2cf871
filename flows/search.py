"""Search: find the best beta for a model at one overall sparsity, and export the model pruned by it."""

from collections.abc import Collection
from math import inf

from prefect import flow

from layerwise.flows.fan_out.spread import share, spread
from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.flows.pipeline.graph import Chosen, search_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.pipeline.prefect_artifacts import publish_to_prefect
from layerwise.flows.pipeline.result import SearchResult, commit_result
from layerwise.flows.pipeline.time_limit import check_minutes, deadline_of
from layerwise.flows.runtime import FanOutRuntime, SearchRuntime
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.evaluation import RecoveryTest, read_recovery, read_test
from layerwise.tasks.results.stage_times import READ
from layerwise.tasks.results.summary import sentences_on_recovery
from layerwise.tasks.running.execution import Execution


@flow(name="search", flow_run_name="{settings.title}", persist_result=False)
def search(settings: Search, runtime: SearchRuntime) -> SearchResult:
    """Prune ``settings.model`` with every beta, choose the best, export and test it. Safe to stop and start again.

    Args:
        settings: What to search for. Determines the result.
        runtime: Where and how to run. Does not change the result, except that ``minutes`` may end the search earlier.

    Raises:
        ValueError: The model, the texts or the settings cannot be used. Raised before any work.
        PartFailed: With ``fan_out``, another process could not run its part.
        CancelledRun: With ``fan_out``, the run of this search or of a part was cancelled.
    """
    check_minutes(settings, runtime)
    store, deadline = runtime.open_store(), deadline_of(runtime)
    return run_announced(
        store,
        f"search: {settings.title}",
        lambda: run_search(store, settings, runtime, deadline),
        runtime.role,
    )


def run_search(
    store: ArtifactStore, settings: Search, runtime: FanOutRuntime, deadline: float = inf
) -> SearchResult:
    """Run a search within a flow.

    Args:
        deadline: time after which no further lanes are started, on the clock ``time.monotonic``.

    Raises:
        PartFailed: with ``fan_out``, another process could not run its part.
        CancelledRun: with ``fan_out``, the run of this search or of a part was cancelled.
    """
    if runtime.fan_out == "local":
        return rebuild_damaged(store, lambda: _search_here(store, settings, runtime.execution(), deadline))
    return _search_elsewhere(store, settings, runtime, deadline)


def _search_here(
    store: ArtifactStore, settings: Search, execution: Execution, deadline: float
) -> SearchResult:
    """Build all artifacts of a search in this process."""
    inputs = check_inputs(store, settings)
    chosen, stages = build(search_steps(store, settings, inputs, deadline), execution)
    built = [role for role, artifact in stages.items() if artifact.key in store.built]
    return _publish(store, settings, chosen, stages, built)


def _search_elsewhere(
    store: ArtifactStore, settings: Search, runtime: FanOutRuntime, deadline: float
) -> SearchResult:
    """Have other processes build the artifacts of a search, and collect them."""
    execution = runtime.model_copy(update={"device": "cpu"}).execution()  # no computation in this process
    shared = rebuild_damaged(store, lambda: share(store, settings, runtime))

    def wait_and_collect() -> SearchResult:
        tried = spread(store, shared, deadline)
        chosen, stages = build(search_steps(store, tried, check_inputs(store, tried)), execution)
        built = [
            role
            for role, artifact in stages.items()
            if artifact.key in store.built or role not in shared.existing
        ]
        return _publish(store, settings, chosen, stages, built)

    return rebuild_damaged(store, wait_and_collect)


def _publish(
    store: ArtifactStore,
    settings: Search,
    chosen: Chosen,
    stages: dict[str, Artifact],
    built: Collection[str],
) -> SearchResult:
    """Commit the result of a search and its report, and show them in Prefect.

    Args:
        settings: settings as the user gave them.
        stages: all artifacts of the search by role.
        built: roles of the artifacts that were built in this run.
    """
    checkpoint, recovery = chosen.scored.captured.checkpoint, read_recovery(store, chosen.tested)
    result = SearchResult(
        settings=settings.model_copy(update={"stop_after": chosen.scored.settings.stop_after}),
        source=str(checkpoint.artifact.facts["source"]),
        selection=chosen.selection,
        test=read_test(store, chosen.tested),
        pruned=None if chosen.exported is None else store.location(chosen.exported),
        stages=stages,
        built=tuple(built),
        bytes_read=checkpoint.bytes_read + _bytes_of_import(store, checkpoint.artifact),
        recovery=recovery,
        experts=tuple(chosen.scored.expert_rows(store)),
        recovery_text="" if recovery is None else _recovery_text(settings, recovery, stages),
    )
    result, page = commit_result(store, result)
    publish_to_prefect(store, result, page)
    return result


def _bytes_of_import(store: ArtifactStore, imported: Artifact) -> int:
    """Return the bytes of weights that the import read in this process; 0 if the store had it."""
    return int(str(imported.facts.get(READ, 0))) if imported.key in store.built else 0


def _recovery_text(settings: Search, recovery: RecoveryTest, stages: dict[str, Artifact]) -> str:
    assert settings.recover is not None, "only a search with recovery compares both"
    return sentences_on_recovery(
        settings.recover.method, recovery, stages, settings.recover_windows, settings.calibrate_on
    )
