"""Garbage collection as a flow: does what ``layerwise gc`` does, on a schedule, with a report in Prefect."""

from collections.abc import Sequence

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger

from layerwise.display.byte_size import size
from layerwise.flows.setting_types import BareUrl
from layerwise.storage.existing_store import existing_store
from layerwise.storage.signs_of_life import clock_for_display
from layerwise.storage.upkeep.garbage_collection import Garbage, collect, plan_collection
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.results.garbage import (
    by_kind,
    deleted_in_short,
    keys_of_results,
    lines_on_failures,
    lines_on_kept,
)
from layerwise.tasks.running.progress import going_on_without_prefect


@flow(name="gc", flow_run_name="gc of {store}", persist_result=False)
def gc(store: BareUrl, apply: bool = False, results_only: bool = False) -> None:
    """Find unreferenced files in a store, such as those that dead runs have left behind, and delete them on request.

    Files that changed in the last hour, or since the oldest running search started, are kept.

    Args:
        store: Folder or fsspec URL (s3://bucket/prefix) of the store, without credentials.
        apply: Delete the files. If off, the run only reports what it would delete.
        results_only: Keep only results: finished searches with their models, reports, comparisons, compressed and distilled
            models, tables, generated texts and the records of the watcher. Refused while a search runs.

    Raises:
        FileNotFoundError: There is no store at ``store``.
        OSError: The storage cannot be used, a file could not be deleted, or, with ``results_only``, a process works in
            the store.
        ValueError: With ``results_only``, artifacts are damaged.
    """
    logger = get_run_logger()
    opened = existing_store(store)
    now = None if apply else clock_for_display(opened)
    collection = plan_collection(opened, keys_of_results if results_only else None, now=now)
    for line in lines_on_kept(collection):
        logger.info(line)
    if not apply:
        _report(f"To be deleted in {store}", collection.garbage)
        logger.info("nothing was deleted; set apply to delete" if collection.garbage else "nothing to delete")
        return
    collected = collect(opened, collection)
    for line in lines_on_failures(collected):
        logger.error(line)
    _report(f"Deleted in {store}", collected.garbage)
    logger.info(deleted_in_short(collected))
    if collected.failures:
        raise OSError(
            f"{len(collected.failures)} of {len(collection.garbage)} items in {store} could not be deleted, such as "
            f"{collected.failures[0].path}: {collected.failures[0].problem}. Remove the cause (the log of the run lists "
            "all of them); the next run tries again."
        )


def _report(title: str, garbage: Sequence[Garbage]) -> None:
    """Write the number and size of each kind of garbage to the log and to a table in Prefect."""
    rows = by_kind(garbage)
    lines = [f"{kind}: {count}, {size(taken) or '0 B'}" for kind, count, taken in rows]
    get_run_logger().info("; ".join([title, *lines]))
    table = [{"kind": kind, "count": count, "bytes": taken} for kind, count, taken in rows]
    with going_on_without_prefect():
        create_table_artifact(key="store-garbage", table=table, description=plain(title))
