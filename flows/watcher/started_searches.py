"""Records of the watcher in the store: states of checkpoints that it saw, and searches that it started."""

from dataclasses import dataclass
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.responses import DeploymentResponse
from prefect.states import Scheduled

from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.sources.watched_checkpoints import WatchedCheckpoint

SEEN_STAGE, STARTED_STAGE = "watch_seen", "watch"
CONTENT, FLOW_RUN = "content", "flow run"


@dataclass(frozen=True)
class Sight:
    """A complete checkpoint, as a look found it.

    Attributes:
        record: artifact of the first look that found these files, with these sizes and versions.
        settled: the first look was an earlier one.
    """

    record: Artifact
    settled: bool

    @property
    def content(self) -> str:
        """Digest of the content of the checkpoint."""
        return str(self.record.facts[CONTENT])


def look_at(store: ArtifactStore, checkpoint: WatchedCheckpoint) -> Sight:
    """Check that a checkpoint is complete, and record its state. A state that was recorded before is not checked again.

    Raises:
        Incomplete: a file is missing, truncated or damaged, or changes.
        OSError: the storage cannot be reached.
    """
    stage = Stage(SEEN_STAGE, 1, {"files": checkpoint.state})
    if seen := store.find(stage):
        return Sight(seen, settled=True)
    content = checkpoint.content()

    def build(draft: Draft) -> None:
        draft.facts |= {CONTENT: content, "model": checkpoint.model}

    return Sight(store.get_or_build(stage, build), settled=False)


def started_stage(search: Search, content: str) -> Stage:
    """Describe the record of a search that was started for a checkpoint; its key does not depend on the checkpoint's name."""
    settings = {name: value for name, value in search.model_dump(mode="json").items() if name != "model"}
    return Stage(STARTED_STAGE, 1, settings, {"checkpoint": content})


def start_once(
    store: ArtifactStore,
    client: SyncPrefectClient,
    deployment: DeploymentResponse,
    search: Search,
    sight: Sight,
) -> tuple[UUID, bool]:
    """Start a search, unless it has been started for a checkpoint with the content of this one.

    Returns:
        The id of its flow run, and whether it was started now.
    """
    stage = started_stage(search, sight.content)
    if started := store.find(stage):
        return UUID(str(started.facts[FLOW_RUN])), False
    run = client.create_flow_run_from_deployment(
        deployment.id,
        parameters={"settings": search.model_dump(mode="json")},
        state=Scheduled(),
        name=search.title,
        tags=["layerwise", "watch"],
        # If this process dies before the record, the next look gets the same run. The token is that of this store only.
        idempotency_key=f"{stage.key}-{sight.record.token}",
    )

    def build(draft: Draft) -> None:
        draft.facts |= {FLOW_RUN: str(run.id), "model": search.model}

    return UUID(str(store.get_or_build(stage, build).facts[FLOW_RUN])), True
