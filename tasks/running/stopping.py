"""SIGTERM: the machine may be taken away within minutes, so stop at the next point that work can be resumed from."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from prefect.exceptions import TerminationSignal


class Stopped(TerminationSignal):
    """The process was asked to end; finished work is kept. Prefect treats the base class as the end of a run."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)

    def __str__(self) -> str:
        name = signal.Signals(self.signal).name
        return f"stopped by {name}; finished work is kept. Run again with the same settings to resume"


class Withdrawn(Stopped):
    """Nobody waits for the result any more; the process itself goes on. Raised at boundaries only."""

    def __str__(self) -> str:
        return "withdrawn by the search that asked for it; finished work is kept"


class _Request:
    """State of a request to stop; one per process, because signals are."""

    def __init__(self) -> None:
        self.asked: int | None = None  # number of the signal
        self.withdrawn = False
        self.deferred = 0  # depth of ``stop_deferred``

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.deferred:
            raise Stopped(number)
        self.asked = number

    @property
    def is_pending(self) -> bool:
        return self.asked is not None or self.withdrawn

    def take(self) -> Stopped:
        """Return the exception of a pending request, and clear the request."""
        if self.asked is None:
            self.withdrawn = False
            return Withdrawn()
        number, self.asked = self.asked, None
        return Stopped(number)


_request = _Request()


@contextmanager
def stopping_on_sigterm(also: signal.Signals | None = None) -> Iterator[None]:
    """Let SIGTERM raise ``Stopped`` in the main thread; within ``stop_deferred``, only at the next boundary.

    Does nothing in other threads, because Python delivers signals to the main thread only.

    Args:
        also: another signal that does the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [signal.SIGTERM] if also is None else [signal.SIGTERM, also]
    previous = {number: signal.signal(number, _request.on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def withdrawable() -> Iterator[Callable[[], None]]:
    """Allow another thread to end the work of this block at its next boundary, while the process goes on.

    Yields:
        A function that makes the next boundary raise ``Withdrawn``.
    """

    over = False

    def withdraw() -> None:
        if not over:
            _request.withdrawn = True

    try:
        yield withdraw
    finally:
        over = True
        _request.withdrawn = False


@contextmanager
def stop_deferred() -> Iterator[Callable[[], bool]]:
    """Defer requests to stop to the boundaries of the work in this block.

    If the block ends after a request to stop, normally or by an error, ``Stopped`` is raised at its end.

    Yields:
        A function that returns whether the process was asked to stop. On True, commit a resume point and call ``stop``.
    """
    _request.deferred += 1
    try:
        yield lambda: _request.is_pending
    except Exception as error:
        if _request.is_pending and _request.deferred == 1:
            raise _request.take() from error
        raise
    finally:
        _request.deferred -= 1
    if _request.is_pending and not _request.deferred:
        stop()


def stop() -> None:
    """Raise ``Stopped`` and clear the request."""
    raise _request.take()
