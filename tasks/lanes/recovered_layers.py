"""Recovered layers: one artifact for each decoder layer of a plan, with the weights that replace the pruned ones."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
from torch import Tensor

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.recovery.layer_recovery import RecoveryOutcome
from layerwise.storage.artifact import Artifact, Damaged
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import write_table
from layerwise.storage.tensors import read_tensors, write_tensors
from layerwise.tasks.lanes.lane_group import LaneInputs
from layerwise.tasks.lanes.prune_settings import PruneSettings

WEIGHTS_FILE = "weights.safetensors"  # only if the recovery of the layer was accepted
OUTCOME_FILE = "outcome.json"
OUTCOMES_FILE = "recovery.parquet"  # of a recovered plan or of a lane: one row per layer


def recovered_layer_stage(
    plan: SparsityPlan, layer: int, inputs: LaneInputs, settings: PruneSettings
) -> Stage:
    """Describe the recovery of one layer, on the hidden states that the recovered layers before it give."""
    own = {"layers": list(plan.layers), "layer": layer, "prune": settings.identity}
    return Stage("recovered_layer", 1, own, inputs.calibration_keys(settings))


def recovered_stage(plan: SparsityPlan, inputs: LaneInputs, settings: PruneSettings) -> Stage:
    """Describe the recovery of a whole plan, given by its layers."""
    layers = range(inputs.checkpoint.num_layers)
    stages = {
        f"layer {layer:05d}": recovered_layer_stage(plan, layer, inputs, settings).key for layer in layers
    }
    return Stage("recovered", 1, None, stages)


@dataclass(frozen=True)
class RecoveredLayers:
    """The recovered layers of one plan in a store; each may be missing."""

    store: ArtifactStore
    plan: SparsityPlan
    inputs: LaneInputs
    settings: PruneSettings

    def find(self, layer: int) -> Artifact | None:
        """Return the artifact of a layer; None if it is missing."""
        return self.store.find(recovered_layer_stage(self.plan, layer, self.inputs, self.settings))

    def weights(self, layer: int) -> Mapping[str, Tensor] | None:
        """Read the weights of a layer by linear: empty if it keeps its pruned weights, None if it is missing."""
        artifact = self.find(layer)
        if artifact is None:
            return None
        return read_tensors(self.store, artifact, WEIGHTS_FILE) if WEIGHTS_FILE in artifact.files else {}

    def existing(self, layer: int) -> Mapping[str, Tensor]:
        """Read the weights of a layer of a plan that was recovered before.

        Raises:
            Damaged: the layer is missing, so the plan is to be recovered again.
        """
        weights = self.weights(layer)
        if weights is None:
            whole = recovered_stage(self.plan, self.inputs, self.settings)
            artifact = self.store.find(whole)
            raise Damaged(
                f"{whole.key}: its recovered layer {layer} is missing.",
                whole.key,
                "" if artifact is None else artifact.token,
            )
        return weights

    def keep(self, layer: int, weights: Mapping[str, Tensor], outcome: RecoveryOutcome | None) -> None:
        """Commit a layer.

        Args:
            weights: new weights by linear; empty if the layer keeps its pruned weights.
            outcome: errors that decided on this; None if the plan removes nothing from the layer.
        """

        def build(draft: Draft) -> None:
            if weights:
                write_tensors(draft, WEIGHTS_FILE, weights)
            draft.write(OUTCOME_FILE, json.dumps(outcome_row(outcome)).encode())

        self.store.get_or_build(recovered_layer_stage(self.plan, layer, self.inputs, self.settings), build)

    def row(self, layer: int) -> dict[str, object]:
        """Read the outcome of a layer, which must exist."""
        artifact = self.find(layer)
        assert artifact is not None, "the lane has recovered all of its layers"
        return {"layer": layer, **json.loads(self.store.read(artifact, OUTCOME_FILE))}


def outcome_row(outcome: RecoveryOutcome | None) -> dict[str, object]:
    """Return a recovery's outcome as columns: whether the layer lost weights, errors, whether the new weights are used.

    An error that is not finite, because the lane has diverged, is None.
    """
    if outcome is None:
        return {"pruned": False, "before": None, "after": None, "accepted": False}
    before, after = (value if math.isfinite(value) else None for value in (outcome.before, outcome.after))
    return {"pruned": True, "before": before, "after": after, "accepted": outcome.accepted}


def write_outcomes(draft: Draft, name: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Write the outcomes of all layers of a plan; rows have the columns layer, pruned, before, after and accepted."""
    types = {
        "layer": pa.int64(),
        "pruned": pa.bool_(),
        "before": pa.float64(),
        "after": pa.float64(),
        "accepted": pa.bool_(),
    }
    columns = {column: pa.array([row[column] for row in rows], kind) for column, kind in types.items()}
    write_table(draft, name, pa.table(columns))


def was_rolled_back(row: Mapping[str, object]) -> bool:
    """Return whether a layer lost weights, and keeps those that remain because the recovery did not lower its error."""
    return bool(row["pruned"]) and not row["accepted"]
