"""The result of a search, as the store holds it: what was asked for, what was chosen, and every artifact of it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.evaluate import TestResult, read_test
from layerwise.tasks.results.roles import EVALUATE, SELECT, lane_role
from layerwise.tasks.select import ScoreRow, Selection, read_selection

RESULT_FILE = "result.json"
RESULT_STAGE = "search"
VERSIONS = "versions"  # a fact of the artifact: of the packages of the process that finished the search


@dataclass(frozen=True)
class FinishedSearch:
    """What a search has left in the store.

    Attributes:
        artifact: the search's own.
        settings: as plain JSON, by the names of the settings' fields.
        source: the model, as it was imported.
        stages: every artifact of the search by role.
    """

    artifact: Artifact
    settings: Mapping[str, Any]
    source: str
    selection: Selection
    test: TestResult
    stages: Mapping[str, Artifact]

    def lane(self, row: ScoreRow) -> Artifact:
        """The artifact of the lane that this row of the result is about."""
        return self.stages[lane_role(row.beta, row.offset)]


def read_search(store: ArtifactStore, artifact: Artifact) -> FinishedSearch:
    """What a search has left.

    Raises:
        ValueError: ``artifact`` is not that of a search.
        KeyError: an artifact of the search is not in the store any more.
    """
    if artifact.recipe.get("name") != RESULT_STAGE:
        raise ValueError(
            f"{artifact.key} is not the result of a search. Name a search: `layerwise ls` lists them as search/..."
        )
    document = json.loads(store.read(artifact, RESULT_FILE))
    try:
        stages = {role: store.get(key) for role, key in document["stages"].items()}
    except KeyError as error:
        raise KeyError(
            f"an artifact that {artifact.key} was made of is gone, perhaps by `layerwise gc --results-only` "
            f"({error.args[0]}). Run the search again: it builds what is missing."
        ) from error
    return FinishedSearch(
        artifact,
        document["settings"],
        document["source"],
        read_selection(store, stages[SELECT]),
        read_test(store, stages[EVALUATE]),
        stages,
    )
