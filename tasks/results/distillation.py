"""Result of a distillation: perplexities before and after it, next to the dense model."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from layerwise.scoring.perplexity import format_perplexity
from layerwise.storage.artifact import Artifact, newest_from
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.roles import EVALUATE

DISTILL_STAGE = "distill"
DISTILLATION_FILE = "distillation.json"


@dataclass(frozen=True)
class DistilledRow:
    """One model of the comparison.

    Attributes:
        model: "dense", "pruned" or "distilled".
        test: perplexity on the test text.
        held_out: perplexity on windows of the calibration text that were not trained on.
        zeros: number of zeros in the pruned linears.
    """

    model: str
    test: float
    held_out: float
    zeros: int


@dataclass(frozen=True)
class HeldOutLoss:
    """Evaluation of the student on the held-out windows.

    Attributes:
        step: number of steps before it.
        kl: divergence from the dense model, in nats per token.
        perplexity: perplexity of the held-out text.
    """

    step: int
    kl: float
    perplexity: float


@dataclass(frozen=True)
class Distillation:
    """Settings and result of a distillation.

    Attributes:
        calibration: label of the text that was trained on.
        windows: number of windows that were trained on.
        steps: number of steps that were done; fewer than requested after an early stop.
        best_step: step whose weights were kept.
        tokens: tokens that were trained on, including repetitions.
        evaluations: evaluations on the held-out windows, in order.
        rows: dense, pruned and distilled model.
    """

    calibration: str
    windows: int
    held_out_windows: int
    test_windows: int
    seqlen: int
    steps: int
    best_step: int
    batch: int
    tokens: int
    learning_rate: float
    evaluations: tuple[HeldOutLoss, ...]
    rows: tuple[DistilledRow, ...]

    def to_json(self) -> bytes:
        """Return the content of ``DISTILLATION_FILE``."""
        return json.dumps(asdict(self), indent=1).encode()

    @property
    def sentence(self) -> str:
        """Describe the training."""
        stop = "" if self.best_step == self.steps else f" The weights after step {self.best_step} were best."
        return (
            f"The weights that pruning kept were trained towards the output of the dense model: {self.steps} steps of "
            f"{self.batch} window{'s' * (self.batch != 1)}, {self.tokens} tokens in all, from {self.windows} windows of {self.seqlen} tokens "
            f"of the calibration text ({self.calibration}), relative learning rate {self.learning_rate:g}. "
            f"Pruned weights stayed zero.{stop}"
        )


def newest_distilled(artifacts: Iterable[Artifact], tested: Artifact) -> Artifact | None:
    """Return the newest distilled model of a search; None if the search has none.

    A distilled model belongs to the searches whose test it is compared with: their plan and their test windows are the same.

    Args:
        artifacts: artifacts of the store.
        tested: artifact of ``evaluate`` of the search.
    """
    return newest_from(artifacts, DISTILL_STAGE, EVALUATE, tested)


def chosen_distilled(store: ArtifactStore, key: str) -> Artifact:
    """Return a distilled model that was chosen earlier in this run.

    Raises:
        ValueError: it is gone, for example because it was damaged and set aside.
    """
    try:
        return store.get(key)
    except KeyError:
        raise ValueError(
            f"the distilled model {key} is damaged or deleted. Run `layerwise distill` again, with the options that it was made "
            "with."
        ) from None


def read_distillation(store: ArtifactStore, artifact: Artifact) -> Distillation:
    """Read an artifact of ``distill``."""
    document: Mapping[str, Any] = json.loads(store.read(artifact, DISTILLATION_FILE))
    return Distillation(
        **{
            **document,
            "evaluations": tuple(HeldOutLoss(**row) for row in document["evaluations"]),
            "rows": tuple(DistilledRow(**row) for row in document["rows"]),
        }
    )


def distillation_rows(result: Distillation) -> list[dict[str, str | int]]:
    """Return the comparison with numbers formatted for people."""
    return [
        {
            "model": row.model,
            "perplexity, test text": format_perplexity(row.test),
            "perplexity, held-out calibration text": format_perplexity(row.held_out),
            "zeros": row.zeros,
        }
        for row in result.rows
    ]
