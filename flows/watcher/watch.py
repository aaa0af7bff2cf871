"""Watch: start a search for every new checkpoint under a prefix, or for every new commit of a hub model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from pydantic import Field, ValidationError

from layerwise.flows.setting_types import BareUrl
from layerwise.flows.settings import Search
from layerwise.flows.watcher.started_searches import look_at, start_once
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.pages.markdown import plain
from layerwise.tasks.running.printable import printable
from layerwise.tasks.running.progress import going_on_without_prefect
from layerwise.tasks.sources.watched_checkpoints import Incomplete, WatchedCheckpoint, watched_checkpoints

DEPLOYMENT = "search/search"
PAGE = 200  # maximum number of flow runs in one answer of the server


@dataclass(frozen=True)
class Row:
    """A checkpoint in the table of a look.

    Attributes:
        run: flow run of its search; None if it has none.
    """

    checkpoint: str
    state: str
    detail: str
    run: UUID | None = None

    def shown(self, states: Mapping[UUID, State]) -> dict[str, str]:
        """Return the row as text, with the state of its flow run."""
        state = None if self.run is None else states.get(self.run)
        name, detail = (self.state, self.detail) if state is None else (state.name, state.message)
        return {"checkpoint": printable(self.checkpoint), "state": name or "", "detail": detail or ""}


class Watch(Search):
    """Prune every new checkpoint under a prefix, or every new commit of a hub model, by a search with these settings."""

    model: BareUrl = Field(
        title="What to watch",
        description="What to watch: a folder or fsspec URL (s3://bucket/prefix), for all checkpoints in it and below it; or a "
        "hub id (owner/name[@branch]), for new commits.",
    )

    def search_for(self, model: str) -> Search:
        """Return the search for one checkpoint."""
        return Search.model_validate(self.model_dump(mode="json") | {"model": model})


@flow(name="watch", flow_run_name="watch {settings.model}", persist_result=False)
def watch(settings: Watch, store: BareUrl) -> None:
    """Look once for checkpoints, and start the deployment search/search for those that are new.

    A checkpoint is searched if it is complete and two looks in a row found it unchanged. Its search is started once for its
    content and these settings, whether it succeeds or not; the store records this.

    Args:
        settings: What to watch, and the settings of the searches.
        store: Folder or fsspec URL (s3://bucket/prefix) of the store, without credentials. The searches use the store of
            their own deployment, which should be the same.

    Raises:
        ValueError: What to watch cannot be watched, or there is no deployment search/search.
        OSError: The watched prefix, the hub or the store cannot be reached.
    """
    opened = ArtifactStore(store)
    checkpoints = watched_checkpoints(settings.model, opened)
    with get_client(sync_client=True) as client:
        deployment = _deployment(client)
        rows = [_look(opened, client, deployment, settings, checkpoint) for checkpoint in checkpoints]
        states = _states_of(client, [row.run for row in rows if row.run is not None])
    shown = [row.shown(states) for row in rows]
    for line in shown:
        get_run_logger().info(": ".join(value for value in line.values() if value))
    with going_on_without_prefect():
        create_table_artifact(
            key="watched-checkpoints",
            table=[{name: plain(value) for name, value in line.items()} for line in shown],
            description=plain(f"Checkpoints in {settings.model}"),
        )


def _look(
    store: ArtifactStore,
    client: SyncPrefectClient,
    deployment: DeploymentResponse,
    settings: Watch,
    checkpoint: WatchedCheckpoint,
) -> Row:
    """Look at one checkpoint, and start its search if it is due."""
    try:
        search = settings.search_for(checkpoint.model)
    except ValidationError as error:  # such as "#" in a URL, or bytes that are not UTF-8
        problem = error.errors()[0]["msg"]
        return Row(
            checkpoint.model, "not searched", f"rename it: its name cannot be that of a model ({problem})"
        )
    try:
        sight = look_at(store, checkpoint)
    except Incomplete as error:
        return Row(checkpoint.model, "not complete", str(error))
    if not sight.settled:
        return Row(checkpoint.model, "new", "is searched if the next look finds it unchanged")
    run, is_new = start_once(store, client, deployment, search, sight)
    if is_new:
        get_run_logger().info("started a search for %s", checkpoint.model)
    return Row(checkpoint.model, "started", "its flow run is no longer on this server", run)


def _deployment(client: SyncPrefectClient) -> DeploymentResponse:
    try:
        return client.read_deployment_by_name(DEPLOYMENT)
    except ObjectNotFound as error:
        raise ValueError(
            f"Prefect's server has no deployment {DEPLOYMENT}, which runs the searches. Deploy it: prefect deploy --all "
            "--prefect-file deployments/prefect.yaml"
        ) from error


def _states_of(client: SyncPrefectClient, runs: Sequence[UUID]) -> dict[UUID, State]:
    """Return the states of those flow runs that the server still has."""
    found: dict[UUID, State] = {}
    for start in range(0, len(runs), PAGE):
        some = FlowRunFilter(id=FlowRunFilterId(any_=list(runs[start : start + PAGE])))
        for run in client.read_flow_runs(flow_run_filter=some, limit=PAGE):
            assert run.state is not None, "a flow run has a state from its creation"
            found[run.id] = run.state
    return found
