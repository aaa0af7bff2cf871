"""Embedded Prefect server: it starts with the command, ends with it, and needs no setup."""

import atexit
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

from layerwise.display.byte_size import size_in
from layerwise.flows.orchestration.server_home import ServerHome, remove_old_homes
from layerwise.tasks.sources.user_cache import cache_folder

if TYPE_CHECKING:
    from prefect.settings import Settings

# Defaults of Prefect's settings; variables that the user has set take precedence.
PREFERENCES = {
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "120",  # the first start migrates its database: 30 s on two cores
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_CLOUD_ENABLE_ORCHESTRATION_TELEMETRY": "false",
    "PREFECT_TELEMETRY_ENABLE_RESOURCE_METRICS": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_RESULTS_PERSIST_BY_DEFAULT": "false",  # the store is the only cache
    "PREFECT_TASKS_DEFAULT_NO_CACHE": "true",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "layerwise",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
# Retries of a request to the embedded server: 14 s, enough for SQLite to release a lock. Prefect's default is a minute for
# each of the requests at the end of a run, too long if the server has ended.
RETRIES = "3"
END_LIMIT = 6.0  # seconds that the server has to end; it kills itself after 5
DATABASE_BYTES = 20_000_000  # a new database with its write-ahead log takes 12 MB
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Settings by which a user chooses a database.
DATABASE_SETTINGS = {"connection_url", "driver", "host", "name"}
EXCEPTION = re.compile(r"^[\w.]+(?:Error|Exception)\b.*", re.MULTILINE)  # last line of a traceback


def prefer_quiet_prefect() -> None:
    """Set Prefect's settings by environment variables. Must be called before Prefect is imported."""
    for name, value in PREFERENCES.items():
        os.environ.setdefault(name, value)
    _bypass_proxies_to_this_machine()


class ServerStart:
    """Start of the embedded server, or check of the configured one, in the background.

    Attributes:
        seconds: duration of the start; valid after ``wait``.
        embedded: whether the embedded server is used, and not a server that the user has configured by
            PREFECT_API_URL or a Prefect profile; valid after ``wait``.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.embedded = False
        self._error: BaseException | None = None
        self._thread = Thread(target=self._start, name="prefect-server-start", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ConnectionError: the configured server cannot be used, or the embedded one did not start.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _start(self) -> None:
        began = time.monotonic()
        try:
            from prefect.settings import get_current_settings

            from layerwise.flows.orchestration.server_check import check_server, refuse_unusable_proxies

            settings = get_current_settings()
            self.embedded = not settings.api.url
            refuse_unusable_proxies()
            if self.embedded:
                _start_embedded(settings)
            check_server()
        except BaseException as error:  # raised by ``wait`` in the thread that calls it
            self._error = in_one_line(error)
        self.seconds = time.monotonic() - began


def lifeline() -> tuple[int, ...]:
    """Return file descriptors to pass on to child processes that report to the embedded server.

    The server ends when the last process that holds them has ended. Empty if this process has not started a server.
    """
    return () if _process is None or _process.stdin is None else (_process.stdin.fileno(),)


def death_of_embedded_server() -> str | None:
    """Describe how the embedded server of this process has ended; None if it runs or was not started."""
    code = None if _process is None else _process.poll()
    return (
        None if code is None else f"Prefect's embedded server has ended (exit code {code}). {_log_advice()}"
    )


def home_of_server(settings: "Settings") -> tuple[Path, bool]:
    """Return the folder of the embedded server, and whether it is ours. Otherwise it belongs to the user."""
    from importlib.metadata import version

    own = not _user_has_chosen_a_database(settings)
    folder = cache_folder() / f"prefect-{version('prefect')}" if own else Path(settings.home).expanduser()
    return folder, own


def in_one_line(error: BaseException) -> BaseException:
    """Return ``error``; for settings that Prefect refuses, an error that names them without their values."""
    from pydantic import ValidationError

    if not isinstance(error, ValidationError):
        return error
    wrong = "; ".join(
        ": ".join(filter(None, [".".join(map(str, each["loc"])), each["msg"]])) for each in error.errors()
    )
    return ConnectionError(
        f"Prefect cannot read its settings ({wrong}). Correct the variables PREFECT_..., the active Prefect profile or "
        "prefect.toml."
    )


_process: subprocess.Popen | None = None
_log: Path | None = None


def _start_embedded(settings: "Settings") -> None:
    """Start the embedded server, and make the Prefect clients of this process use it.

    Prefect's own ``SubprocessASGIServer.start`` is not used: it repeats a failing start endlessly, leaves the server
    behind when this process is killed, and lets simultaneous first starts race in one database.

    Raises:
        ConnectionError: the server did not start.
    """
    from prefect.context import refresh_global_settings_context
    from prefect.server.api.server import SubprocessASGIServer

    if not settings.server.ephemeral.enabled:
        raise ConnectionError(
            "no Prefect server is configured, and the active Prefect profile does not allow the embedded one. Set "
            "PREFECT_API_URL to a server, or PREFECT_SERVER_EPHEMERAL_ENABLED=true."
        )
    server = SubprocessASGIServer()
    if server.running:  # Prefect has already started it for a flow of this process
        return
    folder, own = home_of_server(settings)
    limit = settings.server.ephemeral.startup_timeout_seconds
    try:
        with ServerHome(folder, own, limit) as home:
            server.port, server.server_process = _started(settings, home, limit, own)
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        raise ConnectionError(
            f"Prefect's embedded server cannot keep its database in {folder} ({error}). Set XDG_CACHE_HOME or "
            "PREFECT_HOME to a folder on a local disk that you can write, or PREFECT_API_URL to a running server."
        ) from error
    server.running = True
    atexit.register(_end_embedded)
    if "max_retries" not in settings.client.model_fields_set:
        os.environ["PREFECT_CLIENT_MAX_RETRIES"] = RETRIES
        refresh_global_settings_context()
    if own:
        remove_old_homes(folder)


def _end_embedded() -> None:
    """End the server, which ignores SIGTERM, and wait for its end."""
    assert _process is not None, "it was started"
    assert _process.stdin is not None, "it has a pipe"
    _process.stdin.close()
    try:
        _process.wait(END_LIMIT)
    except subprocess.TimeoutExpired:  # a child process still holds the pipe
        _process.kill()
        _process.wait()


def _user_has_chosen_a_database(settings: "Settings") -> bool:
    """Return whether PREFECT_HOME or a database is set: in the environment, a profile, or a file that Prefect reads."""
    return "home" in settings.model_fields_set or bool(
        DATABASE_SETTINGS & settings.server.database.model_fields_set
    )


def _started(settings: "Settings", home: ServerHome, limit: int, own: bool) -> tuple[int, subprocess.Popen]:
    """Start the server process, and wait until it answers.

    Args:
        limit: seconds after which the start has failed.
        own: whether the server keeps all its files in ``home``.

    Returns:
        The port and the process of the server.

    Raises:
        ConnectionError: the server does not start.
    """
    global _process, _log
    import httpx

    environment = os.environ | settings.to_environment_variables(exclude_unset=True)
    environment |= {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONSAFEPATH": "1"}
    if own:
        environment["PREFECT_HOME"] = str(home.folder)
        # These come from the user's home, not from this one.
        environment.pop("PREFECT_PROFILES_PATH", None)
        environment.pop("PREFECT_PROFILE", None)
    # Only this process uses the server, whatever authentication a server of the user requires.
    environment.pop("PREFECT_SERVER_API_AUTH_STRING", None)
    if settings.api.auth_string is not None:
        environment["PREFECT_SERVER_API_AUTH_STRING"] = settings.api.auth_string.get_secret_value()
    _log = home.log
    with socket.socket() as listening, home.log.open("ab") as log:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        before = log.tell()
        _process = process = subprocess.Popen(
            [sys.executable, "-m", "layerwise.flows.orchestration.server_process", str(listening.fileno())],
            env=environment,
            stdin=subprocess.PIPE,  # its end of file tells the server that this process has ended
            stdout=log,
            stderr=log,
            pass_fds=(listening.fileno(), *home.lock),
            # Ctrl-C at a terminal goes to all processes of a group. If the server ended as well, Prefect's client would
            # try for a minute to report the end of the run.
            start_new_session=True,
        )
    deadline = time.monotonic() + limit
    with httpx.Client(trust_env=False, timeout=5) as client:
        while True:
            try:
                if client.get(f"http://127.0.0.1:{port}/api/health").is_success:
                    return port, process
            except httpx.TransportError:
                pass
            if process.poll() is not None:
                raise ConnectionError(_why_it_ended(home, before, own))
            if time.monotonic() > deadline:
                process.kill()
                process.wait()
                raise ConnectionError(
                    f"Prefect's embedded server does not answer after {limit} s. Raise "
                    f"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS if this machine is slow. {_log_advice()}"
                )
            time.sleep(0.1)


def _why_it_ended(home: ServerHome, before: int, own: bool) -> str:
    """Explain why a server ended during its start, and what to do.

    Args:
        before: size of its log before the start, in bytes.
    """
    output = home.log.read_bytes()[before:].decode(errors="replace")
    reasons = EXCEPTION.findall(output) or output.splitlines()
    reason = reasons[-1].strip() if reasons else "without output"
    free = shutil.disk_usage(home.folder).free
    if free < DATABASE_BYTES:  # the log is empty then
        variable = "XDG_CACHE_HOME" if own else "PREFECT_HOME"
        advice = (
            f"The disk of {home.folder} has only {size_in('MB', free, 1)} left. Free "
            f"{size_in('MB', DATABASE_BYTES)}, or set {variable} to a folder on another disk."
        )
    elif "alembic" in output and "Can't locate revision" in output:
        advice = f"The database in {home.folder} belongs to another version of Prefect. " + (
            "Delete that folder."
            if own
            else "Unset PREFECT_HOME and the settings of Prefect's database, or set them to another place."
        )
    else:
        advice = _log_advice()
    return f"Prefect's embedded server did not start ({reason}). {advice}"


def _log_advice() -> str:
    return f"Its log is {_log}. Start the same command again, or set PREFECT_API_URL to a running server."


def _bypass_proxies_to_this_machine() -> None:
    """Add the names of this machine to NO_PROXY, for this process and its children, if a proxy is set."""
    names = {name.lower() for name, value in os.environ.items() if value}
    if not names & {"http_proxy", "https_proxy", "all_proxy"}:
        return
    # Programs that read both spellings prefer the lower-case one.
    for name in [name for name in ("no_proxy", "NO_PROXY") if name in os.environ] or ["NO_PROXY"]:
        hosts = [host.strip() for host in os.environ.get(name, "").split(",") if host.strip()]
        if "*" not in hosts:
            os.environ[name] = ",".join([*hosts, *(host for host in LOOPBACK if host not in hosts)])
