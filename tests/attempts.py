"""Attempt: one search in a separate process, as on a separate machine, that can be killed at any moment.

Importing torch, transformers, Prefect and our own code takes seven seconds, longer than the small search. So one process
imports them once and is then forked for each attempt. An attempt has its own Prefect home, and sends its log lines
through a pipe, where they can be read even if the process is killed.
"""

import json
import logging
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORTED_ONCE = [
    "layerwise.flows.search",
    "layerwise.tasks.models.gguf_weights",  # imported with the first model
    "gguf",
    "prefect",
    "prefect.flow_engine",
    "prefect.task_engine",
    "pyarrow.parquet",
    "s3fs",
    "transformers.modeling_gguf_pytorch_utils",
    "transformers.models.llama.modeling_llama",
]
READY, RESULT = "ready", "result "
WORK_LIMIT = 1800.0  # seconds; the small search takes 5
LOGGED = {
    "layerwise.tasks": logging.DEBUG,
    "layerwise.storage": logging.DEBUG,
    "prefect.task_runs": logging.INFO,
}

processes = get_context("forkserver")
processes.set_forkserver_preload(IMPORTED_ONCE)


class Attempt:
    """A process that runs one search on request.

    Args:
        folder: a new folder for its Prefect home, its log and its errors.
        prefect_url: URL of the Prefect server.

    Attributes:
        lines: log lines since the start of the search, each with its time in seconds since then.
    """

    def __init__(self, folder: Path, prefect_url: str) -> None:
        home = folder / "prefect-home"
        home.mkdir(parents=True)
        self.folder, self.lines = folder, list[tuple[float, str]]()
        own = {"PREFECT_HOME": str(home), "PREFECT_API_URL": prefect_url, "OMP_NUM_THREADS": "1"}
        self._pipe, theirs = processes.Pipe()
        self._process = processes.Process(target=_work, args=(theirs, {**os.environ, **own}, str(folder)))
        self._process.start()
        theirs.close()  # otherwise the end of the process would not close the pipe
        self._began = time.monotonic()

    def begin(self, settings: dict, runtime: dict) -> None:
        """Wait until the process is ready, and start the search.

        Args:
            settings: settings of the search, as plain JSON.
            runtime: runtime options of the search, as plain JSON.
        """
        self.prepare()
        self.lines.clear()
        self._began = time.monotonic()
        self._pipe.send((settings, runtime))

    def prepare(self) -> None:
        """Wait until the process is ready.

        Raises:
            RuntimeError: the process has ended; the message contains its last errors.
        """
        said_before = any(line == READY for _, line in self.lines)
        if not said_before and not self.wait_for(lambda line: line == READY):
            raise RuntimeError(f"a process ended before it was ready: {self.errors()}")

    def wait_for(self, wanted: Callable[[str], bool]) -> bool:
        """Wait for a wanted line; return False if the process ends first.

        Raises:
            TimeoutError: neither happens within half an hour.
        """
        deadline = time.monotonic() + WORK_LIMIT
        while self._listen(deadline):
            if wanted(self.lines[-1][1]):
                return True
        if time.monotonic() >= deadline:
            raise TimeoutError(f"the process did not end within {WORK_LIMIT:.0f} s: {self.errors()}")
        return False

    def run_for(self, seconds: float) -> bool:
        """Wait for ``seconds``; return False if the process ends first."""
        deadline = time.monotonic() + seconds
        while self._listen(deadline):
            pass
        return time.monotonic() >= deadline

    def kill(self) -> bool:
        """Send SIGKILL to the process and its children; return False if the search had already ended."""
        if self._process.is_alive():
            assert self._process.pid is not None, "it was started"
            os.killpg(self._process.pid, signal.SIGKILL)
        return self.end() == -signal.SIGKILL and not self._results()

    def end(self) -> int:
        """Wait until the process has ended, and return its exit code. ``lines`` is then complete."""
        self.wait_for(lambda line: False)
        self._process.join()
        (self.folder / "log").write_text("".join(f"{at:8.3f} {line}\n" for at, line in self.lines))
        assert self._process.exitcode is not None, "it has ended"
        return self._process.exitcode

    def result(self) -> dict:
        """Wait until the process has ended, and return its result: built roles, verdict, contents by role.

        Raises:
            RuntimeError: the search failed; the message contains its last errors.
        """
        code = self.end()
        if code not in (0, -signal.SIGKILL) or not self._results():
            raise RuntimeError(
                f"a search ended with exit code {code}; its log: {self.folder}\n{self.errors()}"
            )
        return json.loads(self._results()[0])

    def errors(self) -> str:
        """Return the end of its standard error."""
        file = self.folder / "errors"
        return file.read_text(errors="replace")[-4000:] if file.exists() else "(no output)"

    def _results(self) -> list[str]:
        return [line.removeprefix(RESULT) for _, line in self.lines if line.startswith(RESULT)]

    def _listen(self, deadline: float) -> bool:
        """Receive the next line; return False if the deadline passes or the process ends."""
        if not self._pipe.poll(max(deadline - time.monotonic(), 0)):
            return False
        try:
            line = self._pipe.recv()
        except EOFError:
            return False
        self.lines.append((time.monotonic() - self._began, line))
        return True


class _Said(logging.Handler):
    """Log handler that sends every record through the pipe."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__()
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        task = getattr(record, "task_name", "-")
        self._pipe.send(f"{record.levelname} {record.name} {task} {record.getMessage()}")


def _work(pipe: Connection, environment: dict[str, str], folder: str) -> None:
    """Run the process of an attempt."""
    os.setsid()  # a process group of its own, so that its children are killed with it
    with open(f"{folder}/errors", "wb") as errors:
        for descriptor in (1, 2):
            os.dup2(errors.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    import layerwise.flows.search as ours
    from layerwise.flows.runtime import SearchRuntime
    from layerwise.flows.settings import Search

    assert Path(ours.__file__).is_relative_to(ROOT), f"{ours.__file__} is not in the tested checkout, {ROOT}"
    for name, level in LOGGED.items():
        logging.getLogger(name).addHandler(_Said(pipe))
        logging.getLogger(name).setLevel(level)
    pipe.send(READY)
    settings, runtime = pipe.recv()
    result = ours.search(Search(**settings), SearchRuntime(**runtime))
    found = {"built": result.built, "verdict": result.selection.verdict}
    contents = {role: artifact.content for role, artifact in result.stages.items()}
    pipe.send(RESULT + json.dumps({**found, "contents": contents}))
