"""Folder of the embedded Prefect server: one per version of Prefect, locked while it is used."""

import fcntl
import os
import re
import shutil
import time
from pathlib import Path
from types import TracebackType
from typing import Self

UNUSED_DAYS = 60  # after which the folder of another version is removed
LARGE_LOG = 1_000_000  # bytes; a larger log is replaced by a new one
HOME = re.compile(r"prefect-[\w.+!-]+")


class ServerHome:
    """Folder with the database of the embedded server; a context manager around the start of the server.

    The first start in a folder creates the database. It runs alone, because simultaneous starts would fail in Prefect's
    migrations. Later starts may be simultaneous. The lock is held until this process and its server have ended, so that
    no other process removes the folder.

    Args:
        folder: created if it is missing.
        own: whether ``remove_old_homes`` may remove the folder; otherwise it belongs to the user.
        limit: seconds to wait for another process that creates the database.

    Attributes:
        lock: file descriptor of the lock, to pass on to the server.

    Raises:
        OSError: the folder cannot be written or locked.
        TimeoutError: another process takes too long to create the database.
    """

    def __init__(self, folder: Path, own: bool, limit: float) -> None:
        self.folder = folder
        self._lock_file = _lock_of(folder) if own else folder / "layerwise.lock"
        self._limit = limit
        self._file = -1

    @property
    def log(self) -> Path:
        """Log of all servers that ran in this folder."""
        return self.folder / "layerwise-server.log"

    @property
    def lock(self) -> tuple[int]:
        return (self._file,)

    def __enter__(self) -> Self:
        self._lock_file.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._lock_file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            self._acquire()
            os.utime(self._file)
            self.folder.mkdir(mode=0o700, exist_ok=True)
            if self.log.exists() and self.log.stat().st_size > LARGE_LOG:
                self.log.unlink()
        except BaseException:
            os.close(self._file)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            os.close(self._file)
            return
        self._made.touch()
        fcntl.flock(self._file, fcntl.LOCK_SH)

    @property
    def _made(self) -> Path:
        """File that exists once the database is complete."""
        return self.folder / "layerwise-database-made"

    def _acquire(self) -> None:
        """Lock the folder: exclusively while it has no database, shared otherwise."""
        deadline = time.monotonic() + self._limit
        while True:
            kind = fcntl.LOCK_SH if self._made.exists() else fcntl.LOCK_EX
            try:
                fcntl.flock(self._file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(
                        f"another process has been starting a server there for {self._limit} s"
                    ) from None
                time.sleep(0.1)
                continue
            # Otherwise the folder was removed before it was locked.
            if kind == fcntl.LOCK_EX or self._made.exists():
                return
            fcntl.flock(self._file, fcntl.LOCK_UN)


def remove_old_homes(current: Path) -> None:
    """Remove the folders of other versions of Prefect that were not used for ``UNUSED_DAYS`` days.

    Args:
        current: folder of this version; the others are next to it.
    """
    for folder in current.parent.glob("prefect-*"):
        if folder == current or not HOME.fullmatch(folder.name) or not folder.is_dir():
            continue
        try:
            _remove_if_old(folder)
        except OSError:  # owned by another user, or read-only: the next start tries again
            continue


def _remove_if_old(folder: Path) -> None:
    lock = os.open(_lock_of(folder), os.O_RDWR)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if time.time() - os.stat(lock).st_mtime > UNUSED_DAYS * 24 * 3600:
            shutil.rmtree(folder)
    finally:
        os.close(lock)


def _lock_of(folder: Path) -> Path:
    """Return the lock file next to the folder. It is never removed: a waiting process would lock a deleted file."""
    return folder.with_name(f"{folder.name}.lock")
