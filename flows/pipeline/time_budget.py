"""A search with a limit of time: what is begun in time is finished, and chosen from as if there were no more to try."""

import time

from prefect.logging import get_run_logger

from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import TRIALS, Search


def check_minutes(settings: Search, runtime: Runtime) -> None:
    """Refuse a limit of time for a search that it could not end.

    Raises:
        ValueError: its strategy scores all plans.
    """
    if runtime.minutes is not None and settings.strategy not in TRIALS:
        raise ValueError(
            f"minutes is {runtime.minutes:g}, but the strategy {settings.strategy} scores all plans before it chooses. "
            f"Leave minutes empty, or set strategy to {' or '.join(TRIALS)}."
        )


def refuse_minutes(runtime: Runtime, flow: str) -> None:
    """Refuse a limit of time for another flow than a search.

    Raises:
        ValueError: there is one.
    """
    if runtime.minutes is not None:
        raise ValueError(
            f"minutes is {runtime.minutes:g}, which limits a search, but {flow} does all of its work. Leave minutes "
            "empty."
        )


def end_of(runtime: Runtime) -> float:
    """When a search that begins now begins no plans any more, on the clock ``time.monotonic``."""
    return float("inf") if runtime.minutes is None else time.monotonic() + 60 * runtime.minutes


def is_too_late(tried: int, end: float) -> bool:
    """Whether no request for lanes is to be begun any more; one of which the store has some was begun before.

    Args:
        tried: how many plans were scored before. What a search begins with is always scored, as uniform is among it.
        end: when that is, on the clock ``time.monotonic``.
    """
    return tried > 0 and time.monotonic() >= end


def stopped(settings: Search, tried: int) -> Search:
    """The search that stops at what was tried when the time of this one was over."""
    get_run_logger().warning(
        "the minutes are over, after %d of the plans that this search would try: the best of them is chosen now, and "
        "the same search again goes on from there",
        tried,
    )
    return settings.model_copy(update={"stop_after": tried})
