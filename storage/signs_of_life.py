"""Signs of life: files that processes working in a store keep up to date, saying what they are doing.

Garbage collection spares their files, people see them, and a process that waits for another one detects its death.
"""

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from layerwise.storage.files.errors import Corrupt, Removed, Unreachable, reaching
from layerwise.storage.files.filesystem import modified
from layerwise.storage.files.local_disk import REFUSED, explaining_refusals
from layerwise.storage.files.publishing import overwrite, remove_quietly
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.inventory import RUNNING_FILE
from layerwise.storage.location import StoreLocation
from layerwise.storage.pauses import beat, end_beats

logger = logging.getLogger(__name__)

FOLDER = "running"
EVERY = 5.0  # seconds between two signs of life; costs less than ten cents a day on S3
SILENT = 60.0  # seconds without a sign, twelve missed ones, after which a waiting process considers it dead
# Seconds without a sign after which a process is dead, even if the storage failed for minutes.
STALE_AFTER = 600.0
WORKER = "worker"  # role of a process that runs parts of searches
NEEDS_WORKERS = "needs workers"  # role of a search whose parts are run by workers
LAST_WAIT = 10.0  # seconds that a sign of life in progress may delay the end of the work

_doing = ""  # current activity of this process
_seconds_left: float | None = None  # that its work still needs


@dataclass(frozen=True)
class RunningProcess:
    """A process that works in the store, as it announced itself. All times are by the storage's clock.

    Attributes:
        what: description of its work.
        since: when it began; 1970 if its file cannot be read.
        last_sign: when it last rewrote its file.
        doing: its activity at that time; "" if unknown.
        seconds_left: time that its work still needed at that time; None if unknown.
        name: under which it was announced, 32 hex digits.
        role: its role among processes that share work, such as ``WORKER``; "" if it has none.
    """

    host: str
    pid: int
    what: str
    since: datetime
    last_sign: datetime
    doing: str = ""
    seconds_left: float | None = None
    name: str = ""
    role: str = ""

    def __str__(self) -> str:
        since, last = (f"{each:%Y-%m-%d %H:%M:%S} UTC" for each in (self.since, self.last_sign))
        return f"{self.what!r}, process {self.pid} on {self.host}, since {since} (last sign of life {last})"


@dataclass(frozen=True)
class Sign:
    """The last sign of life of one process.

    Attributes:
        token: changes with every sign, so that an observer needs only its own clock; "" if the file is damaged, and
            then all other fields are unknown, too.
        doing: as in ``RunningProcess``.
    """

    token: str
    host: str
    doing: str
    pid: int


@contextlib.contextmanager
def announced(store: StoreLocation, what: str, name: str | None = None, role: str = "") -> Iterator[None]:
    """Announce to other processes that this process works in the store until the block ends.

    A store that cannot be written is used anyway, with a warning: it may already hold what is needed.

    Args:
        what: description of the work, without credentials.
        name: under which other processes look for this one, 32 hex digits; None if they do not.
        role: see ``RunningProcess``.

    Raises:
        Unreachable: the storage does not answer.
    """
    giver = _SignGiver(store, what, _path(store, name or uuid.uuid4().hex), role)
    giver.give(first=True)
    done = threading.Event()
    thread = threading.Thread(target=giver.keep_giving, args=(done,), name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(LAST_WAIT)  # the thread removes the file; if the storage hangs, the file becomes stale


def doing(text: str, seconds_left: float | None = None) -> None:
    """Set the current activity of this process. Other processes read it with its next sign of life.

    Args:
        text: description; "" for no activity.
        seconds_left: time that the work of the process still needs; None if unknown.
    """
    global _doing, _seconds_left
    _doing, _seconds_left = text, seconds_left


def read_sign(store: StoreLocation, name: str) -> Sign | None:
    """Read the last sign of life of the process that was announced as ``name``, with one request.

    Returns:
        None if there is none: the process has ended, or has not started.

    Raises:
        OSError: the storage does not answer (``Unreachable``), or refuses.
    """
    try:
        content = read_sealed(store.fs, _path(store, name))
        return Sign(content["token"], content["host"], content["doing"], content["pid"])
    except FileNotFoundError:
        return None
    except (Corrupt, KeyError):
        return Sign("", "", "", 0)


def remove_sign(store: StoreLocation, name: str) -> None:
    """Remove the sign of life of a process that is known to be dead. A living process writes a new one.

    A file that cannot be removed stays and becomes stale.
    """
    remove_quietly(store.fs, [_path(store, name)])


def running_processes(store: StoreLocation, now: float, within: float = STALE_AFTER) -> list[RunningProcess]:
    """Return the processes that recently gave a sign of life, the oldest first.

    Args:
        now: by the storage's clock (see ``storage_clock``), in seconds since 1970.
        within: maximum age of the last sign, in seconds.

    Raises:
        OSError: the storage cannot be reached.
    """
    found = []
    for row in list_shared_folder(store, FOLDER):
        ours = RUNNING_FILE.fullmatch(store.relative(row["name"]))
        if ours and modified(store.fs, row) > now - within:
            with contextlib.suppress(FileNotFoundError):  # the process has ended since the listing
                found.append(_read(store, row["name"], modified(store.fs, row)))
    return sorted(found, key=lambda process: process.since)


def living_processes(store: StoreLocation, role: str) -> list[RunningProcess]:
    """Return the processes with a role that gave a sign of life within the last ``SILENT`` seconds.

    Raises:
        OSError: the storage cannot be reached.
    """
    # The clock is read only if it is needed: that writes a file, and the store may not exist yet.
    found = [each for each in running_processes(store, 0.0) if each.role == role]
    now = clock_for_display(store) if found else 0.0
    return [each for each in found if each.last_sign.timestamp() > now - SILENT]


def storage_clock(store: StoreLocation) -> float:
    """Return the current time in seconds since 1970, by the clock that dates the storage's files.

    Raises:
        OSError: the storage cannot be written, or cannot be reached.
    """
    path = store.path(f"{uuid.uuid4().hex}.clock")
    if store.is_local:
        # Empty, and without creating its folder: this must work on a full disk, and not create a store at a wrong path.
        with explaining_refusals(path):
            os.close(os.open(store.fs._strip_protocol(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    else:
        with reaching(store.fs, path):
            store.fs.pipe_file(path, b"now")
    try:
        with reaching(store.fs, path):
            return modified(store.fs, store.fs.info(path))
    finally:
        with contextlib.suppress(Exception):  # the next garbage collection deletes it
            store.fs.rm_file(path)  # not remove_quietly, which would also remove an empty root


def clock_for_display(store: StoreLocation) -> float:
    """Return the current time in seconds since 1970, by the storage's clock or, if it cannot be written, by this machine's.

    Only for displaying ages; never decide by it what is deleted.

    Raises:
        Unreachable: the storage does not answer.
    """
    try:
        return storage_clock(store)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return time.time()


class _SignGiver:
    """Keeps the file of one process up to date."""

    def __init__(self, store: StoreLocation, what: str, path: str, role: str) -> None:
        self._store, self._what, self._path, self._role = store, what, path, role
        self._began = time.monotonic()
        self._since: datetime | None = None  # unknown until the storage's clock could be read
        self._failed = False

    def give(self, first: bool = False) -> None:
        try:
            overwrite(self._store.fs, self._path, seal(self._content()))
        except Removed:
            pass  # deleted while this process was paused during the writing; the next sign follows soon
        except Exception as error:  # clients raise more than OSErrors; the work continues after any of them
            if first and isinstance(error, Unreachable):
                raise
            if isinstance(error, OSError) and error.errno in REFUSED:
                # A process that must build a stage gets an error from that stage.
                logger.info("%s is used without a sign of life (%s)", self._store.root, error)
            elif not self._failed:
                logger.warning(
                    "%s cannot be written (%s): the work continues, but `layerwise gc` does not know of it. "
                    "Do not run `layerwise gc --apply` now.",
                    self._path,
                    error,
                )
            self._failed = True

    def keep_giving(self, done: threading.Event) -> None:
        beat(self, EVERY)
        while not done.wait(EVERY):
            self.give()
            beat(self, EVERY)
        end_beats(self)
        remove_quietly(self._store.fs, [self._path])

    def _content(self) -> dict[str, object]:
        if self._since is None:
            self._since = self._start()
        return {**self._known(), "since": self._since.isoformat()}

    def _known(self) -> dict[str, object]:
        known = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "what": self._what,
            "doing": _doing,
            "role": self._role,
        }
        return known if _seconds_left is None else {**known, "seconds_left": round(_seconds_left, 1)}

    def _start(self) -> datetime:
        # Every rewrite changes the date of the file, and the clock of this machine may be wrong.
        fs = self._store.fs
        overwrite(fs, self._path, seal(self._known()))
        written = modified(fs, fs.info(self._path))
        return datetime.fromtimestamp(written - (time.monotonic() - self._began), UTC)


def list_shared_folder(store: StoreLocation, name: str) -> list[dict[str, Any]]:
    """Return the entries of a folder of the store to which other machines write, as the filesystem describes them.

    Raises:
        OSError: the storage cannot be reached.
    """
    folder = store.path(name)
    store.fs.invalidate_cache(folder)
    try:
        with reaching(store.fs, folder):
            rows: list[dict[str, Any]] = store.fs.ls(folder, detail=True)
    except FileNotFoundError:
        return []
    return rows


def _path(store: StoreLocation, name: str) -> str:
    path = f"{FOLDER}/{name}.json"
    if not RUNNING_FILE.fullmatch(path):
        raise ValueError(
            f"a process cannot be announced as {name!r}: its name must be 32 hex digits, as of a UUID."
        )
    return store.path(path)


def _read(store: StoreLocation, path: str, last_sign: float) -> RunningProcess:
    last, name = datetime.fromtimestamp(last_sign, UTC), path.rpartition("/")[2].partition(".")[0]
    try:
        content = read_sealed(store.fs, path)
        since = datetime.fromisoformat(content["since"])
        # Missing in files of older versions.
        doing, left, role = content.get("doing", ""), content.get("seconds_left"), content.get("role", "")
        host, pid, what = content["host"], content["pid"], content["what"]
        return RunningProcess(host, pid, what, since, last, doing, left, name, role)
    except (Corrupt, ValueError, TypeError, KeyError) as error:
        # A process is at work there, and the age of its files is unknown.
        began = datetime.fromtimestamp(0, UTC)
        return RunningProcess("an unknown machine", 0, f"{path} cannot be read: {error}", began, last)
