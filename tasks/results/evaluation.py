"""Evaluation of a search: test perplexity of the dense, the uniform and the best model."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from layerwise.scoring.perplexity import PairedDifference
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table
from layerwise.tasks.results.lane_scores import LOSSES_FILE

TEST_FILE = "test.json"
RECOVERY_FILE = "recovery.json"  # only with recovery


@dataclass(frozen=True)
class TestResult:
    """Perplexity on the test windows.

    Attributes:
        gain: paired difference between the loss of the best plan and that of the uniform plan, in nats; None if the
            uniform plan is the best one.
        kl: divergences from the dense model on the same windows; None if the criterion is perplexity.
        responses: perplexities of the responses alone; None for plain text, and in results of earlier versions.
    """

    __test__ = False  # not a test class for pytest

    windows: int
    dense: float
    uniform: float
    best: float
    gain: PairedDifference | None
    kl: "TestDivergence | None" = None
    responses: "TestResponses | None" = None

    @property
    def document(self) -> dict[str, Any]:
        """The result as plain JSON. Divergences and perplexities of responses are left out if they were not measured."""
        later = ("kl", "responses")
        return {name: value for name, value in asdict(self).items() if name not in later or value is not None}


@dataclass(frozen=True)
class TestDivergence:
    """Mean KL divergence from the dense model on the test windows, in nats.

    Attributes:
        gain: paired difference between the best plan and the uniform plan; None if the uniform plan is the best one.
    """

    __test__ = False

    uniform: float
    best: float
    gain: PairedDifference | None


@dataclass(frozen=True)
class TestResponses:
    """Perplexity of the tokens of responses in the test windows, all windows together.

    Attributes:
        tokens: number of these tokens.
    """

    __test__ = False

    tokens: int
    dense: float
    uniform: float
    best: float


@dataclass(frozen=True)
class TwoTexts:
    """Perplexity of one model on two texts.

    Attributes:
        test: on the test windows.
        calibration: on the calibration windows that were held out of the recovery: text like that it was fitted on.
    """

    test: float
    calibration: float


@dataclass(frozen=True)
class RecoveryTest:
    """Perplexities with and without recovery.

    Attributes:
        held_out_windows: number of windows of ``TwoTexts.calibration``.
        uniform, best: recovered models; equal if the uniform plan is the best one.
        uniform_before, best_before: the same plans, pruned and not recovered.
        gain: paired difference on the test windows between the best plan with and without recovery, in nats.
    """

    held_out_windows: int
    dense: TwoTexts
    uniform: TwoTexts
    best: TwoTexts
    uniform_before: TwoTexts
    best_before: TwoTexts
    gain: PairedDifference


def read_recovery(store: ArtifactStore, artifact: Artifact) -> RecoveryTest | None:
    """Read the comparison with and without recovery from an artifact of ``evaluate``; None without recovery."""
    if RECOVERY_FILE not in artifact.files:
        return None
    document = json.loads(store.read(artifact, RECOVERY_FILE))
    models = ("dense", "uniform", "best", "uniform_before", "best_before")
    texts = {name: TwoTexts(**document[name]) for name in models}
    return RecoveryTest(document["held_out_windows"], **texts, gain=PairedDifference(**document["gain"]))


def read_test(store: ArtifactStore, artifact: Artifact, folder: str = "") -> TestResult:
    """Read an artifact of ``evaluate``, or one evaluation of a group from its ``folder`` (ends with "/")."""
    document = json.loads(store.read(artifact, f"{folder}{TEST_FILE}"))
    kl, responses = document.pop("kl", None), document.pop("responses", None)
    divergence = None if kl is None else TestDivergence(**{**kl, "gain": _paired(kl["gain"])})
    of_responses = None if responses is None else TestResponses(**responses)
    gain = _paired(document.pop("gain"))
    return TestResult(**document, gain=gain, kl=divergence, responses=of_responses)


def _paired(document: dict[str, Any] | None) -> PairedDifference | None:
    return None if document is None else PairedDifference(**document)


def best_losses(store: ArtifactStore, artifact: Artifact) -> tuple[float, ...]:
    """Return the loss of the best plan on every test window, in nats."""
    lane = "best" if f"best/{LOSSES_FILE}" in artifact.files else "uniform"
    return tuple(read_table(store, artifact, f"{lane}/{LOSSES_FILE}")["loss"].to_pylist())
