"""Pauses of this process: it was stopped (SIGSTOP) or its machine suspended, and others may have considered it dead."""

import threading
import time

SHORTEST = 60.0  # seconds; a thread on a machine that is only busy is late by less

_lock = threading.Lock()
_due: dict[object, float] = {}  # time of the next beat, by its sender
_pauses: list[tuple[float, float]] = []  # end of each pause, and its length in seconds


def since_boot() -> float:
    """Return seconds since boot, by a clock that is never set and continues while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def beat(who: object, seconds: float) -> None:
    """Record that this process is running, and that ``who`` will call again within ``seconds``."""
    end_beats(who)
    with _lock:
        _due[who] = since_boot() + seconds


def end_beats(who: object) -> None:
    """Record that ``who`` sends no more beats. A beat that is late indicates a pause."""
    now = since_boot()
    with _lock:
        pause = now - _due.pop(who, now)
        if pause > SHORTEST:
            _pauses.append((now, pause))


def longest_pause(since: float) -> float:
    """Return the length in seconds of the longest pause that ended after ``since``; 0 if none was detected.

    Only a process that sends beats (see ``layerwise.storage.signs_of_life.announced``) detects pauses.

    Args:
        since: by ``since_boot``.
    """
    now = since_boot()
    with _lock:
        # After a pause, the thread that sends beats may not have run yet.
        ended = [*_pauses, *((now, now - due) for due in _due.values())]
    return max((seconds for end, seconds in ended if end >= since and seconds > SHORTEST), default=0.0)


def why_files_are_gone(since: float) -> str:
    """Return a sentence on why another process deleted files of this one, as far as this is known."""
    seconds = longest_pause(since)
    if not seconds:
        return "Another process deleted it: use only `layerwise gc` to clean up the store."
    length = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
    return (
        f"Likely reason: this process was paused for {length} (stopped, suspended with its machine, or cut off from "
        "the store), and `layerwise gc --apply` considered it dead."
    )
