"""Real process workers of a Prefect work pool, each as on a separate machine, which can be killed."""

import contextlib
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import psutil
import yaml
from prefect import Flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.deployments.runner import RunnerDeployment
from prefect.flows import EntrypointType
from prefect.logging.configuration import DEFAULT_LOGGING_SETTINGS_PATH

from tests.prefect_server import prefect_environment

ROOT = Path(__file__).parents[1]
# Seconds; it takes about 6 on two idle cores, and a minute more each time the server's SQLite is blocked.
START_LIMIT = 400.0
SAID = re.compile(r"(?P<at>\S+ \S+) (?P<pid>\d+) (?P<line>.*)")


@dataclass(frozen=True)
class Said:
    """A line logged by a flow run of a worker, available even if the run was killed right after it.

    Attributes:
        at: time in seconds since 1970.
        pid: process id of the flow run, its ``infrastructure_pid``.
        line: text in the format that ``tests.work_log`` reads.
    """

    at: float
    pid: int
    line: str


class Machine:
    """Simulated machine: its processes share a private folder and are killed together.

    Args:
        folder: a new folder for the Prefect home and all logs.
        prefect_url: URL of the Prefect server.
        changes: additional environment variables.
    """

    def __init__(self, folder: Path, prefect_url: str, **changes: str) -> None:
        self.folder, self.home = folder, folder / "prefect-home"
        self.home.mkdir(parents=True)
        self.environment = prefect_environment(
            self.home,
            PREFECT_API_URL=prefect_url,
            PYTHONPATH=str(ROOT),
            OMP_NUM_THREADS="1",
            TMPDIR=str(folder),
            **changes,
        )
        _log_work(self.home / "logging.yml", self.folder / "said")

    def run(self, *arguments: str) -> subprocess.Popen:
        """Start Python with ``arguments`` in a new session, with its output in the file ``output``."""
        with self.output.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=self.environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    @property
    def output(self) -> Path:
        """Return the path of the file with the output of its processes."""
        return self.folder / "output"

    def said(self) -> list[Said]:
        """Return the lines logged by all processes so far, in order."""
        file = self.folder / "said"
        lines = file.read_text().splitlines() if file.exists() else []
        matches = [match for line in lines if (match := SAID.match(line))]
        return [
            Said(datetime.fromisoformat(each["at"]).timestamp(), int(each["pid"]), each["line"])
            for each in matches
        ]

    def wait_until_said(self, wanted: Callable[[str], bool], limit: float = 120.0) -> Said:
        """Wait for a wanted line of a flow run and return it; earlier lines count.

        Raises:
            TimeoutError: the line was not logged within ``limit`` seconds; the message contains the end of the output.
        """
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            for each in self.said():
                if wanted(each.line):
                    return each
            time.sleep(0.02)
        raise TimeoutError(
            f"the line was not logged within {limit:.0f} s. The end of the output:\n{self.last_output()}"
        )

    def last_output(self) -> str:
        """Return the end of the output of its processes."""
        return self.output.read_text(errors="replace")[-4000:] if self.output.exists() else "(no output)"

    def processes(self) -> Iterator[psutil.Process]:
        """Yield its running processes of all sessions, identified by their Prefect home."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # ended, a zombie, or of another user
                if process.environ().get("PREFECT_HOME") == str(self.home):
                    yield process

    def kill(self) -> None:
        """Send SIGKILL to all its processes at once, as if the machine failed."""
        # The oldest first, because a worker that outlives its flow runs would report them.
        while alive := sorted(self.processes(), key=lambda process: process.create_time()):
            _kill(alive)


class Worker(Machine):
    """A process worker for one flow run at a time.

    Args:
        pool: work pool of the worker.
        folder: a new folder for the Prefect home and all logs.
        prefect_url: URL of the Prefect server.
        changes: additional environment variables of the worker and its flow runs.
    """

    def __init__(self, pool: str, folder: Path, prefect_url: str, **changes: str) -> None:
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_WORKER_PREFETCH_SECONDS": "1"}
        super().__init__(folder, prefect_url, **quick, **changes)
        self.pool, self.name = pool, folder.name
        self._worker: subprocess.Popen | None = None
        self._output_before = 0  # bytes of output of earlier workers in this folder

    @property
    def alive(self) -> bool:
        """Return whether the worker was started and not killed since."""
        return self._worker is not None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the worker; it can be restarted after a kill. Use ``wait_until_ready`` to wait for it."""
        assert self._worker is None, f"worker {self.name} is already running"
        self._output_before = len(self.output.read_bytes()) if self.output.exists() else 0
        options = ["--pool", self.pool, "--name", self.name, "--type", "process", "--limit", "1"]
        self._worker = self.run("-m", "prefect", "worker", "start", *options, "--install-policy", "never")

    def wait_until_ready(self) -> None:
        """Wait until the worker asks the server for flow runs.

        Raises:
            RuntimeError: the worker did not start; the message contains the end of its output.
        """
        deadline = time.monotonic() + START_LIMIT
        assert self._worker is not None, f"worker {self.name} was not started"
        started = f"Worker '{self.name}' started!".encode()
        while started not in self.output.read_bytes()[self._output_before :]:
            if self._worker.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"worker {self.name} did not start. Its output:\n{self.last_output()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Send SIGKILL to the worker and its flow runs, as if the machine failed."""
        super().kill()
        self._forget()

    def _forget(self) -> None:
        if self._worker is not None:
            self._worker.wait()
            self._worker = None


def deploy(flow: Flow, pool: str | None, name: str, **options: Any) -> uuid.UUID:
    """Create a deployment whose workers import the flow by its module path, and return its id."""
    deployment = flow.to_deployment(
        name, entrypoint_type=EntrypointType.MODULE_PATH, work_pool_name=pool, **options
    )
    assert isinstance(deployment, RunnerDeployment), "outside of an event loop"
    made = deployment.apply()
    assert isinstance(made, uuid.UUID), "outside of an event loop"
    return made


def create_pool(client: SyncPrefectClient, name: str) -> None:
    """Create a work pool for process workers."""
    client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)  # children of other processes are reaped by init


def _log_work(settings: Path, said: Path) -> None:
    """Let flow runs write log lines to a file immediately; lines sent to the server can be lost with the process."""
    config = yaml.safe_load(DEFAULT_LOGGING_SETTINGS_PATH.read_text())
    config["formatters"]["work"] = {
        "()": "logging.Formatter",
        "fmt": "%(asctime)s.%(msecs)03d %(process)d %(levelname)s %(name)s %(task_name)s %(message)s",
        "datefmt": "%Y-%m-%d %H:%M:%S",
        "defaults": {"task_name": "-"},
    }
    config["handlers"]["work"] = {"class": "logging.FileHandler", "filename": str(said), "formatter": "work"}
    for name in ("layerwise.tasks", "layerwise.storage", "layerwise.flows"):
        config["loggers"][name] = {"level": "DEBUG", "handlers": ["work"]}
    config["loggers"]["prefect.task_runs"]["handlers"].append("work")
    settings.write_text(yaml.safe_dump(config))
