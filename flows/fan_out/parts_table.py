"""Table of the parts of a search: on the terminal, in the log, and as an artifact of the run in Prefect."""

import json
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from uuid import UUID

from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.logging import get_run_logger
from rich.live import Live
from rich.table import Table

from layerwise.storage.signs_of_life import doing
from layerwise.tasks.running.log_lines import is_json, log_to_run, write_line
from layerwise.tasks.running.plain_console import PlainConsole
from layerwise.tasks.running.progress import going_on_without_prefect, is_on_stderr

KEY = "search-steps"  # key of the Prefect artifact, as in earlier versions
LISTED = 40  # maximum number of rows; of more parts only the running ones are listed
SECONDS_BETWEEN_TABLES = 10.0  # each table is a request, and the server stores its rows
SECONDS_BETWEEN_LINES = 60.0  # between two summary lines if nothing else is logged


@dataclass(frozen=True)
class Row:
    """Row of one part.

    Attributes:
        part: title of the part.
        state: waiting, scheduled, pending, running, done, ...
        doing: what its process is doing.
        host: machine of its process.
        deaths: number of times that its process has died.
    """

    part: str
    state: str
    doing: str
    host: str
    deaths: int


class PartsTable:
    """Shows the parts that are run together. It is a context manager, entered once for each set of parts."""

    def __init__(self) -> None:
        self._log = get_run_logger()
        self._console = PlainConsole(stderr=True)
        self._live = Live(console=self._console, transient=True, auto_refresh=False)
        self._artifact: UUID | None = None
        self._shown: list[Row] = []
        self._in_prefect: list[Row] = []
        self._last_table = self._last_line = -float("inf")

    def __enter__(self) -> "PartsTable":
        self._artifact, self._shown, self._in_prefect = None, [], []
        if self._console.is_terminal and not is_json():
            self._live.update("")  # otherwise it would show the previous set of parts first
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        doing("")

    def show(self, rows: Sequence[Row]) -> None:
        """Show the rows, and log what has changed since the last call.

        Args:
            rows: one row for each part, in the same order in every call.
        """
        before = self._shown or [Row(row.part, "", "", "", 0) for row in rows]
        for row, old in zip(rows, before, strict=True):
            if row.state != old.state or (row.host and row.host != old.host):
                self.say(f"{row.part}: {row.state}" + (f" on {row.host}" if row.host else ""))
        self._shown = list(rows)
        doing(f"waits for {_summary(rows)}")
        now = time.monotonic()
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self.say(_summary(rows))
        if self._live.is_started:
            self._live.update(_table(rows), refresh=True)
        done = all(row.state == "done" for row in rows)
        if self._in_prefect != self._shown and (done or now - self._last_table >= SECONDS_BETWEEN_TABLES):
            self._last_table, self._in_prefect = now, self._shown
            with going_on_without_prefect():
                self._update_prefect([asdict(row) for row in _listed(rows)], _summary(rows))

    def say(self, line: str, level: int = logging.INFO) -> None:
        """Write a line to the run's log and, unless the log goes there, to stderr."""
        self._last_line = time.monotonic()
        self._log.log(level, line)
        record = log_to_run(line, level=level)
        if is_on_stderr(self._log, level):
            return
        if self._console.is_terminal and not is_json():
            self._console.print(line)
        else:
            write_line(record)

    def _update_prefect(self, rows: list[dict[str, object]], summary: str) -> None:
        if self._artifact is None:
            artifact = create_table_artifact(key=KEY, table=rows, description=summary)
            assert isinstance(artifact, UUID), "a call from synchronous code returns the id"
            self._artifact = artifact
            return
        with get_client(sync_client=True) as client:
            client.update_artifact(self._artifact, ArtifactUpdate(data=json.dumps(rows), description=summary))


def _summary(rows: Sequence[Row]) -> str:
    counts = Counter(row.state for row in rows)
    parts = "1 part" if len(rows) == 1 else f"{len(rows)} parts"
    return f"{parts}: " + ", ".join(f"{count} {state}" for state, count in counts.items())


def _listed(rows: Sequence[Row]) -> Sequence[Row]:
    return rows if len(rows) <= LISTED else [row for row in rows if row.doing]


def _table(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption=_summary(rows))
    for name in ("part", "state", "doing", "host", "deaths"):
        table.add_column(name, justify="right" if name == "deaths" else "left")
    for row in _listed(rows):
        table.add_row(row.part, row.state, row.doing, row.host, str(row.deaths or ""))
    return table
