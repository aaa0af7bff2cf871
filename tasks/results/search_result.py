"""Result of a search in the store: its settings, its selection, its evaluation and all of its artifacts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.evaluation import RecoveryTest, TestResult, read_recovery, read_test
from layerwise.tasks.results.roles import EVALUATE, SELECT, lane_role
from layerwise.tasks.results.selection import ScoreRow, Selection, read_selection

RESULT_FILE = "result.json"
RESULT_STAGE = "search"
VERSIONS = "versions"  # fact of the artifact: package versions in the process that finished the search


@dataclass(frozen=True)
class FinishedSearch:
    """A finished search, as read from the store.

    Attributes:
        artifact: the artifact of the search itself.
        settings: plain JSON, by the names of the settings' fields.
        source: the model, as it was imported.
        recovery: perplexities with and without recovery; None if the search does not recover.
        recovery_text: sentences on the recovery; "" if the search does not recover.
        stages: all artifacts of the search by role.
        experts: calibration tokens of the experts by layer, see ``statistics_table.expert_rows``; empty for most models.
        experts_text: sentences on them.
    """

    artifact: Artifact
    settings: Mapping[str, Any]
    source: str
    selection: Selection
    test: TestResult
    stages: Mapping[str, Artifact]
    recovery: RecoveryTest | None = None
    recovery_text: str = ""
    experts: Sequence[Mapping[str, Any]] = ()
    experts_text: str = ""

    def lane(self, row: ScoreRow) -> Artifact:
        """Return the artifact of the lane of a row."""
        return self.stages[lane_role(row.beta, row.offset)]


def read_search(store: ArtifactStore, artifact: Artifact) -> FinishedSearch:
    """Read the result of a search and find its artifacts.

    Raises:
        ValueError: ``artifact`` is not the artifact of a search.
        KeyError: an artifact of the search is no longer in the store.
    """
    if artifact.recipe.get("name") != RESULT_STAGE:
        raise ValueError(
            f"{artifact.key} is not the result of a search. Give the key of a search: `layerwise ls` lists them as "
            "search/..."
        )
    document = json.loads(store.read(artifact, RESULT_FILE))
    try:
        stages = {role: store.get(key) for role, key in document["stages"].items()}
    except KeyError as error:
        raise KeyError(
            f"an artifact of {artifact.key} is missing ({error.args[0]}); `layerwise gc --results-only` may have deleted "
            "it. Run the search again to rebuild it."
        ) from error
    return FinishedSearch(
        artifact,
        document["settings"],
        document["source"],
        read_selection(store, stages[SELECT]),
        read_test(store, stages[EVALUATE]),
        stages,
        read_recovery(store, stages[EVALUATE]),
        document.get("recovery", {}).get("text", ""),
        document.get("experts", {}).get("layers", ()),
        document.get("experts", {}).get("text", ""),
    )
