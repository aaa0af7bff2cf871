"""Pauses of this process: it was stopped (SIGSTOP), or its machine suspended, and others could take it for dead."""

import threading
import time

SHORTEST = 60.0  # seconds; a thread of a machine that is merely busy is late by less

_lock = threading.Lock()
_due: dict[object, float] = {}  # when each that gives beats is to give the next
_pauses: list[tuple[float, float]] = []  # when each pause ended, and its seconds


def since_boot() -> float:
    """Seconds by a clock that nobody sets, and that goes on while the machine is suspended."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def beat(who: object, seconds: float) -> None:
    """Say that this process is at work, and that ``who`` will say so again in so many seconds."""
    end_beats(who)
    with _lock:
        _due[who] = since_boot() + seconds


def end_beats(who: object) -> None:
    """Say that ``who`` gives no more beats; one that is late tells of a pause."""
    now = since_boot()
    with _lock:
        pause = now - _due.pop(who, now)
        if pause > SHORTEST:
            _pauses.append((now, pause))


def longest_pause(since: float) -> float:
    """Seconds of the longest pause that ended after ``since`` (by ``since_boot``); 0 if none was noticed.

    Only a process that gives beats (see ``layerwise.storage.upkeep.signs_of_life.announced``) notices pauses.
    """
    now = since_boot()
    with _lock:
        # A thread that gives beats may not have run yet since the pause.
        ended = [*_pauses, *((now, now - due) for due in _due.values())]
    return max((seconds for end, seconds in ended if end >= since and seconds > SHORTEST), default=0.0)


def why_files_are_gone(since: float) -> str:
    """A sentence on why files of this process were deleted by another one, as far as it can be known."""
    seconds = longest_pause(since)
    if not seconds:
        return "Another process deleted it: leave the cleaning of the store to `layerwise gc`."
    length = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.0f} minutes"
    return (
        f"Likely reason: this process was paused for {length} (stopped, suspended with its machine, or cut off from "
        "the store), and `layerwise gc --apply` took it for dead."
    )
