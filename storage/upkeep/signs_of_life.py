"""Which processes work in a store: each leaves a sign of life there, which says what it is doing.

House-keeping takes nothing from them, people see them, and whoever waits for one notices its death.
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

from fsspec import AbstractFileSystem

from layerwise.storage.files.corrupt import Corrupt, Removed
from layerwise.storage.files.errors import Unreachable, reaching
from layerwise.storage.files.local_disk import REFUSED, explaining_refusals
from layerwise.storage.files.publishing import overwrite, remove_quietly
from layerwise.storage.files.reading import is_local
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.pauses import beat, end_beats
from layerwise.storage.upkeep.inventory import RUNNING_FILE, modified

logger = logging.getLogger(__name__)

FOLDER = "running"
EVERY = 5.0  # seconds between two signs of life; on S3 less than ten cents a day
SILENT = 60.0  # seconds without one: twelve were missed; whoever waits for it takes it for dead
STALE_AFTER = 600.0  # seconds without one: by a dead process, not by a storage that was gone for minutes
LAST_WAIT = 10.0  # seconds that a sign of life under way may hold up the end of the work

_doing = ""  # what this process is doing right now


@dataclass(frozen=True)
class RunningProcess:
    """A process that works in the store, as it announced itself; all times are the storage's.

    Args:
        what: it does, for people.
        since: when it began; at the beginning of all times if its file cannot be understood.
        last_sign: when it last rewrote its file.
        doing: what it was doing then, for people; "" if that is not known.
    """

    host: str
    pid: int
    what: str
    since: datetime
    last_sign: datetime
    doing: str = ""

    def __str__(self) -> str:
        since, last = (f"{each:%Y-%m-%d %H:%M:%S} UTC" for each in (self.since, self.last_sign))
        return f"{self.what!r}, process {self.pid} on {self.host}, since {since} (last sign of life {last})"


@dataclass(frozen=True)
class Sign:
    """The last sign of life of one process.

    Args:
        token: another one with every sign, so that whoever watches needs no clock but their own; "" if the file is
            damaged, and then all the rest is unknown, too.
        doing: as in ``RunningProcess``.
    """

    token: str
    host: str
    doing: str
    pid: int


@contextlib.contextmanager
def announced(fs: AbstractFileSystem, root: str, what: str, name: str | None = None) -> Iterator[None]:
    """Tell others that this process works in the store at ``root`` until the block is left.

    A store that cannot be written is used all the same, with a warning: what is needed may be there.

    Args:
        what: it does, for people; without credentials.
        name: by which others look for this process, 32 hex digits; None if nobody will.

    Raises:
        Unreachable: the storage does not answer.
    """
    giver = _SignGiver(fs, root, what, _path(root, name or uuid.uuid4().hex))
    giver.give(first=True)
    done = threading.Event()
    thread = threading.Thread(target=giver.keep_giving, args=(done,), name="sign of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(LAST_WAIT)  # it removes the file; on a storage that hangs the file goes stale


def doing(text: str) -> None:
    """Say what this process is doing right now; others read it with its next sign of life.

    Args:
        text: for people; "" if there is nothing to say any more.
    """
    global _doing
    _doing = text


def read_sign(fs: AbstractFileSystem, root: str, name: str) -> Sign | None:
    """The last sign of life of the process that was announced as ``name``, by one request.

    Returns:
        None if there is none: the process has ended, or not begun.

    Raises:
        OSError: if the storage does not answer (``Unreachable``), or refuses.
    """
    try:
        content = read_sealed(fs, _path(root, name))
        return Sign(content["token"], content["host"], content["doing"], content["pid"])
    except FileNotFoundError:
        return None
    except (Corrupt, KeyError):
        return Sign("", "", "", 0)


def remove_sign(fs: AbstractFileSystem, root: str, name: str) -> None:
    """Remove the sign of life of a process that is known to be dead; one that is not gives another one.

    What cannot be removed stays, and goes stale.
    """
    remove_quietly(fs, [_path(root, name)])


def running_processes(
    fs: AbstractFileSystem, root: str, now: float, within: float = STALE_AFTER
) -> list[RunningProcess]:
    """The processes that gave a sign of life lately, the oldest first.

    Args:
        now: by the storage's clock (see ``storage_clock``), in seconds since 1970.
        within: how many seconds are lately.

    Raises:
        OSError: if the storage cannot be reached.
    """
    try:
        with reaching(fs, f"{root}/{FOLDER}"):
            rows = fs.ls(f"{root}/{FOLDER}", detail=True)
    except FileNotFoundError:
        return []
    found = []
    for row in rows:
        ours = RUNNING_FILE.fullmatch(row["name"][len(root) + 1 :])
        if ours and modified(fs, row) > now - within:
            with contextlib.suppress(FileNotFoundError):  # it has ended since
                found.append(_read(fs, row["name"], modified(fs, row)))
    return sorted(found, key=lambda process: process.since)


def storage_clock(fs: AbstractFileSystem, root: str) -> float:
    """Now in seconds since 1970, by the clock that the storage dates files with.

    Raises:
        OSError: if nothing can be written to the storage, or it cannot be reached.
    """
    path = f"{root}/{uuid.uuid4().hex}.clock"
    if is_local(fs):
        # Empty, and no folder is made for it: this must work on a full disk, and not make a store of a wrong path.
        with explaining_refusals(path):
            os.close(os.open(fs._strip_protocol(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    else:
        with reaching(fs, path):
            fs.pipe_file(path, b"now")
    try:
        with reaching(fs, path):
            return modified(fs, fs.info(path))
    finally:
        with contextlib.suppress(Exception):  # the next collection takes it
            fs.rm_file(path)  # not remove_quietly, which would take an empty root with it


def time_for_looking(fs: AbstractFileSystem, root: str) -> float:
    """Now in seconds since 1970: by the storage's clock, or, where nothing can be written, by this machine's.

    For people who only look; never to decide what is deleted.

    Raises:
        Unreachable: the storage does not answer.
    """
    try:
        return storage_clock(fs, root)
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        return time.time()


class _SignGiver:
    """Keeps the file of one process up to date."""

    def __init__(self, fs: AbstractFileSystem, root: str, what: str, path: str) -> None:
        self._fs, self._root, self._what, self._path = fs, root, what, path
        self._began = time.monotonic()
        self._since: datetime | None = None  # unknown until the storage's clock could be read
        self._failed = False

    def give(self, first: bool = False) -> None:
        try:
            overwrite(self._fs, self._path, seal(self._content()))
        except Removed:
            pass  # deleted while this process was paused in the middle of writing it; the next sign is soon to come
        except Exception as error:  # whatever it is, the work goes on; clients raise more than OSErrors
            if first and isinstance(error, Unreachable):
                raise
            if isinstance(error, OSError) and error.errno in REFUSED:
                # Who may only read is told so by the first stage that is to be built, if there is one.
                logger.info("%s is used without a sign of life (%s)", self._root, error)
            elif not self._failed:
                logger.warning(
                    "%s cannot be written (%s): the work goes on, but `layerwise gc` does not know of it. "
                    "Do not run that now.",
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
        remove_quietly(self._fs, [self._path])

    def _content(self) -> dict[str, object]:
        if self._since is None:
            self._since = self._start()
        return {**self._known(), "since": self._since.isoformat()}

    def _known(self) -> dict[str, object]:
        return {"host": socket.gethostname(), "pid": os.getpid(), "what": self._what, "doing": _doing}

    def _start(self) -> datetime:
        # The file's own time is lost with every rewriting, and this machine's clock may be wrong.
        overwrite(self._fs, self._path, seal(self._known()))
        written = modified(self._fs, self._fs.info(self._path))
        return datetime.fromtimestamp(written - (time.monotonic() - self._began), UTC)


def _path(root: str, name: str) -> str:
    path = f"{FOLDER}/{name}.json"
    if not RUNNING_FILE.fullmatch(path):
        raise ValueError(
            f"a process cannot be announced as {name!r}: its name must be 32 hex digits, as of a UUID."
        )
    return f"{root}/{path}"


def _read(fs: AbstractFileSystem, path: str, last_sign: float) -> RunningProcess:
    last = datetime.fromtimestamp(last_sign, UTC)
    try:
        content = read_sealed(fs, path)
        since = datetime.fromisoformat(content["since"])
        doing = content.get("doing", "")  # older versions do not say it
        return RunningProcess(content["host"], content["pid"], content["what"], since, last, doing)
    except (Corrupt, ValueError, TypeError, KeyError) as error:
        # Somebody is at work there: until when their files may be old is not known.
        began = datetime.fromtimestamp(0, UTC)
        return RunningProcess("an unknown machine", 0, f"{path} cannot be read: {error}", began, last)
