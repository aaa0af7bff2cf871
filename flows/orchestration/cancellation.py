"""Cancellation: a worker sends SIGTERM to a run that was cancelled, as does a machine that will be taken away."""

from collections.abc import Iterable
from contextlib import suppress

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import CancelledRun, ObjectNotFound, TerminationSignal
from prefect.runtime import flow_run
from prefect.states import Cancelled, State

CANCELLED = (StateType.CANCELLING, StateType.CANCELLED)


def was_cancelled() -> bool:
    """Whether somebody has cancelled the flow run that this process is; False if the server does not answer.

    Prefect itself would know only if SIGTERM came to its own handler (``layerwise.tasks.running.stopping`` is in its place), and call
    the run crashed.
    """
    if flow_run.id is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(flow_run.id).state_type in CANCELLED
    except httpx.HTTPError:
        return False


def cancelled(ending: CancelledRun | TerminationSignal) -> State:
    """The state of a run that ended like this, if it was cancelled.

    Prefect takes a state that a flow returns for the run's own, and raises it again where the flow was called.

    Raises:
        TerminationSignal: it was not; this is ``ending``.
    """
    if isinstance(ending, TerminationSignal) and not was_cancelled():
        raise ending
    return Cancelled(message=str(ending))


def set_states(client: SyncPrefectClient, runs: Iterable[FlowRun], state: State, force: bool = True) -> None:
    """Set every run's state; a run that was deleted has none.

    Args:
        force: whatever its state was; else as far as Prefect's rules allow it.

    Raises:
        httpx.HTTPError: the server did not take it for one of them; the others were tried all the same.
    """
    problem: httpx.HTTPError | None = None
    for run in runs:
        try:
            with suppress(ObjectNotFound):
                client.set_flow_run_state(run.id, state, force=force)
        except httpx.HTTPError as error:
            problem = error
    if problem is not None:
        raise problem
