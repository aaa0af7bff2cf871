"""Report: make the page of a finished search again, with the measurements made after the search.

These are zero-shot accuracies, sizes of checkpoints, speed, distillation, and ATP's theorems; each is left out of the page until it
exists. Everything is read from the store: no model is opened, and Prefect's server is not needed.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from layerwise.flows.options import search_command
from layerwise.flows.pipeline.artifact_by_key import artifact_by_key, finished_searches
from layerwise.flows.pipeline.finished_search import settings_of
from layerwise.sparse.speed import SpeedTable
from layerwise.storage.artifact import Artifact, newest, newest_from
from layerwise.storage.existing_store import existing_store
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lm_eval_tasks.comparison import (
    TABLE_STAGE,
    ZeroShotComparison,
    comparison_rows,
    has_distilled,
    is_plain,
    read_comparison,
    without_distilled,
)
from layerwise.tasks.pages.report_data import CheckpointSizes, Extras, ZeroShotAccuracies
from layerwise.tasks.report import PAGE_FILE, report
from layerwise.tasks.results.distillation import newest_distilled
from layerwise.tasks.results.roles import EVALUATE, EXPORT
from layerwise.tasks.results.search_result import FinishedSearch, read_search
from layerwise.tasks.results.speed_table import SPEED_STAGE, read_speed
from layerwise.tasks.results.theory_findings import THEORY_STAGE


def make_report(
    store_url: str, key: str | None, output: Path | None = None, table: Artifact | None = None
) -> str:
    """Return the location of a search's report; make the report if the store does not have it.

    Args:
        key: key of the search or its beginning; None for the newest search.
        output: local file to copy the page to.
        table: zero-shot table to show; None for the newest table of the search.

    Raises:
        KeyError: no artifact has this key, or several keys begin with it; or artifacts of the search were deleted.
        ValueError: the artifact is not the result of a search, or its settings are unknown.
        FileNotFoundError: there is no store at ``store_url``.
        OSError: the store cannot be reached, or ``output`` cannot be written.
    """
    store = existing_store(store_url)
    artifact = artifact_by_key(store, key)
    search = read_search(store, artifact)
    command = search_command(settings_of(search))
    page = report.fn(store, artifact, command, find_extras(store, search, table))
    if output is None:
        return store.location(page, PAGE_FILE)
    output.write_bytes(store.read(page, PAGE_FILE))
    return str(output)


def make_report_with_theory(store: ArtifactStore, measured: Artifact) -> None:
    """Make the report of the newest search that measured theorems belong to; do nothing if there is no such search."""
    for artifact in finished_searches(store):
        try:
            search = read_search(store, artifact)
        except KeyError:  # some of its artifacts were deleted, so it can have no report
            continue
        if _is_theory_of(measured, search):
            make_report(store.url, artifact.key)
            return


def find_extras(store: ArtifactStore, search: FinishedSearch, table: Artifact | None = None) -> Extras:
    """Find the measurements that were made of a search after its end.

    Args:
        table: zero-shot table to use; None for the newest table of the search.
    """
    artifacts = list(store.artifacts())
    table = table or newest_from(artifacts, TABLE_STAGE, "search", search.artifact)
    exported = search.stages.get(EXPORT)
    distilled = newest_distilled(artifacts, search.stages[EVALUATE])
    comparison = None if table is None else _comparison(store, table, distilled)
    compressed = _newest_compressed(artifacts, exported, distilled)
    theory = newest(artifacts, lambda each: _is_theory_of(each, search))
    return Extras(
        zero_shot=() if comparison is None else _zero_shot_rows(comparison),
        tasks=_task_rows(comparison),
        sizes=None if compressed is None else _sizes(compressed),
        speed=None if exported is None else _newest_speed(store, exported, artifacts),
        theory="" if theory is None else theory.key,
        distilled="" if distilled is None else distilled.key,
    )


def newest_task_rows(
    store: ArtifactStore, search: Artifact, distilled: Artifact | None = None
) -> tuple[dict[str, str], ...]:
    """Return the newest table of few-shot tasks of a search for people, see ``Extras.tasks``; empty if there is none.

    Args:
        distilled: distilled model that the table must have; None for a table without one.
    """
    table = newest_from(store.artifacts(), TABLE_STAGE, "search", search)
    if table is None or (distilled is not None and not has_distilled(table, distilled)):
        return ()
    return _task_rows(_comparison(store, table, distilled))


def newest_speed(store: ArtifactStore, exported: Artifact) -> SpeedTable | None:
    """Return the newest speed measurement of an exported model, on any machine; None if there is none."""
    return _newest_speed(store, exported, store.artifacts())


def _newest_speed(
    store: ArtifactStore, exported: Artifact, artifacts: Iterable[Artifact]
) -> SpeedTable | None:
    measured = newest_from(artifacts, SPEED_STAGE, "export", exported)
    return None if measured is None else read_speed(store, measured)


def _comparison(store: ArtifactStore, table: Artifact, distilled: Artifact | None) -> ZeroShotComparison:
    """Return a table of tasks, without its distilled model unless that is ``distilled``."""
    comparison = read_comparison(store, table)
    if distilled is not None and has_distilled(table, distilled):
        return comparison
    return without_distilled(comparison)


def _newest_compressed(
    artifacts: Iterable[Artifact], exported: Artifact | None, distilled: Artifact | None
) -> Artifact | None:
    """Return the compressed model, exported or distilled: both have the same zeros, and therefore the same sizes."""
    found = None if exported is None else newest_from(artifacts, "compress", "export", exported)
    if found is None and distilled is not None:
        found = newest_from(artifacts, "compress", "distill", distilled)
    return found


def _is_theory_of(artifact: Artifact, search: FinishedSearch) -> bool:
    """Return whether an artifact holds theorems measured on the model, windows and pruning of a search."""
    if artifact.recipe.get("name") != THEORY_STAGE:
        return False
    tested = search.stages[EVALUATE]
    windows = {"scored": search.stages["selection"].content}
    return artifact.recipe["inputs"] == _part(tested, "inputs") | windows and (
        _part(artifact, "settings")["prune"] == _part(tested, "settings")["prune"]
    )


def _part(artifact: Artifact, name: str) -> dict[str, Any]:
    part = artifact.recipe[name]
    assert isinstance(part, dict), f"the recipe of {artifact.key} has {name} as a mapping"
    return part


def _sizes(compressed: Artifact) -> CheckpointSizes:
    # The pruned checkpoint stores its zeros, so it is as large as the dense one.
    dense, smaller = (int(str(compressed.facts[name])) for name in ("dense bytes", "compressed bytes"))
    return CheckpointSizes(dense, dense, smaller)


def _zero_shot_rows(comparison: ZeroShotComparison) -> tuple[ZeroShotAccuracies, ...]:
    return tuple(
        ZeroShotAccuracies(
            row.task,
            row.dense.value,
            (row.uniform or row.best).value,
            row.best.value,
            row.best.standard_error or 0.0,
            0.0 if row.to_uniform is None else row.to_uniform.difference / 100,
            None if row.to_uniform is None else row.to_uniform.p_value,
            None if row.distilled is None else row.distilled.value,
            None if row.distilled_to_best is None else row.distilled_to_best.difference / 100,
            None if row.distilled_to_best is None else row.distilled_to_best.p_value,
        )
        for row in (*comparison.rows, *comparison.groups, comparison.average)
    )


def _task_rows(comparison: ZeroShotComparison | None) -> tuple[dict[str, str], ...]:
    """Return the rows of a table that has few-shot tasks, groups or generated answers; none for another table."""
    if comparison is None or is_plain(comparison):
        return ()
    return tuple({name: str(value) for name, value in row.items()} for row in comparison_rows(comparison))
