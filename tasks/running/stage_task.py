"""What all stages have in common as Prefect tasks."""

import logging
from collections.abc import Callable
from inspect import signature
from typing import Any, ParamSpec, TypeVar

from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from layerwise.storage.files.errors import Unreachable

logger = logging.getLogger(__name__)

# In seconds; the client of the storage has asked for a minute before each of them.
RETRY_DELAYS = [10.0, 60.0, 240.0]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def stage_task(
    name: str | None = None, about: Callable[..., str] | None = None
) -> Callable[[Callable[Parameters, Result]], Task[Parameters, Result]]:
    """Make a function a Prefect task that the store alone caches, and that outlives an outage of the storage.

    After the outage the task is called again, and goes on from its last resume point.

    Args:
        name: of the task; the function's if left out.
        about: gives what a run is about, in some words, from the task's own arguments, all by name. The run is called
            by the task's name and these words.

    Raises:
        TypeError: ``about`` does not take the task's arguments.
    """

    def decorate(function: Callable[Parameters, Result]) -> Task[Parameters, Result]:
        task_name = name or function.__name__
        if about is not None:
            signature(about).bind(**dict.fromkeys(signature(function).parameters))
        stage: Task[Parameters, Result] = task(
            name=task_name,
            task_run_name=None if about is None else _run_name(task_name, about),
            cache_policy=NO_CACHE,
            persist_result=False,
            retries=len(RETRY_DELAYS),
            retry_delay_seconds=RETRY_DELAYS,
            retry_condition_fn=_is_passing,
        )(function)
        return stage

    return decorate


def _run_name(task_name: str, about: Callable[..., str]) -> Callable[..., str]:
    def run_name(parameters: dict[str, Any]) -> str:  # Prefect looks at the name of the argument
        try:
            return f"{task_name} {about(**parameters)}"
        except Exception as error:  # Prefect would fail the run, hours of work, for the want of a name
            logger.warning("a run of %s is named by the task alone: %r", task_name, error)
            return task_name

    return run_name


def _is_passing(task: Any, run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unreachable)
