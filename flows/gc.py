"""Garbage collection as a flow, for a schedule: what ``layerwise gc`` does, told to Prefect."""

from collections.abc import Sequence

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.logging import get_run_logger

from layerwise.display.byte_size import size
from layerwise.flows.cli.store_commands import by_kind, in_short, keys_of_results, what_failed, what_stays
from layerwise.flows.setting_types import BareUrl
from layerwise.storage.existing_store import existing_store
from layerwise.storage.signs_of_life import clock_for_display
from layerwise.storage.upkeep.garbage_collection import Garbage, collect, plan_collection
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.running.progress import going_on_without_prefect


@flow(name="gc", flow_run_name="gc of {store}", persist_result=False)
def gc(store: BareUrl, apply: bool = False, results_only: bool = False) -> None:
    """Find what nobody can reach in a store (what dead runs have left behind), and delete it on request.

    What changed in the last hour, or since the oldest running search began, stays.

    Args:
        store: Folder or fsspec URL (s3://bucket/prefix) of the store, without credentials.
        apply: Delete what is found; if this is off, the run only tells what would go.
        results_only: Keep only what finished searches found (choice, pruned model, test); refused while one runs.

    Raises:
        FileNotFoundError: if there is no store at ``store``.
        OSError: if the storage cannot be used, if something could not be deleted, or, with ``results_only``, if a
            process works in the store.
        ValueError: with ``results_only``, if artifacts are damaged.
    """
    logger = get_run_logger()
    opened = existing_store(store)
    now = None if apply else clock_for_display(opened)
    collection = plan_collection(opened, keys_of_results if results_only else None, now=now)
    for line in what_stays(collection):
        logger.info(line)
    if not apply:
        _tell(f"What would be deleted in {store}", collection.garbage)
        logger.info("nothing was deleted; run it with apply" if collection.garbage else "nothing to delete")
        return
    collected = collect(opened, collection)
    for line in what_failed(collected):
        logger.error(line)
    _tell(f"What was deleted in {store}", collected.garbage)
    logger.info(in_short(collected))
    if collected.failures:
        raise OSError(
            f"{len(collected.failures)} of {len(collection.garbage)} things in {store} could not be deleted, such as "
            f"{collected.failures[0].path}: {collected.failures[0].problem}. Remove the cause (the run's log names "
            "more of them); the next run tries again."
        )


def _tell(title: str, garbage: Sequence[Garbage]) -> None:
    """Count and size of each kind, in the log and as a table."""
    rows = by_kind(garbage)
    lines = [f"{kind}: {count}, {size(taken) or '0 B'}" for kind, count, taken in rows]
    get_run_logger().info("; ".join([title, *lines]))
    table = [{"kind": kind, "count": count, "bytes": taken} for kind, count, taken in rows]
    with going_on_without_prefect():
        create_table_artifact(key="store-garbage", table=table, description=plain(title))
