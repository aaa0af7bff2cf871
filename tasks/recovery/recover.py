"""Recover: fit the remaining weights of chosen plans, one artifact per decoder layer."""

from collections.abc import Sequence

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.models.skeleton import Linear
from layerwise.storage.artifact import Artifact, Damaged
from layerwise.storage.draft import Draft
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.lanes.lane_group import LaneInputs, PlannedLane, advance_group
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.lanes.recovered_layers import (
    OUTCOMES_FILE,
    RecoveredLayers,
    recovered_stage,
    was_rolled_back,
    write_outcomes,
)
from layerwise.tasks.results.roles import LAYERS_RECOVERED, LAYERS_ROLLED_BACK
from layerwise.tasks.results.run_names import model_title, plans_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task


@stage_task(
    about=lambda inputs, plans, settings, **_: (
        f"{model_title(inputs.checkpoint)} at {settings.target:g}, {plans_title(plans)}"
    )
)
def recover(
    store: ArtifactStore,
    inputs: LaneInputs,
    plans: Sequence[SparsityPlan],
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> list[Artifact]:
    """Recover every layer of some plans on all calibration windows.

    Each layer is an artifact of its own, committed when it is done. A run that was interrupted goes on at the next layer
    after its resume point, and reads the layers that it has finished since.

    Returns:
        An artifact for each plan, with ``recovery.parquet``: the errors of every layer before and after its recovery,
        and whether it was accepted.

    Raises:
        Damaged: a layer of a plan that was recovered before is missing; the plan is to be recovered again.
    """
    return [_recovered(store, inputs, plan, linears, settings, execution) for plan in plans]


def _recovered(
    store: ArtifactStore,
    inputs: LaneInputs,
    plan: SparsityPlan,
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> Artifact:
    method = settings.recovery.method
    layers = RecoveredLayers(store, plan, inputs, settings)
    count = inputs.checkpoint.num_layers

    def build(draft: Draft) -> None:
        lane = PlannedLane(settings.removed(plan, linears), layers.weights, layers.keep)
        alone = inputs.only_calibration
        title = f"recover: {method} of {plans_title([plan])}"
        advance_group(store, draft, alone, [lane], settings, execution, title)
        rows = [layers.row(layer) for layer in range(count)]
        write_outcomes(draft, OUTCOMES_FILE, rows)
        draft.facts |= {
            LAYERS_RECOVERED: sum(bool(row["accepted"]) for row in rows),
            LAYERS_ROLLED_BACK: [row["layer"] for row in rows if was_rolled_back(row)],
        }

    artifact = store.get_or_build(recovered_stage(plan, inputs, settings), build)
    if missing := [layer for layer in range(count) if layers.find(layer) is None]:
        raise Damaged(
            f"{artifact.key}: its recovered layers {missing} are missing.", artifact.key, artifact.token
        )
    return artifact
