"""House-keeping of a store: delete what nobody can reach, read everything through.

Imports neither Prefect nor transformers, which take five of seven seconds of start-up: this is run often. The flow
``layerwise.flows.gc`` does the same on a schedule.
"""

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.table import Table

from layerwise.display.byte_size import size
from layerwise.flows.cli.console import open_console
from layerwise.storage.artifact import Artifact, Damaged
from layerwise.storage.existing_store import existing_store
from layerwise.storage.signs_of_life import clock_for_display
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import (
    KINDS,
    Collected,
    Collection,
    Garbage,
    collect,
    plan_collection,
)
from layerwise.storage.upkeep.set_aside import set_aside
from layerwise.storage.upkeep.verify import Finding, Tally, verify

LISTED = 20  # files that are not ours, or cannot be deleted, which are named; the others are counted
# What `layerwise show` reads of a search, and what a search is made for.
RESULT_ROLES = ("select", "export", "evaluate")


def collect_garbage(store_url: str, apply: bool, results_only: bool) -> int:
    """Show what nobody can reach in a store; delete it if ``apply``.

    Args:
        results_only: of finished searches keep the result, and of everything else nothing.

    Returns:
        The exit code: 1 if something could not be deleted.

    Raises:
        FileNotFoundError: if there is no store at ``store_url``.
        OSError: if the storage cannot be used, or, with ``results_only``, if a process works in the store.
        ValueError: with ``results_only``, if artifacts are damaged.
    """
    store, console = existing_store(store_url), open_console()
    now = None if apply else clock_for_display(store)
    collection = plan_collection(store, keys_of_results if results_only else None, now=now)
    _show_collection(console, collection)
    if not collection.garbage:
        console.print("nothing to delete")
        return 0
    if not apply:
        console.print("nothing was deleted; add --apply")
        return 0
    return _show_collected(console, collect(store, collection))


# Names of stages: pages, the pruned model without its zeros, what it answers.
MADE_OF_RESULTS = ("report", "compare", "theory", "theory_page", "compress", "zero_shot_table", "speed")


def keys_of_results(artifacts: Sequence[Artifact]) -> set[str]:
    """Keys of all finished searches, and of what they found; and of what was made of them for people."""
    from layerwise.tasks.results.search_result import RESULT_STAGE  # brings Prefect

    keys = {artifact.key for artifact in artifacts if artifact.recipe.get("name") in MADE_OF_RESULTS}
    for artifact in artifacts:
        if artifact.recipe.get("name") == RESULT_STAGE:
            inputs = artifact.recipe["inputs"]
            assert isinstance(inputs, dict), "a recipe's inputs are keys by role"
            keys |= {artifact.key, *(inputs[role] for role in RESULT_ROLES if role in inputs)}
    return keys


def by_kind(garbage: Sequence[Garbage]) -> list[tuple[str, int, int]]:
    """What there is of each kind of garbage, and of all: count and bytes."""
    rows = []
    for kind in KINDS:
        sizes = [each.size for each in garbage if each.kind == kind]
        if sizes:
            rows.append((kind, len(sizes), sum(sizes)))
    return [*rows, ("all", len(garbage), sum(each.size for each in garbage))]


def what_stays(collection: Collection) -> Iterator[str]:
    """What is left alone and why, a line each."""
    for process in collection.running:
        yield f"in use by {process}: all that is younger stays"
    for key, problem in collection.damaged.items():
        yield f"{key} is damaged and stays as it is: run verify ({problem})"
    yield from _first(
        [f"not ours: left alone: {path}" for path in collection.not_ours], "not ours: left alone"
    )


def what_failed(collected: Collected) -> Iterator[str]:
    """What could not be deleted and why, a line each."""
    lines = [f"not deleted: {failure.path}: {failure.problem}" for failure in collected.failures]
    yield from _first(lines, "not deleted")


def in_short(collected: Collected) -> str:
    """How much was deleted, and how much could not be."""
    freed = size(sum(each.size for each in collected.garbage)) or "0 B"
    failed = f"; {len(collected.failures)} could not be deleted" if collected.failures else ""
    return f"{len(collected.garbage)} deleted, {freed}{failed}"


def verify_store(store_url: str, put_aside: bool = False) -> int:
    """Read a store through, and print what is damaged.

    Args:
        put_aside: take damaged artifacts out of use, so that the next search builds anew those it needs.

    Returns:
        The exit code: 1 if something is damaged, or could not be read.

    Raises:
        FileNotFoundError: if there is no store at ``store_url``.
        OSError: if the store cannot be listed.
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
        return False  # a damaged resume point, which nobody uses


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
    for line in what_stays(collection):
        console.print(line, soft_wrap=True)


def _show_collected(console: Console, collected: Collected) -> int:
    for line in what_failed(collected):
        console.print(line, soft_wrap=True)
    console.print(in_short(collected))
    return 1 if collected.failures else 0


def _first(lines: Sequence[str], what: str) -> Iterator[str]:
    yield from lines[:LISTED]
    if len(lines) > LISTED:
        yield f"{what}: {len(lines) - LISTED} more"


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
            f"{found['damaged']} files are damaged; a search builds anew what it reads of them, and after "
            "--set-aside also what it only made, such as an exported model"
        )
    if found["unread"]:
        parts.append(f"{found['unread']} files could not be read; start again when the storage answers")
    return ". ".join(parts) or "nothing is damaged"
