"""Frame that every flow shares: SIGTERM, the sign of life and the log in the store, cancellation."""

import os
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import TypeVar, cast

from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.runtime import flow_run

from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.storage.artifact import Artifact
from layerwise.storage.runs.run_log import RunLog, logged
from layerwise.storage.runs.run_record import FAILED, FINISHED, INTERRUPTED, RUNNING
from layerwise.storage.signs_of_life import announced
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running.log_lines import logging_to
from layerwise.tasks.running.stopping import stopping_on_sigterm

Result = TypeVar("Result")


def run_announced(
    store: ArtifactStore,
    title: str,
    work: Callable[[], Result],
    search: str = "",
    command: str = "",
    artifact_of: Callable[[Result], object] = lambda result: result,
    role: str = "",
) -> Result:
    """Do the work of a flow run in ``store``.

    During the run the store shows a sign of life under the flow run's id and gets a log, and SIGTERM ends the run at its
    next resume point.

    Args:
        title: what the run does, for `layerwise status`.
        search: digest of the settings of a search, the same in all of its runs.
        command: command that repeats or resumes the run.
        artifact_of: returns the artifact that the run ended with: the log is kept as long as this artifact.
        role: role of the process, see ``RunningProcess``.

    Returns:
        The result of ``work``. If the run was cancelled, Prefect's state for that, which the flow has to return.

    Raises:
        TerminationSignal: SIGTERM arrived, and the run was not cancelled.
    """
    name = None if flow_run.id is None else flow_run.id.replace("-", "")
    about = {"search": search, "command": command}
    try:
        with stopping_on_sigterm(), recorded(store, title, name, role, **about) as log:
            result = work()
            artifact = artifact_of(result)
            log.describe(result=artifact.key if isinstance(artifact, Artifact) else "")
            return result
    except (CancelledRun, TerminationSignal) as ending:
        return cast(Result, cancelled(ending))


@contextmanager
def recorded(
    store: ArtifactStore, title: str, name: str | None = None, role: str = "", **about: str
) -> Iterator[RunLog]:
    """Show a sign of life of a run, and keep its log in the store, until the block ends.

    Args:
        name: under which other processes look for this one, 32 hex digits; None if they do not.
        role: role of the process, see ``RunningProcess``.
        about: more facts on the run for its log.
    """
    name = name or uuid.uuid4().hex
    facts = {"title": title, "state": RUNNING, "host": socket.gethostname(), "pid": os.getpid()}
    facts |= {"folder": os.getcwd(), "version": version("layerwise-pruning"), **about}
    with announced(store, title, name, role), logged(store, name, facts) as log:
        try:
            with logging_to(log):
                yield log
        except BaseException as error:
            stopped = isinstance(error, CancelledRun | TerminationSignal | KeyboardInterrupt)
            problem = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            log.describe(state=INTERRUPTED if stopped else FAILED, error=problem)
            raise
        log.describe(state=FINISHED)
