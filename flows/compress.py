"""Compress: write the pruned or the distilled checkpoint of a finished search without its zeros, with a model card."""

from dataclasses import replace
from functools import cache

from prefect import flow
from pydantic import Field

from layerwise.flows.orchestration.flow_frame import run_announced
from layerwise.flows.pipeline.artifact_by_key import artifact_by_key
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
from layerwise.tasks.pages.model_card_data import results_of_distillation, results_on_test
from layerwise.tasks.results.distillation import (
    DISTILL_STAGE,
    chosen_distilled,
    newest_distilled,
    read_distillation,
)
from layerwise.tasks.results.roles import EVALUATE
from layerwise.tasks.results.search_result import FinishedSearch, read_search
from layerwise.tasks.running.execution import Execution


class Compress(Settings):
    """Write the pruned or the distilled checkpoint of a finished search without its zeros."""

    search: str | None = Field(
        default=None,
        description="Key of the search, as `layerwise ls` prints it, or its beginning. Empty: the newest search.",
    )
    distilled: bool = Field(
        default=False,
        description="Write the model that `layerwise distill` made of the search's export, the newest if there are several, "
        "instead of the export.",
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
        ValueError: The model cannot be stored without its zeros, or the search has no distilled model.
    """
    store, execution = runtime.open_existing_store(), runtime.execution()

    @cache  # chosen once: no other model takes the place of a damaged one
    def chosen() -> tuple[str, str | None]:
        search = read_search(store, artifact_by_key(store, settings.search))
        return search.artifact.key, _newest_distilled(store, search) if settings.distilled else None

    return run_announced(
        store,
        "compress",
        lambda: rebuild_damaged(store, lambda: _write_compressed(store, *chosen(), execution)),
    )


def _write_compressed(
    store: ArtifactStore, search_key: str, distilled_key: str | None, execution: Execution
) -> Artifact:
    distilled = None if distilled_key is None else chosen_distilled(store, distilled_key)
    finished = reopen_search(store, search_key, execution)
    search = finished.search
    require_compressible(finished.scored.captured.checkpoint)
    exported = finished.exported(store, finished.best, execution)
    if distilled is None:
        card = _card(store, finished, exported)
    else:
        results = results_of_distillation(read_distillation(store, distilled))
        card = replace(finished.card(store, exported), results=results)
    section, tasks = finished.recovery_section, newest_task_rows(store, search.artifact, distilled)
    folder = compress_export(store, exported, card, execution, section, tasks, distilled)
    make_report(store.url, search.artifact.key)
    return folder


def _newest_distilled(store: ArtifactStore, search: FinishedSearch) -> str:
    """Return the key of the newest distilled model of a search."""
    distilled = newest_distilled(store.artifacts(f"{DISTILL_STAGE}/"), search.stages[EVALUATE])
    if distilled is None:
        key = search.artifact.key
        raise ValueError(
            f"{key} has no distilled model. Make one with `layerwise distill STORE {key}`, or leave out --distilled to "
            "compress the export of the search."
        )
    return distilled.key


def _card(store: ArtifactStore, finished: ReopenedSearch, exported: Artifact) -> ModelCard:
    """Return the model card, with the test results and, if it was measured, the speed."""
    card = finished.card(store, exported)
    tested = results_on_test(finished.search.test, finished.scored.captured.windows["test"])
    return replace(card, results=card.results + tested, speed=newest_speed(store, exported))
