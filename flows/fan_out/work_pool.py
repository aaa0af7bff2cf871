"""A Prefect work pool as the place where the steps of a search run: whatever machines its workers have."""

from collections.abc import Collection
from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Scheduled

from layerwise.flows.fan_out.step import Step
from layerwise.flows.orchestration.cancellation import set_states
from layerwise.storage.files.credentials import without_secrets

FLOWS = ("capture", "branch", "evaluate")
HEARTBEAT = timedelta(seconds=30)  # between two of a worker's
# Seconds from being taken by a worker to Running: a machine may have to start, and load an image.
NEVER_BEGAN = 600.0
SUSPICIOUS = 120.0  # the same, if a worker has gone meanwhile; Prefect knows that after 90 s
QUEUED = 100  # flow runs sent to a pool at a time, at least


def require_server() -> None:
    """A pool's workers have to reach the server that the search reports to.

    Raises:
        ValueError: the embedded one, which only this process knows, would be used.
    """
    if not PREFECT_API_URL.value():
        raise ValueError(
            "a work pool needs a Prefect server that its workers reach, and none is set. Set PREFECT_API_URL, "
            "or leave fan_out at local, or set it to processes:N."
        )


class WorkPool:
    """The deployments of our flows on one work pool. See ``Place`` for the methods.

    Args:
        name: of the work pool.

    Attributes:
        workers: how many flow runs it takes at a time, as far as it can be known: its concurrency limit, or else the
            number of its workers that are online.

    Raises:
        ValueError: there is no such pool, it is paused, or it has no deployment of ours.
    """

    def __init__(self, client: SyncPrefectClient, name: str) -> None:
        self.name, self._client = name, client
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound as error:
            pools = sorted(pool.name for pool in client.read_work_pools())
            raise ValueError(
                f"the Prefect server at {without_secrets(str(client.api_url))} has no work pool {name!r}; it has "
                f"{pools or 'none'}. Make it: prefect work-pool create {name} --type process, or set PREFECT_API_URL "
                "to the server that has it."
            ) from error
        if pool.is_paused:
            raise ValueError(
                f"the work pool {name!r} is paused: no worker takes a flow run from it. Resume it: "
                f"prefect work-pool resume {name}"
            )
        self._deployments = {flow: self._deployment_of(client, flow) for flow in FLOWS}
        online = [worker for worker in client.read_workers_for_work_pool(name) if worker.status == "ONLINE"]
        self.workers = pool.concurrency_limit or max(len(online), 1)

    def has_room(self, active: int) -> bool:
        # Its queue gets more than it takes at a time, but not thousands: the parent asks for each one's state.
        return active < max(QUEUED, 2 * self.workers)

    def begin(self, step: Step, parent: UUID, tags: Collection[str], key: str) -> FlowRun:
        return self._client.create_flow_run_from_deployment(
            self._deployments[step.flow],
            parameters=dict(step.parameters),
            state=Scheduled(),
            name=step.run_name,
            tags=tags,
            idempotency_key=key,
            parent_task_run_id=parent,
        )

    def death_of(self, run: FlowRun, pending: float) -> str | None:
        if pending > NEVER_BEGAN:
            return f"it did not begin within {NEVER_BEGAN:.0f} s of being taken by a worker"
        assert run.state is not None, "a flow run has a state as soon as it is there"
        if pending > SUSPICIOUS and self._has_lost_a_worker(run.state.timestamp):
            return f"it did not begin within {SUSPICIOUS:.0f} s, and a worker has gone since"
        return None

    def end(self, run_id: UUID) -> None:
        """Nothing: it runs on another machine, if at all."""

    def cancel(self, runs: Collection[FlowRun]) -> None:
        # Not by force: Prefect's server makes it Cancelled then where no worker has taken it.
        set_states(self._client, runs, Cancelling(message="Its search was stopped."), force=False)

    def close(self) -> None:
        """Leave what runs: it goes on without its parent, and the next one takes it up."""

    def _has_lost_a_worker(self, since: datetime) -> bool:
        """Whether a worker that was there at ``since``, by the server's clock, is not there any more."""
        return any(
            worker.status == "OFFLINE"
            and worker.last_heartbeat_time
            and worker.last_heartbeat_time > since - HEARTBEAT
            for worker in self._client.read_workers_for_work_pool(self.name)
        )

    def _deployment_of(self, client: SyncPrefectClient, flow: str) -> UUID:
        found = client.read_deployments(
            flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])),
            work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[self.name])),
        )
        if not found:
            raise ValueError(
                f"there is no deployment of the flow {flow!r} on the work pool {self.name!r}. Deploy it: "
                f"LAYERWISE_WORK_POOL={self.name} prefect deploy --all --prefect-file deployments/prefect.yaml"
            )
        return min(found, key=lambda deployment: deployment.name).id
