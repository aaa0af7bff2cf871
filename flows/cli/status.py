"""Status of a store: running processes, unfinished stages, interrupted searches, finished searches.

Everything is read from the store, so the command works on any machine and without Prefect's server.
"""

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar, cast

from rich.console import Console
from rich.padding import Padding
from rich.table import Table

from layerwise.display.byte_size import size
from layerwise.display.duration import duration
from layerwise.flows.cli.console import open_console
from layerwise.storage.artifact import Artifact
from layerwise.storage.existing_store import existing_store
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.files.filesystem import is_local
from layerwise.storage.inventory import Inventory, StageFolder, take_inventory
from layerwise.storage.resume_points import ResumePoint, read_resume_point
from layerwise.storage.runs.run_record import FINISHED, RunRecord, read_records
from layerwise.storage.signs_of_life import SILENT, RunningProcess, clock_for_display, running_processes
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running.printable import one_line

SEARCH = "search"  # layerwise.tasks.results.search_result.RESULT_STAGE, whose module brings Prefect
LANE = "lane"  # its resume point only names its group, whose resume point holds the work
NEWEST = 5  # finished and interrupted searches that are shown
NEWEST_LOGS = 50  # whose runs are considered: reading each one is a request
LISTED = 40  # rows of a table; if there are more, the newest are shown
SHORT = 8  # hex digits of a key: enough for `layerwise show`
AT_ONCE = 16  # simultaneous requests to a remote storage
UNITS = (("s", 1), ("min", 60), ("h", 3600), ("days", 86400))

Read = TypeVar("Read")


@dataclass(frozen=True)
class Unfinished:
    """Stage that has a resume point but no artifact.

    Attributes:
        key: of the stage.
        saved: time of its resume point by the storage's clock, in seconds since 1970.
        progress: its resume point; None if it is damaged.
    """

    key: str
    saved: float
    progress: ResumePoint | None


def show_status(store_url: str) -> None:
    """Print the running processes, unfinished stages, interrupted and finished searches of a store.

    Raises:
        FileNotFoundError: there is no store at ``store_url``.
        OSError: the storage cannot be reached.
    """
    store, console = existing_store(store_url), open_console()
    now = clock_for_display(store)
    processes = running_processes(store, now, within=float("inf"))
    alive = [each for each in processes if now - each.last_sign.timestamp() <= SILENT]
    inventory = take_inventory(store)
    _show_processes(console, now, alive)
    _show_silent(console, now, [each for each in processes if each not in alive])
    _show_unfinished(console, now, _unfinished(store, inventory), alive)
    _show_interrupted(console, now, store, inventory, alive)
    _show_searches(console, now, store, inventory)


def _show_processes(console: Console, now: float, alive: Sequence[RunningProcess]) -> None:
    if not alive:
        console.print("No process is running.")
        return
    console.print(f"Running: {_count(len(alive), 'process', 'processes')}", style="bold")
    table = _table("host", "process", "started", "last sign", "left", "flow", "doing")
    for each in alive[:LISTED]:
        began, last = (_ago(now, time.timestamp()) for time in (each.since, each.last_sign))
        left = "" if each.seconds_left is None else duration(_left(now, each, each.seconds_left))
        table.add_row(each.host, str(each.pid), began, last, left, each.what, each.doing)
    _print(console, table, len(alive))


def _left(now: float, process: RunningProcess, seconds: float) -> float:
    """Return the time that is left of what was left at the last sign of life."""
    return max(seconds - max(now - process.last_sign.timestamp(), 0.0), 0.0)


def _show_silent(console: Console, now: float, silent: Sequence[RunningProcess]) -> None:
    if not silent:
        return
    console.print()
    console.print("No sign of life: killed, or cut off from the store", style="bold")
    table = _table("host", "process", "last sign", "flow", "was doing")
    for each in sorted(silent, key=lambda each: each.last_sign, reverse=True)[:LISTED]:
        last = _ago(now, each.last_sign.timestamp())
        table.add_row(each.host, str(each.pid), last, each.what, each.doing)
    _print(console, table, len(silent))
    console.print("Their resume points are below. `layerwise gc` removes these entries after an hour.")


def _show_unfinished(
    console: Console, now: float, unfinished: Sequence[Unfinished], alive: Sequence[RunningProcess]
) -> None:
    if not unfinished:
        console.print()
        console.print("No stage is unfinished.")
        return
    console.print()
    console.print("Unfinished stages", style="bold")
    oldest = min((process.since.timestamp() for process in alive), default=float("inf"))
    table = _table("stage", "saved", "host", "step", "work so far", "size", "")
    for each in unfinished[:LISTED]:
        known = each.progress
        row = [_short(each.key), _ago(now, each.saved)]
        if known is None:
            table.add_row(*row, "", "", "", "", "damaged: the stage will start from its beginning")
            continue
        state = "interrupted" if each.saved < oldest else "in progress"
        bytes_saved = sum(file.size for file in known.all_files)
        table.add_row(*row, known.host, str(known.step), _time(known.seconds), size(bytes_saved), state)
    _print(console, table, len(unfinished))
    interrupted = sum(each.saved < oldest for each in unfinished)
    if not alive:
        console.print("No process works on these. Start the same search again to resume.")
    elif interrupted:
        console.print(
            f"{interrupted} interrupted: saved before any running process started. If no process has resumed the work, "
            "start the same search again."
        )


def _show_interrupted(
    console: Console, now: float, store: ArtifactStore, inventory: Inventory, alive: Sequence[RunningProcess]
) -> None:
    """Print the newest searches that no run has finished or is working on, and the commands that resume them."""
    logs = sorted(inventory.logs, key=lambda entry: entry.modified, reverse=True)[:NEWEST_LOGS]
    modified = {entry.path: entry.modified for entry in logs}
    records = [record for record in read_records(store, logs) if record.search]
    at_work = {process.name for process in alive}
    others = {each.search for each in records if each.state == FINISHED or each.name in at_work}
    newest: dict[str, RunRecord] = {}
    for record in records:
        if record.search not in others:
            newest.setdefault(record.search, record)
    if not newest:
        return
    console.print()
    console.print("Interrupted searches and comparisons, and the commands that resume them", style="bold")
    for each in list(newest.values())[:NEWEST]:
        reason = one_line(each.error) or "killed, or cut off from the store"
        console.print(f"{_ago(now, modified[each.path])}: {each.title}: {reason}", soft_wrap=True)
        console.print(f"  log: {store.path(each.path)}", soft_wrap=True)
        console.print(f"  cd {shlex.quote(each.folder)} && {each.command}", soft_wrap=True)


def _show_searches(console: Console, now: float, store: ArtifactStore, inventory: Inventory) -> None:
    listed = {
        key: folder.manifest.modified
        for key, folder in inventory.folders.items()
        if folder.manifest is not None and _name(key) == SEARCH
    }
    if not listed:
        console.print()
        console.print("No search has finished.")
        return
    artifacts = dict(zip(listed, _read_all(store, listed, lambda key: _search(store, key)), strict=True))
    committed = [
        (dated if (artifact := artifacts[key]) is None else replace(artifact, dated=dated).committed, key)
        for key, dated in listed.items()
    ]
    which = f", the newest {NEWEST} of {len(committed)}" if len(committed) > NEWEST else ""
    console.print()
    console.print(f"Finished searches{which}", style="bold")
    for ended, key in sorted(committed, reverse=True)[:NEWEST]:
        artifact = artifacts[key]
        if artifact is None:
            title, verdict = "damaged", f"`layerwise verify {store.url}` shows the reason"
        else:
            settings = cast(Mapping[str, Any], artifact.recipe["settings"])["settings"]
            source, pruner = artifact.facts["source"], settings["pruner"]["method"]
            title = f"{source} at sparsity {settings['sparsity']:g}, {pruner}"
            verdict = str(artifact.facts["verdict"])
        console.print(f"{_ago(now, ended)}: {title}  ({_short(key)})", soft_wrap=True)
        console.print(Padding(verdict, (0, 0, 0, 2), expand=False))
    console.print(f"`layerwise show {store.url} KEY` shows a search.", soft_wrap=True)


def _unfinished(store: ArtifactStore, inventory: Inventory) -> list[Unfinished]:
    """Read the unfinished stages, the newest first, without those that were finished after the listing."""
    folders = [folder for folder in inventory.folders.values() if _is_unfinished(folder)]
    found = _read_all(store, folders, lambda folder: _read_point(store, folder))
    return sorted((each for each in found if each is not None), key=lambda each: each.saved, reverse=True)


def _is_unfinished(folder: StageFolder) -> bool:
    return folder.resume_point is not None and folder.manifest is None and _name(folder.key) != LANE


def _read_point(store: ArtifactStore, folder: StageFolder) -> Unfinished | None:
    assert folder.resume_point is not None, "only stages with a resume point are read"
    try:
        progress = read_resume_point(store, folder.key)
    except Corrupt:
        return Unfinished(folder.key, folder.resume_point.modified, None)
    return None if progress is None else Unfinished(folder.key, folder.resume_point.modified, progress)


def _search(store: ArtifactStore, key: str) -> Artifact | None:
    try:
        return store.get(key)
    except (Corrupt, KeyError):
        return None


def _read_all(store: ArtifactStore, what: Iterable[Any], read: Callable[[Any], Read]) -> list[Read]:
    with ThreadPoolExecutor(1 if is_local(store.fs) else AT_ONCE) as pool:
        return list(pool.map(read, what))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in columns:
        free = name in ("flow", "doing", "was doing", "")
        table.add_column(name, no_wrap=not free, justify="right" if name in ("step", "size") else "left")
    return table


def _print(console: Console, table: Table, count: int) -> None:
    console.print(table)
    if count > LISTED:
        console.print(f"and {count - LISTED} more")


def _name(key: str) -> str:
    return key.partition("/")[0]


def _short(key: str) -> str:
    name, _, digest = key.partition("/")
    return f"{name}/{digest[:SHORT]}"


def _count(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _ago(now: float, then: float) -> str:
    """Format the age of a time, or its date if it is over a week old."""
    if then == 0:
        return "unknown"
    if now - then > 7 * 86400:
        return f"{datetime.fromtimestamp(then, UTC):%Y-%m-%d}"
    return f"{_time(max(now - then, 0))} ago"  # storages that round to seconds may be a second ahead


def _time(seconds: float) -> str:
    """Format a duration in the largest unit that gives at least 2."""
    unit, length = next((each for each in reversed(UNITS) if seconds >= 2 * each[1]), UNITS[0])
    return f"{seconds / length:.0f} {unit}"
