"""Progress that a person sees: on the terminal, in the log, and as a Prefect progress artifact."""

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

# An update of a Prefect artifact is a request of about 22 ms, and a log is read by people: not for every
# layer.
SECONDS_BETWEEN_REPORTS = 10.0
# Prefect's client would repeat each report for a minute, and wait a minute for each answer, while nothing is computed.
REPORT_REPETITIONS = 1
REPORT_TIMEOUT = 10.0  # seconds


class Step(Protocol):
    """Call after each layer."""

    def __call__(self, completed: int) -> None: ...


@contextmanager
def showing(
    title: str, total: int, start: int = 0, resumed: ResumePoint | None = None, unit: str = "layer"
) -> Iterator[Step]:
    """Show that ``completed`` of ``total`` are done, with the time left and the memory in use.

    Signs of life of this process say it, too.

    Args:
        title: what is going on, e.g. "branch: 11 lanes, group 1 of 1".
        total: number of layers.
        start: how many an earlier attempt had done.
        resumed: the resume point that the earlier attempt left.
        unit: what is counted.
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
    )
    console = PlainConsole(stderr=True)
    if resumed is not None:
        reports.say(f"{title}: goes on from {unit} {start} of {total}, saved {resumed.at} on {resumed.host}")
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        bar = bars.add_task(printable(title), total=total, completed=start, memory=_memory())

        def step(completed: int) -> None:
            doing(f"{title}: {unit} {completed} of {total}")
            bars.update(bar, completed=completed, memory=_memory())
            reports.report(completed, to_stderr=not console.is_terminal)

        doing(f"{title}: {unit} {start} of {total}")
        try:
            yield step
        finally:
            doing("")


class _Reports:
    """Reports to the log, to Prefect, and as plain lines where there is no terminal."""

    def __init__(self, title: str, total: int, start: int, unit: str) -> None:
        self._title, self._total, self._start, self._unit = title, total, start, unit
        self._began, self._last = time.monotonic(), 0.0
        # Outside of a task run there is no server to tell; a test calls the plain function.
        in_task_run = TaskRunContext.get() is not None
        self._artifact: UUID | None = None
        if in_task_run:
            with going_on_without_prefect():
                self._artifact = cast(UUID, create_progress_artifact(0.0, description=title))
        self._log = get_run_logger() if in_task_run else logger

    def report(self, completed: int, to_stderr: bool) -> None:
        logger.debug("%s: %s %d of %d done", self._title, self._unit, completed, self._total)
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_REPORTS and completed < self._total:
            return
        self._last = now
        left = (now - self._began) / max(completed - self._start, 1) * (self._total - completed)
        line = f"{self._title}: {self._unit} {completed} of {self._total}, {left:.0f} s left, {_memory()}"
        self.say(line, to_stderr)
        if self._artifact is not None:
            with going_on_without_prefect():
                update_progress_artifact(self._artifact, 100 * completed / self._total)

    def say(self, line: str, to_stderr: bool = True) -> None:
        """One line for the run's log, and for whoever watches."""
        self._log.info(line)
        if to_stderr and not is_on_stderr(self._log, logging.INFO):
            sys.stderr.write(f"{printable(line)}\n")


@contextmanager
def going_on_without_prefect() -> Iterator[None]:
    """A server that is restarted, or gone, costs its view of the progress, never hours of work."""
    try:
        with _quick_reports():
            yield
    except (httpx.HTTPError, PrefectException) as error:
        logger.warning("Prefect's server did not take a report (%r); the work goes on", error)


def _quick_reports() -> SettingsContext:
    """Prefect's settings with few repetitions and a short timeout.

    Not by ``temporary_settings``: a Ctrl-C or SIGTERM in the middle of it comes out as a pydantic error.
    """
    now = get_settings_context()
    client = now.settings.client.model_copy(update={"max_retries": REPORT_REPETITIONS})
    api = now.settings.api.model_copy(update={"request_timeout": REPORT_TIMEOUT})
    return SettingsContext(
        profile=now.profile, settings=now.settings.model_copy(update={"client": client, "api": api})
    )


def is_on_stderr(log: logging.Logger | logging.LoggerAdapter[Any], level: int) -> bool:
    """Whether ``log`` has a handler that writes this level to standard error, as Prefect's own does in a worker."""
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
    return size_in("GiB", psutil.Process().memory_info().rss, 1)
