"""Evaluate several plans of one model in one group: what a comparison asks for, with one pass of the dense model."""

from collections.abc import Sequence
from functools import partial

from layerwise.allocation import SparsityPlan
from layerwise.skeleton import Linear
from storage.artifact import Artifact
from storage.draft import Draft
from storage.stage import Stage
from storage.store import ArtifactStore
from tasks.evaluate import (
    LOCAL_WINDOWS,
    evaluate_stage,
    evaluation_facts,
    read_test,
    write_evaluation,
)
from tasks.execution import Execution
from tasks.grouping import copy_member
from tasks.lane_group import GroupResult, LaneInputs, advance_group, lane_folder
from tasks.prune_settings import PruneSettings
from tasks.run_names import model_title
from tasks.stage_task import stage_task


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
