"""SIGTERM: the machine may be taken away within minutes, so stop at the next point that work can be resumed from."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from prefect.exceptions import TerminationSignal


class Stopped(TerminationSignal):
    """The process was asked to end; finished work is kept. Prefect treats the base class as the end of a run."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)

    def __str__(self) -> str:
        return "stopped by SIGTERM; finished work is kept. Run again with the same settings to resume"


class _Request:
    """State of a request to stop; one per process, because signals are."""

    def __init__(self) -> None:
        self.asked = False
        self.deferred = 0  # depth of ``stop_deferred``

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred:
            raise Stopped
        self.asked = True


_request = _Request()


@contextmanager
def stopping_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise ``Stopped`` in the main thread; within ``stop_deferred``, only at the next boundary.

    Does nothing in other threads, because Python delivers signals to the main thread only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _request.on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_deferred() -> Iterator[Callable[[], bool]]:
    """Defer SIGTERM to the boundaries of the work in this block.

    If the block ends after a request to stop, normally or by an error, ``Stopped`` is raised at its end.

    Yields:
        A function that returns whether the process was asked to stop. On True, commit a resume point and call ``stop``.
    """
    _request.deferred += 1
    try:
        yield lambda: _request.asked
    except Exception as error:
        if _request.asked and _request.deferred == 1:
            _request.asked = False
            raise Stopped from error
        raise
    finally:
        _request.deferred -= 1
    if _request.asked and not _request.deferred:
        stop()


def stop() -> None:
    """Raise ``Stopped`` and clear the request."""
    _request.asked = False
    raise Stopped
