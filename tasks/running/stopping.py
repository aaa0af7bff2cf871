"""SIGTERM: the machine will be taken away within minutes. Stop where the work can go on, and say so."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from prefect.exceptions import TerminationSignal


class Stopped(TerminationSignal):
    """The process was asked to end, and nothing that was finished is lost. Prefect knows it as what ends a run."""

    def __init__(self) -> None:
        super().__init__(signal.SIGTERM)

    def __str__(self) -> str:
        return "stopped by SIGTERM; nothing is lost, the same settings go on from the last resume point"


class _Request:
    """What is known of a request to stop; one per process, as signals are."""

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
    """Let SIGTERM raise ``Stopped`` in the main thread; within ``stop_deferred`` only at the next boundary.

    In any other thread than the main one this does nothing: Python gives signals to the main thread only.
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
    """Work that stops at its own boundaries: gives a function that says whether a stop was asked for.

    Whoever gets True commits what there is and calls ``stop``. If the work ends before that, by itself or by an
    error, ``Stopped`` is raised at its end.
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
    """Raise ``Stopped``; the request is answered by it."""
    _request.asked = False
    raise Stopped
