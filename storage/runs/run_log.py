"""Log of a run in the store: a file of JSON lines, of which the first describes the run.

Object stores cannot append, so the file is rewritten as a whole while the run goes on. Its size is limited.
"""

import contextlib
import json
import logging
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from layerwise.storage.files.credentials import without_secrets
from layerwise.storage.files.local_disk import REFUSED
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.inventory import LOG_FOLDER
from layerwise.storage.location import StoreLocation

logger = logging.getLogger(__name__)

EVERY = 30.0  # seconds between two writings of a log that has grown
MOST_BYTES = 1 << 20  # of the lines of a log; the oldest are dropped
LONGEST_LINE = 1 << 14  # characters of a message, such as a traceback
LAST_WAIT = 10.0  # seconds that the last writing may delay the end of the run


class RunLog:
    """Lines of a run, and the description that is the first line of the file. Used by several threads.

    Args:
        name: of the run, 32 hex digits; the file is ``logs/<name>.jsonl``.
        about: description of the run.
    """

    def __init__(self, store: StoreLocation, name: str, about: Mapping[str, object]) -> None:
        self._store, self._path = store, store.path(f"{LOG_FOLDER}/{name}.jsonl")
        self._about = {"time": now(), **about}
        self._lines: deque[str] = deque()
        self._bytes, self._dropped = 0, 0
        self._lock, self._changed, self._failed = threading.Lock(), True, False

    def add(self, line: Mapping[str, object]) -> None:
        """Append a line. The oldest lines are dropped if the log gets too long."""
        text = _text(line)
        with self._lock:
            self._lines.append(text)
            self._bytes += len(text) + 1
            while self._bytes > MOST_BYTES:
                self._bytes -= len(self._lines.popleft()) + 1
                self._dropped += 1
            self._changed = True

    def describe(self, **facts: object) -> None:
        """Add facts to the description of the run, or replace them."""
        with self._lock:
            self._about |= facts
            self._changed = True

    def keep_writing(self, done: threading.Event) -> None:
        """Write the file now, and again after changes until ``done``."""
        self._write()
        while not done.wait(EVERY):
            self._write()
        self._write()

    def _write(self) -> None:
        with self._lock:
            if not self._changed:
                return
            dropped = {"lines_dropped": self._dropped} if self._dropped else {}
            text = "\n".join([_text({**self._about, **dropped}), *self._lines, ""])
            self._changed = False
        try:
            overwrite(self._store.fs, self._path, text.encode())
        except Exception as error:  # clients raise more than OSErrors; the run does not depend on its log
            with self._lock:
                self._changed = True
            if isinstance(error, OSError) and error.errno in REFUSED:
                logger.info("%s has no log of this run (%s)", self._store.root, error)
            elif not self._failed:
                logger.warning("%s cannot be written (%s): the run continues without it.", self._path, error)
            self._failed = True


@contextlib.contextmanager
def logged(store: StoreLocation, name: str, about: Mapping[str, object]) -> Iterator[RunLog]:
    """Keep the log of a run in the store until the block ends. The run continues if the log cannot be written.

    Args:
        name: 32 hex digits.
        about: description of the run; credentials in its URLs are removed.
    """
    log, done = RunLog(store, name, about), threading.Event()
    thread = threading.Thread(target=log.keep_writing, args=(done,), name="log of the run", daemon=True)
    thread.start()
    try:
        yield log
    finally:
        done.set()
        thread.join(LAST_WAIT)


def now() -> str:
    """Return the time of this machine's clock (ISO 8601, UTC)."""
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _text(line: Mapping[str, object]) -> str:
    return json.dumps(
        {
            # In this order: a URL that is cut off is not recognized.
            name: without_secrets(value)[:LONGEST_LINE] if isinstance(value, str) else value
            for name, value in line.items()
        }
    )
