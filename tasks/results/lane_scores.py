"""Score of a pruned lane: its loss on every selection window, and its realised sparsity."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.scoring.criterion import Criterion
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table

LOSSES_FILE = "losses.parquet"
LAYERS_FILE = "layers.parquet"
LINEARS_FILE = "linears.parquet"
ERRORS_FILE = "errors.parquet"  # only if the errors of layers were split into their parts


@dataclass(frozen=True)
class LaneScore:
    """Score of a finished lane.

    Attributes:
        losses: per selection window, in nats.
        realised_sparsity: zeros divided by weights, over all pruned linears.
        divergences: KL divergence from the dense model per selection window, in nats; None if the criterion is not ``kl``.
    """

    plan: SparsityPlan
    artifact: Artifact
    losses: tuple[float, ...]
    realised_sparsity: float
    divergences: tuple[float, ...] | None = None

    @property
    def criterion(self) -> Criterion:
        """What plans are compared by."""
        return "perplexity" if self.divergences is None else "kl"

    @property
    def compared(self) -> tuple[float, ...]:
        """What plans are compared by, per selection window, in nats: the divergences, or the losses."""
        return self.losses if self.divergences is None else self.divergences


def score_table(losses: Sequence[float], divergences: Sequence[float]) -> pa.Table:
    """Return the table of a lane's scores; columns: window, loss and, with the criterion ``kl``, kl.

    Args:
        losses, divergences: by window, in nats; no divergences if the criterion is not ``kl``.
    """
    kl = {"kl": list(divergences)} if divergences else {}
    return pa.table({"window": range(len(losses)), "loss": list(losses), **kl})


def read_score(store: ArtifactStore, plan: SparsityPlan, artifact: Artifact) -> LaneScore:
    """Read the score of the lane of ``plan`` from its artifact."""
    table = read_table(store, artifact, LOSSES_FILE)
    divergences = tuple(table["kl"].to_pylist()) if "kl" in table.column_names else None
    linears = read_table(store, artifact, LINEARS_FILE)
    realised = sum(linears["zeros"].to_pylist()) / sum(linears["weights"].to_pylist())
    return LaneScore(plan, artifact, tuple(table["loss"].to_pylist()), realised, divergences)
