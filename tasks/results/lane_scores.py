"""Score of a pruned lane: its loss on every selection window, and its realised sparsity."""

from dataclasses import dataclass

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table

LOSSES_FILE = "losses.parquet"
LAYERS_FILE = "layers.parquet"
LINEARS_FILE = "linears.parquet"
ERRORS_FILE = "errors.parquet"  # only if the errors of layers were split into their parts


@dataclass(frozen=True)
class LaneScore:
    """Score of a finished lane."""

    plan: SparsityPlan
    artifact: Artifact
    losses: tuple[float, ...]  # per selection window, in nats
    realised_sparsity: float  # zeros divided by weights, over all pruned linears


def read_score(store: ArtifactStore, plan: SparsityPlan, artifact: Artifact) -> LaneScore:
    """Read the score of the lane of ``plan`` from its artifact."""
    losses = read_table(store, artifact, LOSSES_FILE)["loss"].to_pylist()
    linears = read_table(store, artifact, LINEARS_FILE)
    realised = sum(linears["zeros"].to_pylist()) / sum(linears["weights"].to_pylist())
    return LaneScore(plan, artifact, tuple(losses), realised)
