"""Evaluation of a search: test perplexity of the dense, the uniform and the best model."""

import json
from dataclasses import dataclass

from layerwise.scoring.perplexity import PairedDifference
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.results.lane_scores import LOSSES_FILE

TEST_FILE = "test.json"


@dataclass(frozen=True)
class TestResult:
    """Perplexity on the test windows.

    Attributes:
        gain: paired difference between the loss of the best plan and that of the uniform plan, in nats; None if the
            uniform plan is the best one.
    """

    __test__ = False  # not a test class for pytest

    windows: int
    dense: float
    uniform: float
    best: float
    gain: PairedDifference | None


def read_test(store: ArtifactStore, artifact: Artifact, folder: str = "") -> TestResult:
    """Read an artifact of ``evaluate``, or one evaluation of a group from its ``folder`` (ends with "/")."""
    document = json.loads(store.read(artifact, f"{folder}{TEST_FILE}"))
    return TestResult(**{**document, "gain": document["gain"] and PairedDifference(**document["gain"])})


def best_losses(store: ArtifactStore, artifact: Artifact) -> tuple[float, ...]:
    """Return the loss of the best plan on every test window, in nats."""
    lane = "best" if f"best/{LOSSES_FILE}" in artifact.files else "uniform"
    return tuple(read_table(store, artifact, f"{lane}/{LOSSES_FILE}")["loss"].to_pylist())
