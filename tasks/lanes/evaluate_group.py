"""Evaluate several plans of one model in one group: what a comparison asks for, with one pass of the dense model."""

from collections.abc import Sequence
from functools import partial

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.models.skeleton import Linear
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.evaluate import (
    LOCAL_WINDOWS,
    evaluate_stage,
    evaluation_facts,
    read_test,
    write_evaluation,
)
from layerwise.tasks.lanes.grouping import copy_member
from layerwise.tasks.lanes.lane_group import GroupResult, LaneInputs, advance_group, lane_folder
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.results.run_names import model_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task


@stage_task(
    about=lambda inputs, bests, settings, **_: (
        f"{model_title(inputs.checkpoint)} at {settings.target:g}, {len(bests)} plans"
    )
)
def evaluate_together(
    store: ArtifactStore,
    inputs: LaneInputs,
    uniform: SparsityPlan,
    bests: Sequence[SparsityPlan],
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
) -> None:
    """Make the evaluations that the store lacks, as ``evaluate`` would one by one.

    Left to it are a single one, and lanes that calibrate themselves: they leave statistics of their own.

    Args:
        inputs: with the test windows as ``scored``.
        bests: what several searches have chosen.
    """
    stages = [(evaluate_stage(inputs, uniform, best, settings), best) for best in bests]
    by_key = {stage.key: (stage, best) for stage, best in stages}
    missing = [(stage, best) for stage, best in by_key.values() if store.find(stage) is None]
    if len(missing) < 2 or settings.calibration_mode == "sequential":
        return
    others = [best for _, best in missing if best != uniform]

    def build(draft: Draft) -> None:
        title = f"evaluate: dense, uniform and {len(others)} other plans on the test windows"
        removed = [settings.removed(plan, linears) for plan in (uniform, *others)]
        result = advance_group(store, draft, inputs, removed, settings, execution, title, LOCAL_WINDOWS)
        for number, (_, best) in enumerate(missing):
            lanes = [0, 1] if best == uniform else [0, 1, others.index(best) + 2]
            part = GroupResult(
                [result.losses[lane] for lane in lanes],
                [tuple(outcome[lane] for lane in lanes) for outcome in result.outcomes],
            )
            write_evaluation(draft, part, linears, settings, f"{lane_folder(number)}/")

    roles = {f"evaluation {number:03d}": stage.key for number, (stage, _) in enumerate(missing)}
    group = store.get_or_build(Stage("evaluate_group", 1, None, roles), build)
    for number, (stage, _) in enumerate(missing):
        copy = partial(_copy, store, group, f"{lane_folder(number)}/")
        store.get_or_build(stage, copy)


def _copy(store: ArtifactStore, group: Artifact, folder: str, draft: Draft) -> None:
    copy_member(store, group, folder, draft)
    draft.facts |= evaluation_facts(read_test(store, group, folder))
