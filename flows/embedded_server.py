"""Prefect for one person on one machine: its server starts by itself, in the background, and stays quiet."""

import os
import subprocess
import time
from functools import partial
from threading import Thread
from types import SimpleNamespace

# The user's own environment wins. Names and reasons: the notes on Prefect in README.md.
PREFERENCES = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # a first start migrates its database: 30 s on two cores
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",  # the store is the only cache
    "PREFECT_TASKS_DEFAULT_NO_CACHE": "true",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "flows,tasks,layerwise,storage",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}


def prefer_quiet_prefect() -> None:
    """Set Prefect's settings by environment variables; call before Prefect is imported."""
    for name, value in PREFERENCES.items():
        os.environ.setdefault(name, value)


class ServerStart:
    """Reaches the configured Prefect server, or starts the embedded one, in the background.

    Attributes:
        seconds: how long that took, once ``wait`` has returned.
        embedded: whether it is the embedded server, and none that the user has configured.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.embedded = True
        self._error: Exception | None = None
        self._thread = Thread(target=self._start, name="prefect-server-start", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the server answers.

        Raises:
            ConnectionError: it does not.
        """
        self._thread.join()
        if self._error is not None:
            raise ConnectionError(
                f"Prefect's server does not answer ({self._error}). Set PREFECT_API_URL to one that runs, or raise "
                "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS if this machine is slow."
            ) from self._error

    def _start(self) -> None:
        from prefect.client.base import ServerType
        from prefect.client.orchestration import get_client

        began = time.monotonic()
        try:
            _outlive_a_ctrl_c()
            with get_client(sync_client=True) as client:
                self.embedded = client.server_type == ServerType.EPHEMERAL
                self._error = client.api_healthcheck()
        except (RuntimeError, OSError) as error:
            self._error = error
        self.seconds = time.monotonic() - began


def _outlive_a_ctrl_c() -> None:
    """Start the embedded server in a session of its own.

    A Ctrl-C at a terminal goes to all processes of its group. A server that ends with it is asked for a minute how
    the run has ended: Prefect's client repeats what finds no server.
    """
    from prefect.server.api import server

    in_own_session = partial(subprocess.Popen, start_new_session=True)
    server.subprocess = SimpleNamespace(Popen=in_own_session, TimeoutExpired=subprocess.TimeoutExpired)  # type: ignore
