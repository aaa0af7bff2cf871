"""Compress: write the pruned checkpoint of a finished search without its zeros, with a model card."""

import json
from dataclasses import replace

from prefect import flow
from pydantic import Field

from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.flows.pipeline.finished_search import ReopenedSearch, reopen_search
from layerwise.flows.report import make_report, newest_speed, newest_task_rows
from layerwise.flows.runtime import Runtime
from layerwise.flows.setting_types import Settings
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.compress import compress as compress_export
from layerwise.tasks.compress import require_compressible
from layerwise.tasks.pages.model_card import ModelCard
from layerwise.tasks.pages.model_card_data import card_of_lane, results_on_test
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.sources.checkpoint_files import SPARSITY_FILE


class Compress(Settings):
    """Write the pruned checkpoint of a finished search without its zeros."""

    search: str | None = Field(
        default=None,
        description="Key of the search, as `layerwise ls` prints it, or its beginning. Empty: the newest search.",
    )


@flow(name="compress", persist_result=False)
def compress(settings: Compress, runtime: Runtime) -> Artifact:
    """Write the compressed checkpoint, and make the report of the search again.

    Exports the pruned checkpoint first if the search has not. Safe to stop and start again.

    Returns:
        The artifact of the compressed checkpoint. Its facts hold the sizes.

    Raises:
        FileNotFoundError: There is no such store.
        KeyError: The store has no such search.
        ValueError: The model cannot be stored without its zeros.
    """
    store, execution = runtime.open_existing_store(), runtime.execution()
    return run_announced(
        store,
        "compress",
        lambda: rebuild_damaged(store, lambda: _write_compressed(store, settings, execution)),
    )


def _write_compressed(store: ArtifactStore, settings: Compress, execution: Execution) -> Artifact:
    finished = reopen_search(store, settings.search, execution)
    require_compressible(finished.scored.captured.checkpoint)
    exported = finished.exported(store, finished.best, execution)
    card, section = _card(store, finished, exported), finished.recovery_section
    tasks = newest_task_rows(store, finished.search.artifact)
    folder = compress_export(store, exported, card, execution, section, tasks)
    make_report(store.url, finished.search.artifact.key)
    return folder


def _card(store: ArtifactStore, finished: ReopenedSearch, exported: Artifact) -> ModelCard:
    """Return the model card, with the test results and, if it was measured, the speed."""
    before, uniform = finished.scored.captured, finished.scored.uniform
    rows = json.loads(store.read(exported, SPARSITY_FILE))["linears"]
    card = card_of_lane(before.inputs("selection"), finished.best, uniform, before.pruning, rows)
    tested = results_on_test(finished.search.test, before.windows["test"])
    return replace(
        card,
        allocator=finished.settings.allocation_title,
        results=card.results + tested,
        speed=newest_speed(store, exported),
    )
