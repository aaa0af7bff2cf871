"""Branch: prune one lane per plan and score it on the selection windows; all lanes of a group run together."""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial

import pyarrow as pa

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.models.skeleton import Linear
from layerwise.scoring.perplexity import mean_loss, perplexity
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table
from layerwise.tasks.lanes.group_membership import GROUP, built_together, copy_member, group_stage
from layerwise.tasks.lanes.lane_group import GroupResult, LaneInputs, PlannedLane, advance_group, lane_folder
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.lanes.recovered_layers import OUTCOMES_FILE, outcome_row, write_outcomes
from layerwise.tasks.results.lane_scores import (
    ERRORS_FILE,
    LAYERS_FILE,
    LINEARS_FILE,
    LOSSES_FILE,
    LaneScore,
    read_score,
    score_table,
)
from layerwise.tasks.results.run_names import model_title, plans_title, windows_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task


def lane_stage(plan: SparsityPlan, inputs: LaneInputs, settings: PruneSettings) -> Stage:
    """Describe one lane. Only the sparsities of a plan are part of the key, not the method that found them."""
    part: dict[str, object] = {} if inputs.windows is None else {"windows": list(inputs.windows)}
    if settings.recover is not None and inputs.recovery_windows is not None:
        part["recovery windows"] = inputs.recovery_windows
    return Stage(
        "lane", 1, {"layers": list(plan.layers), "prune": settings.identity, **part}, inputs.keys(settings)
    )


@stage_task(
    about=lambda inputs, plans, settings, **_: (
        f"{model_title(inputs.checkpoint)} at {settings.target:g}: {plans_title(plans)}"
        f"{windows_title(inputs.windows)}"
    )
)
def branch(
    store: ArtifactStore,
    inputs: LaneInputs,
    plans: Sequence[SparsityPlan],
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> list[LaneScore]:
    """Run the lanes that the store lacks in one group, and return the scores of all lanes in the order of ``plans``.

    A lane's artifact holds ``losses.parquet`` (per selection window; see ``score_table``) and ``linears.parquet`` (realised sparsity per
    linear); with recovery also ``recovery.parquet`` (its errors per layer). It does not depend on the group that the lane
    ran in. Reconstruction errors need the dense model on the same windows; ``evaluate`` measures them.
    """
    stages = [lane_stage(plan, inputs, settings) for plan in plans]

    def run(members: Sequence[int]) -> Artifact:
        return _group(store, inputs, [plans[number] for number in members], linears, settings, execution)

    def copy(group: Artifact, position: int, number: int, draft: Draft) -> None:
        _copy_lane(store, group, position, plans[number], draft)

    lanes = built_together(store, stages, run, copy)
    return [read_score(store, plan, lane) for plan, lane in zip(plans, lanes, strict=True)]


def _group(
    store: ArtifactStore,
    inputs: LaneInputs,
    plans: Sequence[SparsityPlan],
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> Artifact:
    def build(draft: Draft) -> None:
        title = f"branch: {len(plans)} {'beta' if len(plans) == 1 else 'betas'}"
        planned = [PlannedLane(settings.removed(plan, linears)) for plan in plans]
        result = advance_group(store, draft, inputs, planned, settings, execution, title)
        for number in range(len(plans)):
            write_lane(draft, lane_folder(number), result, number + 1, linears, settings)

    return store.get_or_build(group_stage([lane_stage(plan, inputs, settings) for plan in plans]), build)


def write_lane(
    draft: Draft,
    folder: str,
    result: GroupResult,
    lane: int,
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
) -> None:
    """Write the tables of one lane of ``result`` into ``folder``; lane 0 is the dense model."""
    prunable = settings.prunable(linears)
    write_table(draft, f"{folder}/{LOSSES_FILE}", score_table(result.losses[lane], result.divergences[lane]))
    layers = [outcome[lane] for outcome in result.outcomes]
    errors = [
        {"layer": index, "error": layer.error, "dense_energy": layer.energy}
        for index, layer in enumerate(layers)
        if layer.error is not None
    ]
    if errors:
        write_table(draft, f"{folder}/{LAYERS_FILE}", pa.Table.from_pylist(errors))
    parts = [
        {"layer": index, **asdict(layer.parts), "factor": layer.parts.factor}
        for index, layer in enumerate(layers)
        if layer.parts is not None
    ]
    if parts:
        write_table(draft, f"{folder}/{ERRORS_FILE}", pa.Table.from_pylist(parts))
    if any(layer.recovery for layer in layers):
        recovery = [{"layer": index, **outcome_row(each.recovery)} for index, each in enumerate(layers)]
        write_outcomes(draft, f"{folder}/{OUTCOMES_FILE}", recovery)
    rows = [
        {"layer": index, "linear": linear.name, "weights": linear.numel, "zeros": zeros}
        for index, (layer, outcome) in enumerate(zip(linears, layers, strict=True))
        for linear, zeros in zip(layer, outcome.zeros, strict=True)
        if linear in prunable[index]
    ]
    write_table(draft, f"{folder}/{LINEARS_FILE}", pa.Table.from_pylist(rows))


def _copy_lane(
    store: ArtifactStore, group: Artifact, position: int, plan: SparsityPlan, draft: Draft
) -> None:
    folder = f"{lane_folder(position)}/"
    copy_member(store, group, folder, draft)
    scores = read_table(store, group, f"{folder}{LOSSES_FILE}")
    draft.facts |= plan_facts(plan) | _score_facts(scores)
    draft.made[GROUP] = group.key  # time and memory are recorded for the group, not for each lane


def _score_facts(scores: pa.Table) -> dict[str, float]:
    kl = {"selection KL": mean_loss(scores["kl"].to_pylist())} if "kl" in scores.column_names else {}
    return {"selection perplexity": perplexity(scores["loss"].to_pylist()), **kl}


def plan_facts(plan: SparsityPlan) -> dict[str, float]:
    """Return the parameters of a plan as facts for an artifact."""
    return {"beta": plan.beta} | ({"offset": plan.offset} if plan.offset else {})


def joined_stage(rounds: Sequence[LaneScore]) -> Stage:
    """Describe the joining of one lane's rounds, given in the order of their windows."""
    return Stage(
        "lane_rounds",
        1,
        None,
        {f"round {number:03d}": score.artifact.key for number, score in enumerate(rounds)},
    )


@stage_task(about=lambda lanes, **_: plans_title([rounds[0].plan for rounds in lanes]))
def join_rounds(store: ArtifactStore, lanes: Sequence[Sequence[LaneScore]]) -> list[LaneScore]:
    """Join the rounds of every lane; each round ran on a part of the windows.

    The joined artifact holds what ``branch`` would have written for all windows. The pruned weights do not depend on the
    scored windows.
    """
    return [_joined(store, rounds) for rounds in lanes]


def _joined(store: ArtifactStore, rounds: Sequence[LaneScore]) -> LaneScore:
    artifact = store.get_or_build(joined_stage(rounds), partial(_join, store, rounds))
    return read_score(store, rounds[0].plan, artifact)


def _join(store: ArtifactStore, rounds: Sequence[LaneScore], draft: Draft) -> None:
    first = rounds[0]
    for name in first.artifact.files:
        if name not in (LOSSES_FILE, LAYERS_FILE):  # lanes of older versions have the errors of layers
            draft.write(name, store.read(first.artifact, name))
    scores = score_table(
        [loss for score in rounds for loss in score.losses],
        [divergence for score in rounds for divergence in score.divergences or ()],
    )
    write_table(draft, LOSSES_FILE, scores)
    draft.facts |= plan_facts(first.plan) | _score_facts(scores)
