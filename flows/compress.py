"""Compress: the pruned checkpoint of a finished search without its zeros, with a model card that has the test."""

import json
from dataclasses import replace
from typing import cast

from prefect import flow
from prefect.exceptions import CancelledRun, TerminationSignal
from pydantic import Field

from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.flows.pipeline.damage_repair import mending
from layerwise.flows.pipeline.finished_search import Reopened, reopen
from layerwise.flows.pipeline.report_extras import newest_speed
from layerwise.flows.pipeline.time_budget import refuse_minutes
from layerwise.flows.report import make_report
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import Settings
from layerwise.storage.artifact import Artifact
from layerwise.storage.existing_store import existing_store
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.signs_of_life import announced
from layerwise.tasks.compress import compress as compress_export
from layerwise.tasks.pages.model_card import ModelCard
from layerwise.tasks.pages.model_card_data import card_of_lane, results_on_test
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stopping import stopping_on_sigterm
from layerwise.tasks.sources.checkpoint_files import SPARSITY_FILE


class Compress(Settings):
    """Write the pruned checkpoint of a finished search without its zeros."""

    search: str | None = Field(
        default=None,
        description="Key of the search, as `layerwise ls` prints it, or its beginning; empty: the newest.",
    )


@flow(name="compress", persist_result=False)
def compress(settings: Compress, runtime: Runtime) -> Artifact:
    """Write the checkpoint, exported before if it was not, and make the search's report again.

    Returns:
        The folder; its sizes are facts of it.

    Raises:
        FileNotFoundError: there is no such store.
        KeyError: there is no such search in the store.
        ValueError: ``runtime`` has a limit of time.
    """
    refuse_minutes(runtime, "compress")
    store, execution = existing_store(runtime.store), runtime.execution()
    with stopping_on_sigterm(), announced(store.fs, store.root, "compress"):
        try:
            return mending(store, lambda: _compressed(store, settings, execution))
        except (CancelledRun, TerminationSignal) as ending:
            return cast(Artifact, cancelled(ending))


def _compressed(store: ArtifactStore, settings: Compress, execution: Execution) -> Artifact:
    finished = reopen(store, settings.search, execution)
    exported = finished.exported(store, finished.best, execution)
    folder = compress_export(store, exported, _card(store, finished, exported), execution)
    make_report(store.url, finished.search.artifact.key)
    return folder


def _card(store: ArtifactStore, finished: Reopened, exported: Artifact) -> ModelCard:
    """The card with everything that is known by now: the test, and the speed if it was measured."""
    before = finished.captured
    rows = json.loads(store.read(exported, SPARSITY_FILE))["linears"]
    card = card_of_lane(before.inputs("selection"), finished.best, finished.uniform, before.pruning, rows)
    tested = results_on_test(finished.search.test, before.windows["test"])
    return replace(
        card,
        allocator=finished.settings.allocation_title,
        results=card.results + tested,
        speed=newest_speed(store, exported, list(store.artifacts())),
    )
