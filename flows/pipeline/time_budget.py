"""Time limit of a search: lanes begun in time are finished, and the best plan is chosen from those tried."""

import time
from math import inf

from prefect.logging import get_run_logger

from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.settings import TRIALS, Search


def check_minutes(settings: Search, runtime: SearchRuntime) -> None:
    """Refuse a time limit for a search that cannot stop early.

    Raises:
        ValueError: the strategy scores all plans.
    """
    if runtime.minutes is not None and settings.strategy not in TRIALS:
        raise ValueError(
            f"minutes is {runtime.minutes:g}, but the strategy {settings.strategy} scores all plans before it chooses. "
            f"Leave minutes empty, or set strategy to {' or '.join(TRIALS)}."
        )


def deadline_of(runtime: SearchRuntime) -> float:
    """Return the deadline of a search that begins now, on the clock ``time.monotonic``; infinite without a limit."""
    return inf if runtime.minutes is None else time.monotonic() + 60 * runtime.minutes


def is_too_late(tried: int, deadline: float) -> bool:
    """Return whether no further lanes may be begun.

    Args:
        tried: number of plans scored before. The first lanes are always scored, as uniform is among them.
        deadline: on the clock ``time.monotonic``.
    """
    return tried > 0 and time.monotonic() >= deadline


def stopped(settings: Search, tried: int) -> Search:
    """Return the search that stops after the plans tried so far, and say so in the run's log."""
    get_run_logger().warning(
        "the time limit is reached after %d of the plans that this search would try: the best of them is chosen now, "
        "and the same search goes on from there",
        tried,
    )
    return settings.model_copy(update={"stop_after": tried})
