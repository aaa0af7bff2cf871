"""Decorator that makes a function a Prefect task for a stage."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from inspect import signature
from typing import Any, ParamSpec, TypeVar

import torch
from prefect import Task, task
from prefect.cache_policies import NO_CACHE

from layerwise.display.byte_size import size
from layerwise.storage.files.errors import Unreachable
from layerwise.tasks.running.execution import Execution, release_memory

logger = logging.getLogger(__name__)

# In seconds; before each of them, the storage client has retried for a minute.
RETRY_DELAYS = [10.0, 60.0, 240.0]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def stage_task(
    name: str | None = None, about: Callable[..., str] | None = None
) -> Callable[[Callable[Parameters, Result]], Task[Parameters, Result]]:
    """Make a function a Prefect task that is cached only by the store and retried after an outage of the storage.

    A retry resumes from the last resume point. A function with the parameter ``execution`` also runs again, with less
    hidden states on the device, after the memory of the device was exhausted.

    Args:
        name: name of the task; by default that of the function.
        about: returns a short description of a run from the task's arguments, passed by name. The name of the run is
            the name of the task followed by this description.

    Raises:
        TypeError: ``about`` does not accept the task's arguments.
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
            retry_condition_fn=_is_outage,
        )(_with_less_on_device(function) if "execution" in signature(function).parameters else function)
        return stage

    return decorate


def _run_name(task_name: str, about: Callable[..., str]) -> Callable[..., str]:
    def run_name(parameters: dict[str, Any]) -> str:  # Prefect requires this argument name
        try:
            return f"{task_name} {about(**parameters)}"
        except Exception as error:  # Prefect would fail the whole run because of a name
            logger.warning("a run of %s has no description in its name: %r", task_name, error)
            return task_name

    return run_name


def _with_less_on_device(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Call a function again with half of the hidden states on the device, and then with none, if its memory is exhausted.

    Results do not depend on the place of hidden states. The number of windows in a forward pass stays the same, because
    it determines the last bits of the results.
    """

    @wraps(function)
    def run(*arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
        bound = signature(function).bind(*arguments, **options)
        for fraction in (0.5, 0.0):
            execution: Execution = bound.arguments["execution"]
            try:
                return function(*bound.args, **bound.kwargs)
            except torch.OutOfMemoryError as error:
                if not execution.most_device_states_bytes:
                    raise
                # Only its text is kept: the error refers to the tensors of this attempt.
                reason = str(error).partition("\n")[0]
            release_memory(execution.torch_device)
            before = execution.most_device_states_bytes
            less = int(fraction * before)
            logger.warning(
                "%s has too little memory (%s). The stage runs again from its last resume point, with %s hidden states on "
                "the device instead of up to %s. To start with less, give --device-memory-gib.",
                execution.device,
                reason,
                f"up to {size(less)} of" if less else "no",
                size(before),
            )
            bound.arguments["execution"] = replace(execution, device_states_bytes=less)
        return function(*bound.args, **bound.kwargs)

    return run


def _is_outage(task: Any, run: Any, state: Any) -> bool:
    return isinstance(state.result(raise_on_failure=False), Unreachable)
