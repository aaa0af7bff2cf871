"""Executor that runs the parts of a search on the workers of a Prefect work pool."""

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowFilter, FlowFilterName, WorkPoolFilter, WorkPoolFilterName
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_API_URL
from prefect.states import Cancelling, Scheduled

from layerwise.flows.fan_out.part import Part
from layerwise.flows.orchestration.cancellation import set_states
from layerwise.storage.files.credentials import without_secrets

FLOWS = ("capture", "branch", "evaluate")
HEARTBEAT = timedelta(seconds=30)  # between two heartbeats of a worker
# Maximum seconds from Pending to Running: a machine may have to start first, and load an image.
START_LIMIT = 600.0
# The same if a worker went offline meanwhile, which Prefect knows after 90 s.
START_LIMIT_AFTER_LOSS = 120.0
QUEUED = 100  # number of flow runs that a pool gets at a time, if it does not run more


def require_server() -> None:
    """Refuse a work pool without a configured Prefect server.

    Raises:
        ValueError: PREFECT_API_URL is not set. The embedded server is not reachable for the pool's workers.
    """
    if not PREFECT_API_URL.value():
        raise ValueError(
            "a work pool needs a Prefect server that its workers reach, but none is set. Set PREFECT_API_URL, "
            "or set fan_out to local or processes:N."
        )


class WorkPool:
    """Workers of a Prefect work pool. Implements ``Executor``.

    Args:
        name: name of the work pool.

    Attributes:
        workers: number of flow runs that the pool runs at a time: its concurrency limit, or without one the number of
            its workers that are online.

    Raises:
        ValueError: the pool does not exist, is paused, or lacks a deployment of a part's flow.
    """

    def __init__(self, client: SyncPrefectClient, name: str) -> None:
        self.name, self._client = name, client
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound as error:
            pools = sorted(pool.name for pool in client.read_work_pools())
            raise ValueError(
                f"the Prefect server at {without_secrets(str(client.api_url))} has no work pool {name!r}; it has "
                f"{pools or 'none'}. Create it: prefect work-pool create {name} --type process, or set PREFECT_API_URL "
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
        # More than run at a time, so that workers never wait; but not thousands, as each one's state is polled.
        return active < max(QUEUED, 2 * self.workers)

    def taken(self, flow: str) -> list[Mapping[str, object]]:
        return []

    def start(self, part: Part, parent: UUID, tags: Collection[str], key: str) -> FlowRun:
        return self._client.create_flow_run_from_deployment(
            self._deployments[part.flow],
            parameters=dict(part.parameters),
            state=Scheduled(),
            name=part.run_name,
            tags=tags,
            idempotency_key=key,
            parent_task_run_id=parent,
        )

    def update(self, runs: Collection[FlowRun]) -> None:
        """Do nothing: the flow runs report to Prefect's server."""

    def sign_of(self, run: FlowRun) -> str | None:
        return run.id.hex

    def cause_of_death(self, run: FlowRun, pending: float) -> str | None:
        if pending > START_LIMIT:
            return f"it did not start within {START_LIMIT:.0f} s after a worker took it"
        assert run.state is not None, "a flow run has a state from its creation"
        if pending > START_LIMIT_AFTER_LOSS and self._has_lost_a_worker(run.state.timestamp):
            return (
                f"it did not start within {START_LIMIT_AFTER_LOSS:.0f} s, and a worker has gone offline since"
            )
        return None

    def kill(self, run_id: UUID) -> None:
        """Do nothing: the run, if it still exists, is on another machine."""

    def cancel(self, runs: Collection[FlowRun]) -> None:
        # Without force, Prefect's server sets a run that no worker has taken to Cancelled at once.
        set_states(self._client, runs, Cancelling(message="Its search was stopped."), force=False)

    def close(self) -> None:
        """Do nothing: running parts continue without the search, and the next run of the search waits for them."""

    def _has_lost_a_worker(self, since: datetime) -> bool:
        """Return whether a worker went offline that was online at ``since``, by the server's clock."""
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
