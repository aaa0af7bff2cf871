"""A finished search, opened again for what comes after it: zero-shot tasks, a compressed checkpoint."""

from dataclasses import dataclass

from layerwise.flows.pipeline.artifact_lookup import asked_artifact
from layerwise.flows.pipeline.stages import Captured, all_scored
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.export import export
from layerwise.tasks.import_checkpoint import open_exported
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.results.search_result import FinishedSearch, read_search
from layerwise.tasks.running.execution import Execution


@dataclass(frozen=True)
class Reopened:
    """What a search has left, and what its stages read.

    Attributes:
        uniform: the lane of the uniform plan.
        best: the lane of the plan that was chosen; the same one if that is the uniform plan.
    """

    search: FinishedSearch
    settings: Search
    captured: Captured
    uniform: LaneScore
    best: LaneScore

    def exported(self, store: ArtifactStore, lane: LaneScore, execution: Execution) -> Artifact:
        """The checkpoint that ``lane`` gives; made if the search has not exported it."""
        before = self.captured
        inputs = before.inputs("selection")
        return export(store, inputs, lane, self.uniform, before.linears, before.pruning, execution)

    def checkpoint(self, store: ArtifactStore, lane: LaneScore, execution: Execution) -> Checkpoint:
        """The same, opened for reading."""
        return open_exported(store, self.exported(store, lane, execution))


def reopen(store: ArtifactStore, key: str | None, execution: Execution) -> Reopened:
    """Open a finished search; what is missing of it is built.

    Args:
        key: of the search, or its beginning; None for the newest one.

    Raises:
        KeyError: no artifact has that key, or several begin with it; or the search's own artifacts are gone.
        ValueError: the artifact is not that of a search.
    """
    search = read_search(store, asked_artifact(store, key))
    settings = Search.model_validate(search.settings)
    before, scores = all_scored(store, settings, execution)
    return Reopened(search, settings, before, scores[0], scores[search.selection.best])
