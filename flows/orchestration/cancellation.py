"""Cancellation of flow runs, and their states. Prefect's workers cancel a run by SIGTERM, like spot machines."""

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
    """Return whether the flow run of this process was cancelled; False if the server does not answer.

    Prefect would call the run crashed: its own handler of SIGTERM is replaced by ``layerwise.tasks.running.stopping``.
    """
    if flow_run.id is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            return client.read_flow_run(flow_run.id).state_type in CANCELLED
    except httpx.HTTPError:
        return False


def cancelled(ending: CancelledRun | TerminationSignal) -> State:
    """Return the state of a flow run that ended by ``ending``, if the run was cancelled.

    Prefect adopts a state that a flow returns as the state of the run, and raises it again where the flow was called.

    Raises:
        TerminationSignal: ``ending``, if the run was not cancelled.
    """
    if isinstance(ending, TerminationSignal) and not was_cancelled():
        raise ending
    return Cancelled(message=str(ending))


def set_states(client: SyncPrefectClient, runs: Iterable[FlowRun], state: State, force: bool = True) -> None:
    """Set the state of every run. Deleted runs are skipped.

    Args:
        force: set the state whatever the present one is; otherwise Prefect's rules decide.

    Raises:
        httpx.HTTPError: a request failed; the states of the other runs were set nevertheless.
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
