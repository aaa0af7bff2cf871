"""Selection of a search: the table of all plans tried, the best one, and how certain the choice is."""

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from layerwise.scoring.criterion import KL, Criterion
from layerwise.scoring.perplexity import PairedDifference
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore

SELECTION_FILE = "selection.json"
DENSE_PERPLEXITY = "dense selection perplexity"  # fact of a capture
TRIAL = "trial"  # parameter of plans made by a strategy; its value is their number


@dataclass(frozen=True)
class ScoreRow:
    """One plan's row in the result table.

    Attributes:
        loss: mean over the selection windows, in nats. For a lane that was stopped early: the loss of the best lane
            plus the mean difference on the windows that this lane has seen.
        above_best: paired difference between this plan and the best plan in what the criterion compares (loss or
            divergence), on the windows that this plan has seen; None for the best plan.
        windows: number of windows that the plan was scored on.
        kl: mean KL divergence from the dense model, in nats, determined like ``loss``; None if the criterion is
            perplexity.
    """

    beta: float
    loss: float
    perplexity: float
    above_best: PairedDifference | None
    realised_sparsity: float
    windows: int
    offset: float = 0.0
    kl: float | None = None

    @property
    def compared(self) -> float:
        """Figure that plans are compared by, in nats: the divergence, or the loss."""
        return self.loss if self.kl is None else self.kl


@dataclass(frozen=True)
class Selection:
    """Plans that were compared, and the one that was chosen."""

    rows: tuple[ScoreRow, ...]  # in the order of the plans, uniform (beta 0) first
    best: int
    runner_up: int | None  # None if only one plan was tried
    dense_perplexity: float
    parameter: str = "beta"  # name of beta; an allocator other than ATP names its own parameter

    @property
    def criterion(self) -> Criterion:
        """Figure that the best plan minimises."""
        return "perplexity" if self.rows[0].kl is None else "kl"

    @property
    def document(self) -> dict[str, Any]:
        """The selection as plain JSON. Divergences are left out if they were not measured."""
        document = asdict(self)
        for row in document["rows"]:
            if row["kl"] is None:
                del row["kl"]
        return document

    @property
    def best_row(self) -> ScoreRow:
        return self.rows[self.best]

    @property
    def verdict(self) -> str:
        """The choice and its uncertainty in one sentence."""
        if self.runner_up is None:
            return f"{self.name(self.best)} was the only one tried"
        parts = [self._compared(self.runner_up, "the runner-up, ")]
        if self.best != 0 and self.runner_up != 0:
            parts.append(self._compared(0, "uniform, "))
        return f"{self.name(self.best)}: {'; '.join(parts)}"

    def name(self, number: int) -> str:
        """Return the name of a row, e.g. "beta 0.1, offset +0.05"."""
        row = self.rows[number]
        offset = f", offset {row.offset:+g}" if row.offset else ""
        return f"{self.parameter} {row.beta:g}{offset}"

    def _compared(self, other: int, role: str) -> str:
        row = self.rows[other]
        difference = row.above_best
        assert difference is not None, "only the best row has no difference to the best"
        figure, gain = "perplexity", 100 * (1 - math.exp(-difference.mean))
        if row.kl is not None:
            figure, gain = KL, 100 * difference.mean / row.kl if row.kl > 0 else 0.0
        t = "undefined" if difference.t is None else f"{difference.t:.1f}"
        significance = "significant" if difference.significant else "not significant"
        return f"{figure} {gain:.1f} % below {role}{self.name(other)} (t = {t}: {significance})"


def read_selection(store: ArtifactStore, artifact: Artifact) -> Selection:
    """Read an artifact of ``select``."""
    document = json.loads(store.read(artifact, SELECTION_FILE))
    rows = tuple(
        ScoreRow(**{**row, "above_best": row["above_best"] and PairedDifference(**row["above_best"])})
        for row in document["rows"]
    )
    return Selection(**{**document, "rows": rows})


def dense_perplexity(capture: Artifact) -> float:
    """Return the dense model's perplexity on the selection text, from the facts of its capture."""
    return float(str(capture.facts[DENSE_PERPLEXITY]))
