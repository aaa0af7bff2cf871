"""What all stages have in common as Prefect tasks."""

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from storage.unreachable import Unreachable

# In seconds; the client of the storage has asked for a minute before each of them.
RETRY_DELAYS = [10.0, 60.0, 240.0]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def stage_task(name: str | None = None) -> Callable[[Callable[Parameters, Result]], Task[Parameters, Result]]:
    """Make a function a Prefect task that the store alone caches, and that outlives an outage of the storage.

    After the outage the task is called again, and goes on from its last resume point.
    """
    return task(
        name=name,
        cache_policy=NO_CACHE,
        persist_result=False,
        retries=len(RETRY_DELAYS),
        retry_delay_seconds=RETRY_DELAYS,
        retry_condition_fn=_is_passing,
    )


def _is_passing(task: Any, run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unreachable)
