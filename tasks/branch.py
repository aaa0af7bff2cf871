"""Branch: prune one lane per plan and score it on the selection windows, all lanes of a group together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.models.skeleton import Linear
from layerwise.scoring.perplexity import perplexity
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table, write_table
from layerwise.tasks.lanes.grouping import GROUP, built_together, copy_member, group_stage
from layerwise.tasks.lanes.lane_group import GroupResult, LaneInputs, advance_group, lane_folder
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.results.run_names import model_title, plans_title, windows_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task

LOSSES_FILE = "losses.parquet"
LAYERS_FILE = "layers.parquet"
LINEARS_FILE = "linears.parquet"
ERRORS_FILE = "errors.parquet"  # where the errors of layers are taken apart


@dataclass(frozen=True)
class LaneScore:
    """How a finished lane did."""

    plan: SparsityPlan
    artifact: Artifact
    losses: tuple[float, ...]  # per selection window, in nats
    realised_sparsity: float  # zeros over weights, all linears together


def lane_stage(plan: SparsityPlan, inputs: LaneInputs, settings: PruneSettings) -> Stage:
    """The stage of one lane. A plan is its numbers: by which method they were found is no part of it."""
    part = {} if inputs.windows is None else {"windows": list(inputs.windows)}
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
    """Run the lanes that the store does not have yet, in one group; return all of them in the order of
    ``plans``.

    A lane's artifact holds ``losses.parquet`` (per selection window), ``layers.parquet`` (reconstruction
    error per layer) and ``linears.parquet`` (realised sparsity per linear), and is the same in whatever
    group it ran.
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
        title = f"branch: {len(plans)} {'beta' if len(plans) == 1 else 'betas'} and the dense model"
        removed = [settings.removed(plan, linears) for plan in plans]
        result = advance_group(store, draft, inputs, removed, settings, execution, title)
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
    """Write the tables of one lane of ``result`` (0: the dense model) into ``folder``."""
    prunable = settings.prunable(linears)
    losses = result.losses[lane]
    write_table(draft, f"{folder}/{LOSSES_FILE}", pa.table({"window": range(len(losses)), "loss": losses}))
    layers = [outcome[lane] for outcome in result.outcomes]
    table = {
        "layer": range(len(layers)),
        "error": [layer.error for layer in layers],
        "dense_energy": [layer.energy for layer in layers],
    }
    write_table(draft, f"{folder}/{LAYERS_FILE}", pa.table(table))
    parts = [
        {"layer": index, **asdict(layer.parts), "factor": layer.parts.factor}
        for index, layer in enumerate(layers)
        if layer.parts is not None
    ]
    if parts:
        write_table(draft, f"{folder}/{ERRORS_FILE}", pa.Table.from_pylist(parts))
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
    losses = read_table(store, group, f"{folder}{LOSSES_FILE}")["loss"].to_pylist()
    draft.facts |= plan_facts(plan) | {"selection perplexity": perplexity(losses)}
    draft.made[GROUP] = group.key  # which has the time and the memory; the lane is the same in whatever group


def plan_facts(plan: SparsityPlan) -> dict[str, float]:
    """What a plan came from, as facts of an artifact."""
    return {"beta": plan.beta} | ({"offset": plan.offset} if plan.offset else {})


def read_score(store: ArtifactStore, plan: SparsityPlan, artifact: Artifact) -> LaneScore:
    """What the artifact of the lane of ``plan`` holds."""
    losses = read_table(store, artifact, LOSSES_FILE)["loss"].to_pylist()
    linears = read_table(store, artifact, LINEARS_FILE)
    realised = sum(linears["zeros"].to_pylist()) / sum(linears["weights"].to_pylist())
    return LaneScore(plan, artifact, tuple(losses), realised)
