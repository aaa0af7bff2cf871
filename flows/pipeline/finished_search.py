"""A finished search, opened again for zero-shot tasks or a compressed checkpoint."""

from dataclasses import dataclass

from layerwise.flows.pipeline.artifact_lookup import asked_artifact
from layerwise.flows.pipeline.build import build
from layerwise.flows.pipeline.graph import Scored, export_lane, scoring_steps
from layerwise.flows.pipeline.inputs import check_inputs
from layerwise.flows.settings import Search
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.branch import LaneScore
from layerwise.tasks.import_checkpoint import open_exported
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.results.search_result import FinishedSearch, read_search
from layerwise.tasks.running.execution import Execution


@dataclass(frozen=True)
class Reopened:
    """A finished search and its lanes.

    Attributes:
        best: lane of the chosen plan; the uniform one if that was chosen.
    """

    search: FinishedSearch
    settings: Search
    scored: Scored
    best: LaneScore

    def exported(self, store: ArtifactStore, lane: LaneScore, execution: Execution) -> Artifact:
        """Return the checkpoint that the plan of ``lane`` gives; export it unless the search has."""
        return export_lane(store, self.scored, lane, execution)

    def checkpoint(self, store: ArtifactStore, lane: LaneScore, execution: Execution) -> Checkpoint:
        """Return the same, opened for reading."""
        return open_exported(store, self.exported(store, lane, execution))


def reopen(store: ArtifactStore, key: str | None, execution: Execution) -> Reopened:
    """Open a finished search, and build what is missing of its lanes.

    Args:
        key: key of the search, or the beginning of it; None for the newest search.

    Raises:
        KeyError: no artifact has that key, or several begin with it; or artifacts of the search are gone.
        ValueError: the artifact is not the result of a search.
    """
    search = read_search(store, asked_artifact(store, key))
    settings = Search.model_validate(search.settings)
    scored, _ = build(scoring_steps(store, settings, check_inputs(store, settings)), execution)
    return Reopened(search, settings, scored, scored.scores[search.selection.best])
