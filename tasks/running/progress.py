"""Progress of a stage: on the terminal, in the log, in the log of the run, and as a Prefect progress artifact."""

import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast
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
from layerwise.display.duration import duration
from layerwise.storage.resume_points import ResumePoint
from layerwise.storage.signs_of_life import doing
from layerwise.tasks.running.log_lines import in_stage, is_json, log_to_run, write_line
from layerwise.tasks.running.plain_console import PlainConsole
from layerwise.tasks.running.printable import printable

if TYPE_CHECKING:  # imports torch
    from layerwise.tasks.running.execution import DeviceMemory

logger = logging.getLogger(__name__)

# Layers may take less than a second: updating a Prefect artifact is a request of about 22 ms, and people read the log.
SECONDS_BETWEEN_REPORTS = 30.0
# By default, Prefect's client repeats a request for a minute and waits a minute for each answer; computation would stop.
REPORT_REPETITIONS = 1
REPORT_TIMEOUT = 10.0  # seconds


class ProgressUpdate(Protocol):
    """Function to call after each layer with the number of completed layers, and a note such as the current loss."""

    def __call__(self, completed: int, note: str = "") -> None: ...


@dataclass(frozen=True)
class RunTime:
    """Time that a run still needs.

    Attributes:
        seconds: for the stages that remain, including the current one.
        at_least: whether the time of a later stage is unknown.
    """

    seconds: float
    at_least: bool = False

    def __str__(self) -> str:
        return f"all stages {'at least ' if self.at_least else ''}{duration(round(self.seconds))}"


# Given the time left in the current stage (None before its first layer), returns that of the whole run; None if unknown.
RunClock = Callable[[float | None], RunTime | None]


def unknown_time(stage: float | None) -> RunTime | None:
    """Return that the time of the whole run is unknown. A ``RunClock``."""
    return None


_run_clock: RunClock = unknown_time


@contextmanager
def with_run_clock(clock: RunClock) -> Iterator[None]:
    """Show the time that the whole run still needs next to that of every stage until the block ends."""
    global _run_clock
    before, _run_clock = _run_clock, clock
    try:
        yield
    finally:
        _run_clock = before


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
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(f"{unit}s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        TextColumn("{task.fields[run]}"),
        TextColumn("{task.fields[memory]}"),
        TextColumn("{task.fields[note]}", markup=False),
    )
    console = PlainConsole(stderr=True)
    shows_bar = console.is_terminal and not is_json()
    with in_stage(title):
        reports = _Reports(title, total, start, unit, to_stderr=not shows_bar)
        if resumed is not None:
            reports.log(
                f"{title}: resumed from {unit} {start} of {total}, saved {resumed.at} on {resumed.host}",
                {},
                True,
            )
        with Progress(*columns, console=console, disable=not shows_bar) as bars:
            bar = bars.add_task(
                printable(title), total=total, completed=start, run="", memory=str(memory_in_use()), note=""
            )

            def step(completed: int, note: str = "") -> None:
                memory, left = memory_in_use(), reports.seconds_left(completed)
                run = _run_clock(left)
                doing(f"{title}: {unit} {completed} of {total}", left if run is None else run.seconds)
                shown = "" if run is None else str(run)
                bars.update(bar, completed=completed, run=shown, memory=str(memory), note=note)
                reports.report(completed, left, run, memory, note)

            begun = _run_clock(None)
            doing(f"{title}: {unit} {start} of {total}", None if begun is None else begun.seconds)
            try:
                yield step
            finally:
                doing("")


class _Reports:
    """Reports to the log, to Prefect, to the log of the run, and, without a bar, as lines on standard error."""

    def __init__(self, title: str, total: int, start: int, unit: str, to_stderr: bool) -> None:
        self._title, self._total, self._start, self._unit = title, total, start, unit
        self._to_stderr = to_stderr
        self._began, self._last = time.monotonic(), float("-inf")
        # Outside of a task run, as in a test that calls the plain function, there is no server to report to.
        in_task_run = TaskRunContext.get() is not None
        self._artifact: UUID | None = None
        if in_task_run:
            with going_on_without_prefect():
                self._artifact = cast(UUID, create_progress_artifact(0.0, description=title))
        self._logger = get_run_logger() if in_task_run else logger

    def seconds_left(self, completed: int) -> float:
        """Return the time left in this stage, at the rate of this attempt."""
        spent = time.monotonic() - self._began
        return spent / max(completed - self._start, 1) * (self._total - completed)

    def report(self, completed: int, left: float, run: RunTime | None, memory: "Memory", note: str) -> None:
        logger.debug("%s: %s %d of %d done", self._title, self._unit, completed, self._total)
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_REPORTS and completed < self._total:
            return
        self._last = now
        parts = [f"{self._unit} {completed} of {self._total}", f"{duration(round(left))} left"]
        parts += [text for text in ("" if run is None else str(run), str(memory), note) if text]
        numbers: dict[str, object] = {self._unit: completed, f"{self._unit}s": self._total}
        numbers["seconds_left"] = round(left, 1)
        if run is not None:
            numbers["run_seconds_left"] = round(run.seconds, 1)
        self.log(f"{self._title}: {', '.join(parts)}", {**numbers, **memory.numbers}, self._to_stderr)
        if self._artifact is not None:
            with going_on_without_prefect():
                update_progress_artifact(self._artifact, 100 * completed / self._total)

    def log(self, line: str, numbers: dict[str, object], to_stderr: bool) -> None:
        """Write one line to the run's logs, and to standard error unless Prefect's log already goes there."""
        self._logger.info(line)
        record = log_to_run(printable(line), numbers)
        if to_stderr and not is_on_stderr(self._logger, logging.INFO):
            write_line(record)


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


@dataclass(frozen=True)
class Memory:
    """Memory of this process and of its device, in bytes.

    Attributes:
        resident: memory of the process.
        peak: maximum of ``resident`` so far.
        device: memory in use on the device, by all processes; None without one.
        device_peak: maximum that torch has allocated there so far for this process.
    """

    resident: int
    peak: int
    device: "DeviceMemory | None" = None
    device_peak: int = 0

    def __str__(self) -> str:
        text = f"{size_in('GiB', self.resident, 1)} (peak {size_in('GiB', self.peak, 1)})"
        if self.device is None:
            return text
        taken, total = (size_in("GiB", count, 1) for count in (self.device.taken, self.device.total))
        return f"{text}; device {taken} of {total} (peak {size_in('GiB', self.device_peak, 1)})"

    @property
    def numbers(self) -> dict[str, int]:
        """The same as plain numbers, without those that are unknown."""
        numbers = {"memory": self.resident, "peak_memory": self.peak}
        if self.device is not None:
            numbers |= {"device_memory": self.device.taken, "peak_device_memory": self.device_peak}
        return numbers


def memory_in_use() -> Memory:
    """Return the memory of this process and of the GPU that it uses most."""
    resident = psutil.Process().memory_info().rss
    peak = max(resident, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # in KiB on Linux
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return Memory(resident, peak)
    from layerwise.tasks.running.execution import device_memory  # imports torch

    number = max(range(torch.cuda.device_count()), key=torch.cuda.max_memory_allocated)  # the one in use
    device = device_memory(torch.device("cuda", number))
    return Memory(resident, peak, device, torch.cuda.max_memory_allocated(number))
