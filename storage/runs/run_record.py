"""Descriptions of the runs that a store has logs of."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

from layerwise.storage.files.errors import reaching
from layerwise.storage.inventory import Entry
from layerwise.storage.location import StoreLocation

AT_ONCE = 16  # simultaneous requests to a remote storage

RUNNING, FINISHED, FAILED, INTERRUPTED = "running", "finished", "failed", "interrupted"


@dataclass(frozen=True)
class RunRecord:
    """Description of a run, from the first line of its log.

    Attributes:
        path: of the log, relative to the root of the store.
        name: of the run; that of its sign of life, too.
        title: description of the work.
        state: RUNNING also if the process was killed.
        began: in seconds since 1970, by the clock of its machine; 0 if unknown.
        search: digest of the settings of a search, the same in all of its runs; "" for other runs.
        command: command that repeats or resumes the run; "" if there is none.
        folder: working folder, which relative paths in ``command`` refer to.
        result: key of the artifact that the run ended with; "" if there is none.
        error: why it failed.
    """

    path: str
    name: str
    title: str = ""
    state: str = ""
    began: float = 0.0
    search: str = ""
    command: str = ""
    folder: str = ""
    result: str = ""
    error: str = ""


def read_records(store: StoreLocation, logs: Iterable[Entry]) -> list[RunRecord]:
    """Read the descriptions of runs, in the order of ``logs``. One that cannot be understood has only path and name.

    Raises:
        OSError: the storage cannot be reached.
    """
    with ThreadPoolExecutor(1 if store.is_local else AT_ONCE) as pool:
        found = pool.map(lambda entry: _read(store, entry), logs)
        return [record for record in found if record is not None]


def _read(store: StoreLocation, entry: Entry) -> RunRecord | None:
    path, name = store.path(entry.path), entry.path.rpartition("/")[2].partition(".")[0]
    try:
        with reaching(store.fs, path):
            # As a whole: it is replaced while the run goes on, and may then be shorter than a range of it.
            first = store.fs.cat_file(path).partition(b"\n")[0]
    except FileNotFoundError:
        return None  # deleted since the listing
    try:
        about = json.loads(first)
        texts = {
            field: str(about.get(field, ""))
            for field in ("title", "state", "search", "command", "folder", "result", "error")
        }
        return RunRecord(entry.path, name, began=datetime.fromisoformat(about["time"]).timestamp(), **texts)
    except (ValueError, TypeError, KeyError, AttributeError):
        return RunRecord(entry.path, name)
