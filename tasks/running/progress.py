"""Progress of a stage: on the terminal, in the log, and as a Prefect progress artifact."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, cast
from uuid import UUID

import httpx
import psutil
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.context import SettingsContext, TaskRunContext, get_settings_context
from prefect.exceptions import PrefectException
from prefect.logging import get_run_logger
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from layerwise.display.byte_size import size_in
from layerwise.storage.resume_points import ResumePoint
from layerwise.storage.signs_of_life import doing
from layerwise.tasks.running.plain_console import PlainConsole
from layerwise.tasks.running.printable import printable

logger = logging.getLogger(__name__)

# Layers may take less than a second: updating a Prefect artifact is a request of about 22 ms, and people read the log.
SECONDS_BETWEEN_REPORTS = 10.0
# By default, Prefect's client repeats a request for a minute and waits a minute for each answer; computation would stop.
REPORT_REPETITIONS = 1
REPORT_TIMEOUT = 10.0  # seconds


class ProgressUpdate(Protocol):
    """Function to call after each layer with the number of completed layers, and a note such as the current loss."""

    def __call__(self, completed: int, note: str = "") -> None: ...


@contextmanager
def showing(
    title: str, total: int, start: int = 0, resumed: ResumePoint | None = None, unit: str = "layer"
) -> Iterator[ProgressUpdate]:
    """Show how many layers are done, the time left and the memory in use. Signs of life report the same.

    Args:
        title: name of the work, e.g. "branch: 11 lanes, group 1 of 1".
        total: number of layers.
        start: number of layers that an earlier attempt has finished.
        resumed: the resume point that the earlier attempt left.
        unit: what is counted, if not layers.
    """
    reports = _Reports(title, total, start, unit)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{unit}s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[memory]}"),
        TextColumn("{task.fields[note]}", markup=False),
    )
    console = PlainConsole(stderr=True)
    if resumed is not None:
        reports.log(f"{title}: resumed from {unit} {start} of {total}, saved {resumed.at} on {resumed.host}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(printable(title), total=total, completed=start, memory=_memory(), note="")

        def step(completed: int, note: str = "") -> None:
            doing(f"{title}: {unit} {completed} of {total}")
            bars.update(bar, completed=completed, memory=_memory(), note=note)
            reports.report(completed, to_stderr=not console.is_terminal, note=note)

        doing(f"{title}: {unit} {start} of {total}")
        try:
            yield step
        finally:
            doing("")


class _Reports:
    """Reports to the log, to Prefect, and, without a terminal, as plain lines on standard error."""

    def __init__(self, title: str, total: int, start: int, unit: str) -> None:
        self._title, self._total, self._start, self._unit = title, total, start, unit
        self._began, self._last = time.monotonic(), 0.0
        # Outside of a task run, as in a test that calls the plain function, there is no server to report to.
        in_task_run = TaskRunContext.get() is not None
        self._artifact: UUID | None = None
        if in_task_run:
            with going_on_without_prefect():
                self._artifact = cast(UUID, create_progress_artifact(0.0, description=title))
        self._logger = get_run_logger() if in_task_run else logger

    def report(self, completed: int, to_stderr: bool, note: str) -> None:
        logger.debug("%s: %s %d of %d done", self._title, self._unit, completed, self._total)
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_REPORTS and completed < self._total:
            return
        self._last = now
        left = (now - self._began) / max(completed - self._start, 1) * (self._total - completed)
        line = f"{self._title}: {self._unit} {completed} of {self._total}, {left:.0f} s left, {_memory()}"
        line += f", {note}" if note else ""
        self.log(line, to_stderr)
        if self._artifact is not None:
            with going_on_without_prefect():
                update_progress_artifact(self._artifact, 100 * completed / self._total)

    def log(self, line: str, to_stderr: bool = True) -> None:
        """Write one line to the run's log, and to standard error unless the log already goes there."""
        self._logger.info(line)
        if to_stderr and not is_on_stderr(self._logger, logging.INFO):
            sys.stderr.write(f"{printable(line)}\n")


@contextmanager
def going_on_without_prefect() -> Iterator[None]:
    """Turn errors of Prefect's server into warnings: a lost report must not end hours of work."""
    try:
        with _quick_reports():
            yield
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("Prefect's server did not accept a report (%r); the work continues", error)


def _quick_reports() -> SettingsContext:
    """Return Prefect's settings with fewer repetitions and a shorter timeout.

    ``temporary_settings`` is not used: Ctrl-C or SIGTERM in the middle of it is raised as a pydantic error.
    """
    now = get_settings_context()
    client = now.settings.client.model_copy(update={"max_retries": REPORT_REPETITIONS})
    api = now.settings.api.model_copy(update={"request_timeout": REPORT_TIMEOUT})
    return SettingsContext(
        profile=now.profile, settings=now.settings.model_copy(update={"client": client, "api": api})
    )


def is_on_stderr(log: logging.Logger | logging.LoggerAdapter[Any], level: int) -> bool:
    """Return whether ``log`` writes this level to standard error, as Prefect's logger in a worker does."""
    logger: logging.Logger | None = log.logger if isinstance(log, logging.LoggerAdapter) else log
    assert logger is not None, "an adapter has a logger"
    record = logging.makeLogRecord(
        {"name": logger.name, "levelno": level, "levelname": logging.getLevelName(level)}
    )
    enabled = logger.isEnabledFor(level)
    while enabled and logger is not None:
        for handler in logger.handlers:
            on_stderr = isinstance(handler, logging.StreamHandler) and handler.stream is sys.stderr
            if on_stderr and handler.level <= level and handler.filter(record):
                return True
        logger = logger.parent if logger.propagate else None
    return False


def _memory() -> str:
    text = size_in("GiB", psutil.Process().memory_info().rss, 1)
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return text
    device = max(range(torch.cuda.device_count()), key=torch.cuda.memory_allocated)  # the one in use
    from layerwise.tasks.running.execution import device_memory  # imports torch

    memory = device_memory(torch.device("cuda", device))
    assert memory is not None, "CUDA tells"
    return f"{text}; device {size_in('GiB', memory.taken, 1)} of {size_in('GiB', memory.total, 1)}"
