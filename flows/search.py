"""Search: find the beta that serves a model best at one overall sparsity, and export the model pruned by it."""

import json
from collections.abc import Collection
from dataclasses import asdict, replace
from math import inf
from typing import cast

from prefect import flow
from prefect.exceptions import CancelledRun, TerminationSignal

from layerwise.flows.fan_out.spread import share, spread
from layerwise.flows.options import search_command
from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.flows.orchestration.prefect_artifacts import publish_to_prefect
from layerwise.flows.pipeline.damage_repair import mending
from layerwise.flows.pipeline.result import SearchResult
from layerwise.flows.pipeline.stages import chosen
from layerwise.flows.pipeline.time_budget import check_minutes, end_of
from layerwise.flows.pipeline.versions import versions
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.signs_of_life import announced
from layerwise.tasks.report import PAGE_FILE, report
from layerwise.tasks.results.evaluation import read_test
from layerwise.tasks.results.measured_on import measured_on
from layerwise.tasks.results.search_result import RESULT_FILE, RESULT_STAGE, VERSIONS, lane_role
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stopping import stopping_on_sigterm


@flow(name="search", flow_run_name="{settings.title}", persist_result=False)
def search(settings: Search, runtime: Runtime) -> SearchResult:
    """Prune ``settings.model`` with every beta, choose the best, export and test it. Safe to stop and start again.

    Args:
        settings: what is searched for; decides the result.
        runtime: where and how; changes nothing in the result, but that ``minutes`` end it earlier.

    Raises:
        ValueError: the model, the texts or the settings are not fit for it, before any work.
        StepFailed: with ``fan_out``, another process could not do its part.
        CancelledRun: with ``fan_out``, this run or one of a part was cancelled.
    """
    check_minutes(settings, runtime)
    store = ArtifactStore(runtime.store)
    with stopping_on_sigterm(), announced(store.fs, store.root, f"search: {settings.title}"):
        try:
            return run_search(store, settings, runtime)
        except (CancelledRun, TerminationSignal) as ending:
            return cast(SearchResult, cancelled(ending))


def run_search(store: ArtifactStore, settings: Search, runtime: Runtime) -> SearchResult:
    """What the flow ``search`` does, as a part of another flow.

    Raises:
        StepFailed: with ``fan_out``, another process could not do its part.
        CancelledRun: with ``fan_out``, this run or one of a part was cancelled.
    """
    end = end_of(runtime)
    if runtime.fan_out == "local":
        execution = runtime.execution()
        return mending(store, lambda: _run_stages(store, settings, settings, execution, end))
    # What others have made is only read here: no device is asked for.
    execution = runtime.model_copy(update={"device": "cpu"}).execution()
    shared = mending(store, lambda: share(store, settings, runtime))

    def run() -> SearchResult:
        tried = spread(store, shared, end)
        return _run_stages(store, settings, tried, execution, there=shared.there)

    return mending(store, run)


def _run_stages(
    store: ArtifactStore,
    asked: Search,
    settings: Search,
    execution: Execution,
    end: float = inf,
    there: Collection[str] | None = None,
) -> SearchResult:
    """Run the stages, and publish what came out.

    Args:
        asked: the search as the user knows it; ``settings``: as all processes know it.
        end: no plans are begun any more from then on, on the clock ``time.monotonic``.
        there: roles of the artifacts that were in the store before others worked for this search, if they did.
    """
    found = chosen(store, settings, execution, end)
    before = found.captured
    stages: dict[str, Artifact] = {
        **before.artifacts,
        **{lane_role(score.plan.beta, score.plan.offset): score.artifact for score in found.scores},
        "select": found.selected,
        **({} if found.exported is None else {"export": found.exported}),
        "evaluate": found.tested,
    }
    built = [
        role
        for role, artifact in stages.items()
        if artifact.key in store.built or (there is not None and role not in there)
    ]
    result = SearchResult(
        asked.model_copy(update={"stop_after": found.settings.stop_after}),
        str(before.checkpoint.artifact.facts["source"]),
        found.selection,
        read_test(store, found.tested),
        None if found.exported is None else store.location(found.exported),
        stages,
        tuple(built),
        before.checkpoint.bytes_read,
    )
    return publish_result(store, result)


def publish_result(store: ArtifactStore, result: SearchResult) -> SearchResult:
    """Commit the result and its report to the store, and show it on Prefect's pages.

    Returns:
        The result, with its artifact and the place of its report.
    """
    keys = {role: artifact.key for role, artifact in result.stages.items()}
    document = {
        "settings": result.settings.model_dump(mode="json"),
        "source": result.source,
        "verdict": result.selection.verdict,
        "selection": asdict(result.selection),
        "test": asdict(result.test),
        "measured on": {text: asdict(what) for text, what in measured_on(result.stages).items()},
        "stages": keys,
    }
    settings = {"settings": document["settings"], "source": result.source}
    stage = Stage(RESULT_STAGE, 1, settings, {role.replace(" ", "-"): key for role, key in keys.items()})

    def build(draft: Draft) -> None:
        draft.write(RESULT_FILE, json.dumps(document, indent=1).encode())
        draft.facts |= {"verdict": result.selection.verdict, "source": result.source, VERSIONS: versions()}

    artifact = store.get_or_build(stage, build)
    page = report(store, artifact, search_command(result.settings))
    result = replace(result, artifact=artifact, report=store.location(page, PAGE_FILE))
    publish_to_prefect(store, result, page)
    return result
