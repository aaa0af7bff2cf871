"""Housekeeping of a store: ``gc`` deletes unreferenced files, ``verify`` reads every file and checks it.

The flow ``layerwise.flows.gc`` collects garbage on a schedule.
"""

import time

from rich.console import Console
from rich.live import Live
from rich.table import Table

from layerwise.display.byte_size import size
from layerwise.flows.cli.console import open_console
from layerwise.storage.artifact import Damaged
from layerwise.storage.existing_store import existing_store
from layerwise.storage.signs_of_life import clock_for_display
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import (
    Collected,
    Collection,
    collect,
    plan_collection,
)
from layerwise.storage.upkeep.set_aside import set_aside
from layerwise.storage.upkeep.verify import Finding, Tally, verify
from layerwise.tasks.results.garbage import (
    by_kind,
    deleted_in_short,
    keys_of_results,
    lines_on_failures,
    lines_on_kept,
)


def collect_garbage(store_url: str, apply: bool, results_only: bool) -> int:
    """Show the unreferenced files of a store, and delete them if ``apply`` is set.

    Args:
        results_only: keep the results of finished searches, and delete every other artifact.

    Returns:
        The exit code: 1 if a file could not be deleted.

    Raises:
        FileNotFoundError: there is no store at ``store_url``.
        OSError: the storage cannot be used, or, with ``results_only``, a process works in the store.
        ValueError: with ``results_only``, an artifact is damaged.
    """
    store, console = existing_store(store_url), open_console()
    now = None if apply else clock_for_display(store)
    collection = plan_collection(store, keys_of_results if results_only else None, now=now)
    _show_collection(console, collection)
    if not collection.garbage:
        console.print("There is nothing to delete.")
        return 0
    if not apply:
        console.print("Nothing was deleted. Add --apply to delete these files.")
        return 0
    return _show_collected(console, collect(store, collection))


def verify_store(store_url: str, put_aside: bool = False) -> int:
    """Read every file of a store, and print the damaged ones.

    Args:
        put_aside: take damaged artifacts out of use, so that the next search rebuilds those that it needs.

    Returns:
        The exit code: 1 if a file is damaged or could not be read.

    Raises:
        FileNotFoundError: there is no store at ``store_url``.
        OSError: the store cannot be listed.
    """
    store, console = existing_store(store_url), open_console()
    tally, began = Tally(), time.monotonic()
    found = dict.fromkeys(("damaged", "unread", "unfinished"), 0)
    keys = set()
    progress = Live(
        console=console, get_renderable=lambda: _progress(tally), refresh_per_second=4, transient=True
    )
    if console.is_terminal:
        progress.start()
    try:
        for finding in verify(store, tally):
            found[finding.kind] += 1
            if finding.kind == "damaged":
                keys.add(finding.key)
            style = "red" if finding.kind == "damaged" else None
            console.print(_line(finding), style=style, soft_wrap=True)
    finally:
        progress.stop()
    console.print(
        f"{tally.artifacts} artifacts and {tally.resume_points} resume points with {tally.files} files, "
        f"{size(tally.bytes) or '0 B'}, read in {time.monotonic() - began:.1f} s: {_verdict(found)}",
        soft_wrap=True,
    )
    if put_aside:
        count = sum(_put_aside(store, key) for key in sorted(keys))
        console.print(f"{count} artifacts were set aside")
    return 1 if found["damaged"] or found["unread"] else 0


def _put_aside(store: ArtifactStore, key: str) -> bool:
    try:
        artifact = store.get(key)
        return set_aside(store, Damaged("", key, artifact.token))
    except Damaged as damaged:
        return set_aside(store, damaged)
    except KeyError:
        return False  # a damaged resume point, which is never used


def _show_collection(console: Console, collection: Collection) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("what")
    table.add_column("count", justify="right")
    table.add_column("size", justify="right")
    *rows, (_, count, total) = by_kind(collection.garbage)
    for kind, number, taken in rows:
        table.add_row(kind, str(number), size(taken))
    if count:
        table.add_row("all", str(count), size(total), style="bold")
        console.print(table)
    for line in lines_on_kept(collection):
        console.print(line, soft_wrap=True)


def _show_collected(console: Console, collected: Collected) -> int:
    for line in lines_on_failures(collected):
        console.print(line, soft_wrap=True)
    console.print(deleted_in_short(collected))
    return 1 if collected.failures else 0


def _progress(tally: Tally) -> str:
    done = tally.artifacts + tally.resume_points
    return f"{done} of {tally.folders} artifacts and resume points, {tally.files} files, {size(tally.bytes) or '0 B'}"


def _line(finding: Finding) -> str:
    words = {"damaged": "damaged", "unread": "could not be read", "unfinished": "unfinished"}
    return f"{words[finding.kind]}: {finding.key} {finding.name}: {finding.problem}"


def _verdict(found: dict[str, int]) -> str:
    parts = []
    if found["damaged"]:
        parts.append(
            f"{found['damaged']} files are damaged; a search rebuilds those that it reads, and after --set-aside also "
            "those that it only writes, such as an exported model"
        )
    if found["unread"]:
        parts.append(f"{found['unread']} files could not be read; run verify again when the storage answers")
    return ". ".join(parts) or "nothing is damaged"
