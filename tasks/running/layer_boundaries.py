"""Layer boundaries: points at which a stage may leave a resume point, and stops after SIGTERM."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from layerwise.storage.draft import Draft
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stopping import Stopped, stop, stop_deferred

SHARE = 20  # a resume point that is due by time waits at least this many times the duration of the one before


class BoundaryClock:
    """Decide at which layer boundaries a resume point is due.

    By time, a resume point is due after ``boundary_seconds``, but not before 20 times the duration of the last commit
    has passed. So commits take less than 5 % of the time, however large and slow they are. By number of layers, it is due
    exactly then.
    """

    def __init__(self, execution: Execution) -> None:
        self._layers, self._seconds = execution.boundary_layers, execution.boundary_seconds
        self._last_time, self._since = time.monotonic(), 0
        self._shortest = self._seconds

    def due(self) -> bool:
        """Return whether a resume point is due. Call it once after every layer, and ``restart`` after the commit."""
        self._since += 1
        by_layers = self._layers is not None and self._since >= self._layers
        return by_layers or time.monotonic() - self._last_time >= self._shortest

    def restart(self, duration: float) -> None:
        """Start counting again after a commit that took ``duration`` seconds."""
        self._last_time, self._since = time.monotonic(), 0
        self._shortest = max(self._seconds, SHARE * duration)


@contextmanager
def boundaries(
    draft: Draft, execution: Execution, write_state: Callable[[Draft], None]
) -> Iterator[Callable[[int], None]]:
    """Leave resume points in ``draft`` as ``BoundaryClock`` decides, and when the process is asked to stop.

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
                began = time.monotonic()
                commit()
                clock.restart(time.monotonic() - began)
            if asked_to_stop():
                stop()

        try:
            yield reached
        except (
            Stopped
        ) as stopped:  # by the boundary of another stage that shares this stage's pass over the layers
            try:
                if reached_step > committed_step:
                    commit()
            except Exception as error:  # must not hide the request to stop, which is cleared
                raise stopped from error
            raise
        if asked_to_stop() and reached_step > committed_step:
            commit()
