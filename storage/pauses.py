"""Pauses of this process: it was stopped (SIGSTOP) or its machine suspended, and others could take it for dead."""

import contextlib
import threading
import time
from collections.abc import Iterator

SHORTEST = 60.0  # seconds; a machine that is merely busy keeps a thread waiting for less

_lock = threading.Lock()
_waits: dict[object, float] = {}  # when each wait that is under way should be over
_pauses: list[tuple[float, float]] = []  # when each pause ended, and its seconds


def since_boot() -> float:
    """Seconds by a clock that nobody sets, and that goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


@contextlib.contextmanager
def noticing_pauses(seconds: float) -> Iterator[None]:
    """Put around a wait: if it takes much longer than ``seconds``, this process was paused meanwhile."""
    wait = object()
    with _lock:
        _waits[wait] = since_boot() + seconds
    try:
        yield
    finally:
        now = since_boot()
        with _lock:
            pause = now - _waits.pop(wait)
            if pause > SHORTEST:
                _pauses.append((now, pause))


def longest_pause(since: float) -> float:
    """Seconds of the longest pause that ended after ``since`` (by ``since_boot``); 0 if none was noticed.

    A process that waits for nothing (see ``storage.running.announced``) notices none.
    """
    now = since_boot()
    with _lock:
        # The thread that waits may not have run yet since the pause.
        ended = [*_pauses, *((now, now - over) for over in _waits.values())]
    return max((seconds for end, seconds in ended if end >= since and seconds > SHORTEST), default=0.0)


def why_files_are_gone(since: float) -> str:
    """A sentence on why files of this process were deleted by another one, as far as it can be known."""
    seconds = longest_pause(since)
    if not seconds:
        return "Another process deleted it: leave the cleaning of the store to `layerwise gc`."
    length = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
    return (
        f"Likely reason: this process was paused for {length} (stopped, or its machine suspended), and "
        "`layerwise gc --apply` took it for dead."
    )
