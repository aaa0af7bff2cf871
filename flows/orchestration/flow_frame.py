"""Frame that every flow shares: SIGTERM, the sign of life in the store, cancellation."""

from collections.abc import Callable
from typing import TypeVar, cast

from prefect.exceptions import CancelledRun, TerminationSignal
from prefect.runtime import flow_run

from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.storage.signs_of_life import announced
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running.stopping import stopping_on_sigterm

Result = TypeVar("Result")


def run_announced(store: ArtifactStore, title: str, work: Callable[[], Result], role: str = "") -> Result:
    """Do the work of a flow run in ``store``.

    During the run the store shows a sign of life under the flow run's id, and SIGTERM ends the run at its next resume
    point.

    Args:
        title: what the run does, for `layerwise status`.
        role: role of the process, see ``RunningProcess``.

    Returns:
        The result of ``work``. If the run was cancelled, Prefect's state for that, which the flow has to return.

    Raises:
        TerminationSignal: SIGTERM arrived, and the run was not cancelled.
    """
    name = None if flow_run.id is None else flow_run.id.replace("-", "")
    with stopping_on_sigterm(), announced(store, title, name, role):
        try:
            return work()
        except (CancelledRun, TerminationSignal) as ending:
            return cast(Result, cancelled(ending))
