"""Evaluate: test perplexity of the dense, the uniform and the best model, on text that no choice was based on."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial

from torch import Tensor

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.models.skeleton import Linear
from layerwise.recovery.pruned_layer import held_out_windows
from layerwise.scoring.perplexity import mean_loss, paired_difference, perplexity
from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.branch import write_lane
from layerwise.tasks.lanes.group_membership import copy_member
from layerwise.tasks.lanes.lane_group import (
    GroupResult,
    LaneInputs,
    LayerWatch,
    PlannedLane,
    advance_group,
    lane_folder,
)
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.lanes.recovered_layers import RecoveredLayers
from layerwise.tasks.results.evaluation import (
    RECOVERY_FILE,
    TEST_FILE,
    RecoveryTest,
    TestDivergence,
    TestResponses,
    TestResult,
    TwoTexts,
    read_test,
)
from layerwise.tasks.results.run_names import model_title, plans_title
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.texts.token_windows import read_responses, shape_of

# On the first windows of the test each pruned layer also runs on the dense model's input, to split its error into
# parts. Four windows of 2048 tokens give reliable means over 30 layers; a test of the usual 64 windows or more takes a
# few per cent longer.
LOCAL_WINDOWS = 4


def evaluate_stage(
    inputs: LaneInputs,
    uniform: SparsityPlan,
    best: SparsityPlan,
    settings: PruneSettings,
    recovered: Sequence[str] = (),
) -> Stage:
    """Describe an evaluation. The dense model is part of every evaluation.

    Args:
        recovered: keys of the recovered plans, uniform first; empty without recovery.
    """
    layers = [list(plan.layers) for plan in _distinct(uniform, best)]
    by_role = {f"recovered {number}": key for number, key in enumerate(recovered)}
    keys = _scored_inputs(inputs, settings).keys(settings) | by_role
    criterion = {} if inputs.criterion == "perplexity" else {"criterion": inputs.criterion}
    return Stage("evaluate", 2, {"plans": layers, "prune": settings.identity, **criterion}, keys)


def _distinct(uniform: SparsityPlan, best: SparsityPlan) -> list[SparsityPlan]:
    return [uniform] if best == uniform else [uniform, best]


def _scored_inputs(inputs: LaneInputs, settings: PruneSettings) -> LaneInputs:
    """Return the inputs with the calibration windows that the recovery held out, if there is one."""
    if settings.recover is None:
        return inputs
    return replace(inputs, held_out=held_out_windows(settings.recover, shape_of(inputs.calibration)[0]))


@stage_task(
    about=lambda inputs, best, settings, **_: (
        f"{model_title(inputs.checkpoint)} at {settings.target:g}, {plans_title([best])}"
    )
)
def evaluate(
    store: ArtifactStore,
    inputs: LaneInputs,
    uniform: SparsityPlan,
    best: SparsityPlan,
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    execution: Execution,
    recovered: Sequence[str] = (),
    watch: LayerWatch | None = None,
) -> Artifact:
    """Score the dense, the uniform and the best model once on the test windows, also by the criterion of the search.

    With recovery, the recovered models are scored, and for comparison the pruned models before it, on the test windows
    and on the calibration windows that the recovery held out.

    Args:
        inputs: with the test windows as ``scored``.
        recovered: see ``evaluate_stage``.
        watch: see ``advance_group``; not called if the evaluation exists.
    """
    plans = _distinct(uniform, best)

    def build(draft: Draft) -> None:
        title = "evaluate: dense, uniform and best on the test windows"
        planned = [PlannedLane(settings.removed(plan, linears)) for plan in plans]
        if settings.recover is not None:
            title = f"{title}, with and without recovery"
            layers = [RecoveredLayers(store, plan, inputs, settings).existing for plan in plans]
            planned = [
                *(replace(lane, recovered=read) for lane, read in zip(planned, layers, strict=True)),
                *planned,
            ]
        if watch is not None:
            title = f"{title}; the export is written in the same pass"
        scored, pruning = _scored_inputs(inputs, settings), settings.one_shot
        result = advance_group(store, draft, scored, planned, pruning, execution, title, LOCAL_WINDOWS, watch)
        lanes, responses = range(len(plans) + 1), read_responses(store, inputs.scored)
        draft.facts |= _facts(_write_evaluation(draft, result.of(lanes), linears, settings, responses))
        if settings.recover is not None:
            _write_recovery_test(draft, result, len(plans))

    return store.get_or_build(evaluate_stage(inputs, uniform, best, settings, recovered), build)


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
    """Build the evaluations of several searches of one model that the store lacks, in one group.

    The artifacts are those that ``evaluate`` would build one by one. A single missing evaluation is left to
    ``evaluate``; so are all evaluations with sequential calibration, whose lanes write their own statistics, and with recovery.

    Args:
        inputs: with the test windows as ``scored``.
        bests: the best plan of each search.
    """
    stages = [(evaluate_stage(inputs, uniform, best, settings), best) for best in bests]
    by_key = {stage.key: (stage, best) for stage, best in stages}
    missing = [(stage, best) for stage, best in by_key.values() if store.find(stage) is None]
    if len(missing) < 2 or settings.calibration_mode == "sequential" or settings.recover is not None:
        return
    others = [best for _, best in missing if best != uniform]

    def build(draft: Draft) -> None:
        title = f"evaluate: dense, uniform and {len(others)} other plans on the test windows"
        planned = [PlannedLane(settings.removed(plan, linears)) for plan in (uniform, *others)]
        result = advance_group(store, draft, inputs, planned, settings, execution, title, LOCAL_WINDOWS)
        responses = read_responses(store, inputs.scored)
        for number, (_, best) in enumerate(missing):
            lanes = [0, 1] if best == uniform else [0, 1, others.index(best) + 2]
            folder = f"{lane_folder(number)}/"
            _write_evaluation(draft, result.of(lanes), linears, settings, responses, folder)

    roles = {f"evaluation {number:03d}": stage.key for number, (stage, _) in enumerate(missing)}
    group = store.get_or_build(Stage("evaluate_group", 1, None, roles), build)
    for number, (stage, _) in enumerate(missing):
        store.get_or_build(stage, partial(_copy_evaluation, store, group, f"{lane_folder(number)}/"))


def _write_evaluation(
    draft: Draft,
    result: GroupResult,
    linears: Sequence[Sequence[Linear]],
    settings: PruneSettings,
    responses: Tensor | None,
    folder: str = "",
) -> TestResult:
    """Write the tables of the dense lane, the uniform lane and, if it is a third one, the best lane.

    Args:
        responses: see ``read_responses``.
    """
    for lane, name in enumerate(("dense", "uniform", "best")[: len(result.losses)]):
        write_lane(draft, f"{folder}{name}", result, lane, linears, settings)
    dense, plain, chosen = (*result.losses, result.losses[-1])[:3]
    gain = None if len(result.losses) == 2 else paired_difference(chosen, plain)
    kl = _test_divergence(result.divergences[1:])
    perplexities = perplexity(dense), perplexity(plain), perplexity(chosen)
    test = TestResult(len(dense), *perplexities, gain, kl, _test_responses(result, responses))
    draft.write(f"{folder}{TEST_FILE}", json.dumps(test.document, indent=1).encode())
    return test


def _test_divergence(divergences: Sequence[Sequence[float]]) -> TestDivergence | None:
    """Summarise the divergences of the uniform lane and, if it is another one, the best lane; None without any."""
    plain, chosen = divergences[0], divergences[-1]
    if not plain:
        return None
    gain = None if len(divergences) == 1 else paired_difference(chosen, plain)
    return TestDivergence(mean_loss(plain), mean_loss(chosen), gain)


def _test_responses(result: GroupResult, responses: Tensor | None) -> TestResponses | None:
    """Summarise the losses of the responses, by lane; None for plain text, and if an earlier version scored some lanes."""
    losses = [loss for loss in result.response_losses if loss is not None]
    if responses is None or len(losses) < len(result.response_losses):
        return None
    perplexities = [perplexity([loss]) for loss in losses]
    return TestResponses(int(responses[:, 1:].sum()), perplexities[0], perplexities[1], perplexities[-1])


def _write_recovery_test(draft: Draft, result: GroupResult, plans: int) -> None:
    """Compare the recovered lanes with those before recovery, which follow them in the same order."""
    texts = [
        TwoTexts(perplexity(test), perplexity(held_out))
        for test, held_out in zip(result.losses, result.held_out, strict=True)
    ]
    gain = paired_difference(result.losses[plans], result.losses[2 * plans])
    test = RecoveryTest(
        held_out_windows=len(result.held_out[0]),
        dense=texts[0],
        uniform=texts[1],
        best=texts[plans],
        uniform_before=texts[plans + 1],
        best_before=texts[2 * plans],
        gain=gain,
    )
    draft.write(RECOVERY_FILE, json.dumps(asdict(test), indent=1).encode())


def _copy_evaluation(store: ArtifactStore, group: Artifact, folder: str, draft: Draft) -> None:
    copy_member(store, group, folder, draft)
    draft.facts |= _facts(read_test(store, group, folder))


def _facts(test: TestResult) -> dict[str, float]:
    kl = {} if test.kl is None else {"KL, uniform": test.kl.uniform, "KL, best": test.kl.best}
    return {"dense": test.dense, "uniform": test.uniform, "best": test.best, **kl}
