"""Layer boundaries: points at which a stage may leave a resume point, and stops after SIGTERM."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from layerwise.storage.draft import Draft
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stopping import stop, stop_deferred


class BoundaryClock:
    """Decide at which layer boundaries a resume point is due."""

    def __init__(self, execution: Execution) -> None:
        self._layers, self._seconds = execution.boundary_layers, execution.boundary_seconds
        self._last_time, self._since = time.monotonic(), 0

    def due(self) -> bool:
        """Return whether a resume point is due. Call it once after every layer, and ``restart`` after the commit."""
        self._since += 1
        by_layers = self._layers is not None and self._since >= self._layers
        return by_layers or time.monotonic() - self._last_time >= self._seconds

    def restart(self) -> None:
        """Start counting again, so that the time spent on a commit does not make the next one due."""
        self._last_time, self._since = time.monotonic(), 0


@contextmanager
def boundaries(
    draft: Draft, execution: Execution, write_state: Callable[[Draft], None]
) -> Iterator[Callable[[int], None]]:
    """Leave resume points in ``draft`` at the intervals of ``execution``, and when the process is asked to stop.

    Args:
        write_state: see ``Draft.save_resume_point``.

    Yields:
        A function to call after every layer with the number of the next layer. Work done in the block after the last
        call may be repeated by a later attempt.

    Raises:
        Stopped: the process was asked to stop; the resume point is committed.
    """
    clock, reached_step, committed_step = BoundaryClock(execution), -1, -1
    with stop_deferred() as asked_to_stop:

        def commit() -> None:
            nonlocal committed_step
            draft.save_resume_point(reached_step, write_state)
            committed_step = reached_step

        def reached(step: int) -> None:
            nonlocal reached_step
            reached_step = step
            if clock.due() or asked_to_stop():
                commit()
                clock.restart()
            if asked_to_stop():
                stop()

        yield reached
        if asked_to_stop() and reached_step > committed_step:
            commit()
