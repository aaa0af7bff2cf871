"""Lines of the log of a run: text for people, or one JSON object per line; on standard error, and in the store."""

import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from layerwise.storage.files.credentials import without_secrets
from layerwise.tasks.running.printable import printable

if TYPE_CHECKING:  # imports fsspec
    from layerwise.storage.runs.run_log import RunLog

LogFormat = Literal["text", "json"]
# Progress, and the end of stages. Apart from the other loggers, whose levels belong to the program that uses this package.
run_logger = logging.getLogger("layerwise.run")
run_logger.propagate = False
run_logger.setLevel(logging.INFO)
# Loggers whose warnings and errors belong to a run.
WARNING_LOGGERS = ("layerwise", "prefect.flow_runs", "prefect.task_runs")

_stage = ""  # title of the current stage of this process


class LineFormatter(logging.Formatter):
    """Formatter of log records in printable lines, without the secrets in URLs.

    Text has a time stamp unless it goes to a terminal, and the level of a warning or an error. JSON has ``time``,
    ``level``, ``stage``, ``message``, and the numbers of the record.

    Args:
        debug: add the traceback of an error, not only its class and text.
    """

    def __init__(self, log_format: LogFormat = "text", debug: bool = False) -> None:
        super().__init__()
        self.log_format: LogFormat = log_format
        self.debug = debug

    def format(self, record: logging.LogRecord) -> str:
        message = without_secrets(self.message(record))
        if self.log_format == "json":
            return json.dumps(document_of(record, message))
        level = "" if record.levelno == logging.INFO else f"{record.levelname} "
        stamp = "" if is_terminal() else f"{time_of(record)} "
        # Further lines are indented, so that a name from outside cannot imitate a log line.
        return stamp + level + "\n  ".join(map(printable, message.split("\n")))

    def message(self, record: logging.LogRecord) -> str:
        """Return the text of a record, with its error."""
        text = record.getMessage()
        error = record.exc_info[1] if record.exc_info else None
        if error is None:
            return text
        if self.debug:
            return f"{text}\n{''.join(traceback.format_exception(error)).rstrip()}"
        return f"{text} ({type(error).__name__}: {error})"


formatter = LineFormatter()  # of the lines of this process on standard error


def is_json() -> bool:
    """Whether the lines of this process on standard error are JSON objects."""
    return formatter.log_format == "json"


def is_terminal() -> bool:
    """Whether standard error is a terminal."""
    return sys.stderr is not None and sys.stderr.isatty()


def write_line(record: logging.LogRecord) -> None:
    """Write a record to standard error."""
    sys.stderr.write(f"{formatter.format(record)}\n")


def log_to_run(
    message: str, numbers: Mapping[str, Any] | None = None, level: int = logging.INFO
) -> logging.LogRecord:
    """Add a line to the log of the run, if there is one, and return its record.

    Args:
        numbers: values that a program may read, by name.
    """
    details = {"stage": _stage, "numbers": dict(numbers or {})}
    record = run_logger.makeRecord(run_logger.name, level, __file__, 0, message, (), None, extra=details)
    run_logger.handle(record)
    return record


@contextmanager
def in_stage(title: str) -> Iterator[None]:
    """Name the current stage of this process in all lines until the block ends."""
    global _stage
    before, _stage = _stage, title
    try:
        yield
    finally:
        _stage = before


@contextmanager
def logging_to(log: "RunLog") -> Iterator[None]:
    """Add the progress of this process and the warnings of a run to its log until the block ends."""
    progress, warnings = _StoreHandler(log), _StoreHandler(log, logging.WARNING)
    handlers = {"layerwise.run": progress, **dict.fromkeys(WARNING_LOGGERS, warnings)}
    for name, handler in handlers.items():
        logging.getLogger(name).addHandler(handler)
    try:
        yield
    finally:
        for name, handler in handlers.items():
            logging.getLogger(name).removeHandler(handler)


class _StoreHandler(logging.Handler):
    """Handler that adds records to the log of a run in the store."""

    def __init__(self, log: "RunLog", level: int = logging.NOTSET) -> None:
        super().__init__(level)
        self._log, self._texts = log, LineFormatter("json", debug=True)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._log.add(document_of(record, self._texts.message(record)))
        except Exception:  # as every handler of the standard library does
            self.handleError(record)


def document_of(record: logging.LogRecord, message: str) -> dict[str, Any]:
    """Return a record as a JSON object."""
    return {
        "time": time_of(record),
        "level": record.levelname,
        "stage": without_secrets(getattr(record, "stage", _stage)),
        "message": message,
        **getattr(record, "numbers", {}),
    }


def time_of(record: logging.LogRecord) -> str:
    """Return when a record was made (ISO 8601, UTC, whole seconds)."""
    return f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%SZ}"
