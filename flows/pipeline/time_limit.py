"""Time limit of a search: after it no further lanes are started, and the best of the plans tried is chosen."""

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
    if runtime.minutes is not None and settings.tries_all:
        listed = " with listed betas" if settings.strategy in TRIALS else ""
        raise ValueError(
            f"minutes is {runtime.minutes:g}, but the strategy {settings.strategy}{listed} scores all plans before it "
            f"chooses. Leave minutes empty, set trials, or set strategy to {' or '.join(TRIALS)}."
        )


def deadline_of(runtime: SearchRuntime) -> float:
    """Return the deadline of a search that starts now, on the clock ``time.monotonic``; infinite without a limit."""
    return inf if runtime.minutes is None else time.monotonic() + 60 * runtime.minutes


def is_too_late(tried: int, deadline: float) -> bool:
    """Return whether no further lanes may be started.

    Args:
        tried: number of plans scored before. The first lanes are always scored, as they include the uniform plan. So are
            the last ones of the strategy auto, without which the best plans would be known on a few windows only.
        deadline: on the clock ``time.monotonic``.
    """
    return tried > 0 and time.monotonic() >= deadline


def stop_after_tried(settings: Search, tried: int) -> Search:
    """Return the search that stops after the plans tried so far, and log the stop."""
    get_run_logger().warning(
        "the time limit is reached after %d plans: the best of them is chosen now. A search with the same settings "
        "continues from here.",
        tried,
    )
    return settings.model_copy(update={"stop_after": tried})
