"""Real process workers of a Prefect work pool, each as on a machine of its own, that can die in every way there is."""

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Self

import psutil
import yaml
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.logging.configuration import DEFAULT_LOGGING_SETTINGS_PATH

from tests.prefect_server import prefect_environment

ROOT = Path(__file__).parents[1]
# Seconds; about six on two idle cores, and a minute more each time that the server's SQLite stands still.
START_LIMIT = 400.0
SAID = re.compile(r"(?P<at>\S+ \S+) (?P<pid>\d+) (?P<line>.*)")


@dataclass(frozen=True)
class Said:
    """A line that a flow run of a worker logged, also if it was killed right after it.

    Attributes:
        at: when, in seconds since 1970.
        pid: of the flow run's process, the run's ``infrastructure_pid``.
        line: as ``tests.work_log`` reads it.
    """

    at: float
    pid: int
    line: str


class Machine:
    """What processes of one machine have in common: a folder that only they know of, and that they die together.

    Args:
        folder: a new folder, for Prefect's home and all logs.
        prefect_url: the server they talk to.
        changes: more environment variables.
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
        """Start Python with ``arguments`` in a session of its own; its output goes to ``output``."""
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
        """What its processes have written to the terminal."""
        return self.folder / "output"

    def said(self) -> list[Said]:
        """What was logged about the work so far, by all processes, in order."""
        file = self.folder / "said"
        lines = file.read_text().splitlines() if file.exists() else []
        matches = [match for line in lines if (match := SAID.match(line))]
        return [
            Said(datetime.fromisoformat(each["at"]).timestamp(), int(each["pid"]), each["line"])
            for each in matches
        ]

    def wait_until_said(self, wanted: Callable[[str], bool], limit: float = 120.0) -> Said:
        """Wait until a flow run has said a wanted line, and return that; one it has said before counts.

        Raises:
            TimeoutError: none has in ``limit`` seconds; with the end of the output.
        """
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            for each in self.said():
                if wanted(each.line):
                    return each
            time.sleep(0.02)
        raise TimeoutError(f"not said in {limit:.0f} s. The end of the output:\n{self.last_output()}")

    def last_output(self) -> str:
        """The end of what its processes have written."""
        return self.output.read_text(errors="replace")[-4000:] if self.output.exists() else "nothing"

    def processes(self) -> Iterator[psutil.Process]:
        """All that run on it, in whatever session: they are known by their home."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):  # gone, a zombie, or somebody else's
                if process.environ().get("PREFECT_HOME") == str(self.home):
                    yield process

    def kill(self) -> None:
        """The machine dies: SIGKILL for all its processes at once, and no other is told."""
        # The oldest first: a worker that outlived its flow runs would report them.
        while alive := sorted(self.processes(), key=lambda process: process.create_time()):
            _kill(alive)


class Worker(Machine):
    """A process worker for one flow run at a time.

    Args:
        pool: the work pool it takes flow runs from.
        folder: as for a machine.
        prefect_url: as for a machine.
        changes: more environment variables, which the flow runs have as well.
    """

    def __init__(self, pool: str, folder: Path, prefect_url: str, **changes: str) -> None:
        quick = {"PREFECT_WORKER_QUERY_SECONDS": "2", "PREFECT_WORKER_PREFETCH_SECONDS": "1"}
        super().__init__(folder, prefect_url, **quick, **changes)
        self.pool, self.name = pool, folder.name
        self._worker: subprocess.Popen | None = None
        self._output_before = 0  # bytes that earlier workers in this folder have written

    @property
    def alive(self) -> bool:
        """Whether it was started, and neither stopped nor killed since."""
        return self._worker is not None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start it, again if it was stopped or killed; ``wait_until_ready`` says when it takes flow runs."""
        assert self._worker is None, f"worker {self.name} runs"
        self._output_before = len(self.output.read_bytes()) if self.output.exists() else 0
        options = ["--pool", self.pool, "--name", self.name, "--type", "process", "--limit", "1"]
        self._worker = self.run("-m", "prefect", "worker", "start", *options, "--install-policy", "never")

    def wait_until_ready(self) -> None:
        """Return when it asks the server for flow runs.

        Raises:
            RuntimeError: it does not; with the end of its output.
        """
        deadline = time.monotonic() + START_LIMIT
        assert self._worker is not None, f"worker {self.name} was started"
        started = f"Worker '{self.name}' started!".encode()
        while started not in self.output.read_bytes()[self._output_before :]:
            if self._worker.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"worker {self.name} did not start. Its output:\n{self.last_output()}")
            time.sleep(0.05)

    def kill(self) -> None:
        """The machine dies: SIGKILL for the worker and its flow runs."""
        super().kill()
        self._forget()

    def _forget(self) -> None:
        if self._worker is not None:
            self._worker.wait()
            self._worker = None


def create_pool(client: SyncPrefectClient, name: str) -> None:
    """A work pool for process workers."""
    client.create_work_pool(WorkPoolCreate(name=name, type="process"))


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=10)  # those that are not ours to wait for become init's


def _log_work(settings: Path, said: Path) -> None:
    """Let flow runs write what they do to a file at once: a line to the server may die with the process."""
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
