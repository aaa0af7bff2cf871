"""Branch: prune one lane per plan and score it on the selection windows, all lanes of a group together."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import pyarrow as pa

from layerwise.allocation import SparsityPlan
from layerwise.perplexity import perplexity
from layerwise.skeleton import Linear
from storage.artifact import Artifact
from storage.draft import Committed, Draft
from storage.stage import Stage
from storage.store import ArtifactStore
from storage.tables import read_table, write_table
from tasks.execution import Execution
from tasks.lane_group import GroupResult, LaneInputs, PruneSettings, advance_group, lane_folder
from tasks.stage_task import stage_task

LOSSES_FILE = "losses.parquet"
LAYERS_FILE = "layers.parquet"
LINEARS_FILE = "linears.parquet"
GROUP = "group"  # in a lane's resume point: the keys of the lanes it runs with


@dataclass(frozen=True)
class LaneScore:
    """How a finished lane did."""

    plan: SparsityPlan
    artifact: Artifact
    losses: tuple[float, ...]  # per selection window, in nats
    realised_sparsity: float  # zeros over weights, all linears together


def lane_stage(plan: SparsityPlan, inputs: LaneInputs, settings: PruneSettings) -> Stage:
    """The stage of one lane. A plan is its numbers: by which method they were found is no part of it."""
    return Stage("lane", 1, {"layers": list(plan.layers), "prune": settings}, inputs.keys(settings))


@stage_task()
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
    while None in (lanes := [store.find(stage) for stage in stages]):
        missing = [number for number, lane in enumerate(lanes) if lane is None]
        try:
            members = _members(store, stages, missing)
        except Committed:
            continue  # another process has just finished one of them
        run = [plans[number] for number in members]
        group = _group(store, inputs, run, linears, settings, execution)
        for position, number in enumerate(members):
            if number in missing:
                build = partial(_copy_lane, store, group, position, plans[number])
                store.get_or_build(stages[number], build)
    return [
        read_score(store, plan, lane) for plan, lane in zip(plans, lanes, strict=True) if lane is not None
    ]


def _members(store: ArtifactStore, stages: Sequence[Stage], missing: Sequence[int]) -> list[int]:
    """Which lanes to run together: a group that an earlier attempt has begun, or all missing ones.

    With whom a lane was begun is noted in its resume point, so that a group goes on even if some of its lanes are
    committed already, or others have been asked for since.

    Raises:
        Committed: another process has finished one of the missing lanes.
    """
    begun = [list(range(len(stages))), *(_noted_group(store, stages, number) for number in missing)]
    for members in begun:
        if set(members) & set(missing) and _has_progress(store, [stages[number] for number in members]):
            return members
    together = [stages[number].key for number in missing]

    def note(state: Draft) -> None:
        state.facts[GROUP] = together

    for number in missing:
        store.draft(stages[number]).save_progress(0, note)
    return list(missing)


def _noted_group(store: ArtifactStore, stages: Sequence[Stage], lane: int) -> list[int]:
    """The lanes that this one was begun with; none if one of them is not asked for any more."""
    progress = store.progress(stages[lane])
    keys = [] if progress is None else cast(list[str], progress.state.facts[GROUP])
    number_of = {stage.key: number for number, stage in enumerate(stages)}
    return [number_of[key] for key in keys] if all(key in number_of for key in keys) else []


def _has_progress(store: ArtifactStore, lanes: Sequence[Stage]) -> bool:
    group = _group_stage(lanes)
    return store.find(group) is not None or store.progress(group) is not None


def _group_stage(lanes: Sequence[Stage]) -> Stage:
    """The stage that runs these lanes together."""
    return Stage("lane_group", 1, None, {f"lane {number}": lane.key for number, lane in enumerate(lanes)})


def _group(
    store: ArtifactStore,
    inputs: LaneInputs,
    plans: Sequence[SparsityPlan],
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> Artifact:
    def build(draft: Draft) -> None:
        title = f"branch: {len(plans)} betas and the dense model, group 1 of 1"
        result = advance_group(store, draft, inputs, plans, linears, settings, execution, title)
        for number in range(len(plans)):
            write_lane(draft, lane_folder(number), result, number + 1, linears)

    return store.get_or_build(_group_stage([lane_stage(plan, inputs, settings) for plan in plans]), build)


def write_lane(
    draft: Draft, folder: str, result: GroupResult, lane: int, linears: Sequence[Sequence[Linear]]
) -> None:
    """Write the tables of one lane of ``result`` (0: the dense model) into ``folder``."""
    losses = result.losses[lane]
    write_table(draft, f"{folder}/{LOSSES_FILE}", pa.table({"window": range(len(losses)), "loss": losses}))
    layers = [outcome[lane] for outcome in result.outcomes]
    table = {
        "layer": range(len(layers)),
        "error": [layer.error for layer in layers],
        "dense_energy": [layer.energy for layer in layers],
    }
    write_table(draft, f"{folder}/{LAYERS_FILE}", pa.table(table))
    rows = [
        {"layer": index, "linear": linear.name, "weights": linear.numel, "zeros": zeros}
        for index, (layer, outcome) in enumerate(zip(linears, layers, strict=True))
        for linear, zeros in zip(layer, outcome.zeros, strict=True)
    ]
    write_table(draft, f"{folder}/{LINEARS_FILE}", pa.Table.from_pylist(rows))


def _copy_lane(
    store: ArtifactStore, group: Artifact, position: int, plan: SparsityPlan, draft: Draft
) -> None:
    folder = f"{lane_folder(position)}/"
    for name in group.files:
        if name.startswith(folder):
            draft.write(name.removeprefix(folder), store.read(group, name))
    losses = read_table(store, group, f"{folder}{LOSSES_FILE}")["loss"].to_pylist()
    draft.facts |= {"beta": plan.beta, "selection perplexity": perplexity(losses)}


def read_score(store: ArtifactStore, plan: SparsityPlan, artifact: Artifact) -> LaneScore:
    """What the artifact of the lane of ``plan`` holds."""
    losses = read_table(store, artifact, LOSSES_FILE)["loss"].to_pylist()
    linears = read_table(store, artifact, LINEARS_FILE)
    realised = sum(linears["zeros"].to_pylist()) / sum(linears["weights"].to_pylist())
    return LaneScore(plan, artifact, tuple(losses), realised)
