"""Real Prefect server in a separate process, which can be killed and restarted."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import httpx

from layerwise.flows.orchestration.embedded_server import PREFERENCES

# Seconds; it takes 6 on two cores, and 10 more with an empty home, to create the database.
START_LIMIT = 180.0
SEND_LIMIT = 10.0  # seconds to send the last events; sending would never end if the server no longer exists


def prefect_environment(home: Path, **changes: str) -> dict[str, str]:
    """Return the environment of a Prefect process that shares nothing with processes of other homes.

    Args:
        home: Prefect home of the process.
        changes: variables to change.
    """
    foreign = {name for name in os.environ if name.startswith("PREFECT_")}
    own = {name: value for name, value in os.environ.items() if name not in foreign}
    return own | PREFERENCES | {"PREFECT_HOME": str(home)} | changes


# Disables services that write to the database continuously, which takes half of the server's time. With several workers,
# they sometimes block SQLite for a minute: a task of the server waits for a lock held by another one. Few tests need them.
FEW_WRITES = {
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TRIGGERS_ENABLED": "false",
}


@contextmanager
def flows_of_this_process_use(server: "PrefectServer", home: Path) -> Iterator[None]:
    """Let flows of this process use ``server``.

    Prefect's events worker keeps the server that it began with. Without this, it would send the events of later tests to a
    server that no longer exists, and their own server would not learn of task runs.

    Args:
        home: Prefect home of this process.
    """
    from prefect.events.worker import EventsWorker
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        PREFECT_HOME,
        temporary_settings,
    )

    # The heartbeat would delay the end of every flow by a second.
    ours = {PREFECT_API_URL: server.url, PREFECT_HOME: home, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    EventsWorker.drain_all(timeout=SEND_LIMIT)
    with temporary_settings(ours):
        try:
            yield
        finally:
            EventsWorker.drain_all(timeout=SEND_LIMIT)


class PrefectServer:
    """A server with an SQLite database in ``home``.

    Args:
        home: Prefect home; its content is kept between starts.
        changes: settings of Prefect by environment variable.

    Attributes:
        port: port, the same after every start.
        start_seconds: duration of every start.
    """

    def __init__(self, home: Path, **changes: str) -> None:
        home.mkdir(parents=True, exist_ok=True)
        self.home, self.port = home, _free_port()
        self.start_seconds: list[float] = []
        self._environment = prefect_environment(home, PREFECT_SERVER_UI_ENABLED="false", **changes)
        self._process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        """Return the value for PREFECT_API_URL."""
        return f"http://127.0.0.1:{self.port}/api"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server and wait until it answers.

        Raises:
            RuntimeError: the server does not answer; the message contains the end of its log.
        """
        assert self._process is None, "the server is already running"
        began = time.monotonic()
        command = [sys.executable, "-m", "prefect", "server", "start"]
        command += ["--host", "127.0.0.1", "--port", str(self.port), "--analytics-off"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > began + START_LIMIT:
                last = self.log.read_text(errors="replace")[-3000:]
                raise RuntimeError(f"Prefect's server did not start. The end of its log:\n{last}")
            time.sleep(0.1)
        self.start_seconds.append(time.monotonic() - began)

    def kill(self) -> None:
        """Send SIGKILL to the server and all its processes."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Kill the server if it is running, and start it again."""
        self.kill()
        self.start()

    @property
    def log(self) -> Path:
        """Return the path of the log of all starts."""
        return self.home / "server.log"

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False


def _free_port() -> int:
    with socket.socket() as each:
        each.bind(("127.0.0.1", 0))
        return each.getsockname()[1]
