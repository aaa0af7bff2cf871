"""A search with a limit of time: what is begun in time is finished, and chosen from as if there were no more to try."""

import time

from prefect.logging import get_run_logger

from flows.found import Found, look_up
from flows.runtime import Runtime
from flows.settings import TRIALS, Search
from flows.stages import captured
from storage.store import ArtifactStore
from tasks.branch import branch
from tasks.execution import Execution


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
            f"minutes is {runtime.minutes:g}, which is for a search alone: {flow} needs all of its plans. Leave "
            "minutes empty."
        )


def end_of(runtime: Runtime) -> float:
    """When a search that begins now begins no plans any more, on the clock ``time.monotonic``."""
    return float("inf") if runtime.minutes is None else time.monotonic() + 60 * runtime.minutes


def stopped_in_time(settings: Search, found: Found, end: float) -> Search:
    """The search itself, or if its time is over the one that stops at what was tried by now.

    What it begins with is always scored: uniform is among that.
    """
    if found.request is None or not found.tried or time.monotonic() < end:
        return settings
    get_run_logger().warning(
        "the minutes of %s are over after %d plans, from which the best is chosen now; the same search again goes on "
        "from there",
        settings.title,
        found.tried,
    )
    return settings.model_copy(update={"stop_after": found.tried})


def score_in_time(store: ArtifactStore, settings: Search, execution: Execution, end: float) -> Search:
    """Score plans in this process until the search has no more to try, or until its time is over.

    Returns:
        The search of which all plans are scored: see ``stopped_in_time``.
    """
    before = captured(store, settings, execution)
    while (found := look_up(store, settings)).request is not None:
        stopped = stopped_in_time(settings, found, end)
        if stopped != settings:
            return stopped
        inputs = before.inputs("selection", found.request.windows)
        branch(store, inputs, found.request.plans, before.linears, before.pruning, execution)
    return settings
