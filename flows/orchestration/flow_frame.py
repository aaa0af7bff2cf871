"""Frame that every flow shares: SIGTERM, the sign of life in the store, cancellation."""

from collections.abc import Callable
from typing import TypeVar, cast

from prefect.exceptions import CancelledRun, TerminationSignal

from layerwise.flows.orchestration.cancellation import cancelled
from layerwise.storage.signs_of_life import announced
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running.stopping import stopping_on_sigterm

Result = TypeVar("Result")


def run_announced(store: ArtifactStore, title: str, work: Callable[[], Result]) -> Result:
    """Do the work of a flow run in ``store``.

    During the run the store shows a sign of life, and SIGTERM ends the run at its next resume point.

    Args:
        title: what the run does, for `layerwise status`.

    Returns:
        The result of ``work``. If the run was cancelled, Prefect's state for that, which the flow has to return.

    Raises:
        TerminationSignal: SIGTERM arrived, and the run was not cancelled.
    """
    with stopping_on_sigterm(), announced(store, title):
        try:
            return work()
        except (CancelledRun, TerminationSignal) as ending:
            return cast(Result, cancelled(ending))
