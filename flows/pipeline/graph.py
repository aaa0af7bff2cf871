"""Graph of a search: every stage described once.

A graph is a generator of steps. It yields a step and receives the artifacts of that step, or None for each one that
does not exist. Its return value is None if it depends on a missing artifact. ``pipeline.build`` runs a graph and builds
every artifact; ``pipeline.lookup`` runs it and finds the artifacts that exist; ``flows.plan`` lists the remaining work
from the look-up. The parts of a search that other processes run are sections of this graph.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from types import MappingProxyType
from typing import Any, TypeVar

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.flows.pipeline.inputs import SearchInputs, expected_plans
from layerwise.flows.pipeline.search_strategy import LaneRequest, first_lanes, strategy_of
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.pipeline.time_estimate import SearchTimes
from layerwise.flows.pipeline.time_limit import is_too_late, stop_after_tried
from layerwise.flows.settings import Search
from layerwise.models.skeleton import Linear
from layerwise.scoring.criterion import Criterion
from layerwise.storage.artifact import Artifact
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.allocate import allocate, allocate_stage, read_plans
from layerwise.tasks.branch import branch, join_rounds, joined_stage, lane_stage
from layerwise.tasks.capture import CaptureSettings, capture, capture_dense_states, capture_stage
from layerwise.tasks.capture_grams import capture_grams, grams_stage
from layerwise.tasks.evaluate import evaluate, evaluate_stage
from layerwise.tasks.export import RecoveredExport, export, export_stage
from layerwise.tasks.import_checkpoint import import_checkpoint
from layerwise.tasks.lanes.dense_states import dense_states_stage
from layerwise.tasks.lanes.lane_group import LaneInputs, LayerWatch
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.lanes.recovered_layers import recovered_stage
from layerwise.tasks.lanes.statistics_table import expert_rows
from layerwise.tasks.measure import is_measured, measure, measure_stage, read_scores, threshold_of
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.recovery.recover import recover
from layerwise.tasks.results.lane_scores import LaneScore, read_score
from layerwise.tasks.results.roles import (
    EVALUATE,
    EXPORT,
    RECOVERED_BEST,
    RECOVERED_UNIFORM,
    SELECT,
    lane_role,
)
from layerwise.tasks.results.run_names import model_title, title_of
from layerwise.tasks.results.selection import DENSE_PERPLEXITY, Selection, read_selection
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sample_tokens import WindowRequest, sample_tokens, token_stage
from layerwise.tasks.select import compare, select, select_stage
from layerwise.tasks.texts.documents import Role

Result = TypeVar("Result")
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One or several artifacts that are built together.

    Attributes:
        name: name of the step in a plan.
        stages: role in the search's result and stage of every artifact; the stage is None while it depends on an
            artifact that does not exist.
        build: builds the missing artifacts, and returns all of them in the order of ``stages``.
        work: description of the work for a plan; empty if the step takes almost no time.
        reads: bytes of weights that the step reads.
        writes: bytes that the step adds to the store.
        seconds: time that the step takes; None if it cannot be estimated. That of lanes depends on their groups.
    """

    name: str
    stages: Sequence[tuple[str, Stage | None]]
    build: Callable[[Execution], Sequence[Artifact]]
    work: str = ""
    reads: Callable[[SearchSizes], int] = lambda sizes: 0
    writes: Callable[[SearchSizes], int] = lambda sizes: 0
    seconds: Callable[[SearchTimes], float | None] = lambda times: 0.0


@dataclass(frozen=True, kw_only=True)
class LaneStep(Step):
    """Lanes of one request of a strategy.

    Attributes:
        request: plans of these lanes, and the selection windows that they are scored on.
        plans: all plans of the allocator.
        scored: number of selection windows that a plan was scored on before, for every plan tried.
    """

    request: LaneRequest
    plans: tuple[SparsityPlan, ...]
    scored: Mapping[SparsityPlan, int]

    @property
    def tried(self) -> int:
        """Number of plans scored before."""
        return len(self.scored)


Answer = Sequence[Artifact | None]  # artifacts of a step, in the order of its stages
Steps = Generator[Step, Answer, Result]


@dataclass(frozen=True)
class Captured:
    """Inputs of the lanes of a search.

    Attributes:
        windows: windows by role; the test windows may be missing.
        linears: linears of the decoder layers, by layer.
        grams: Gram matrices, for a pruner that corrects weights or an allocator that measures them.
        plans: plans of the allocator, uniform first.
        recovery_windows: number of calibration windows on which lanes are recovered; None for all.
        criterion: what the plans are compared by.
        dense_states: output of the dense model on the selection windows; None if the criterion is not ``kl``.
    """

    checkpoint: Checkpoint
    windows: Mapping[Role, Artifact]
    linears: Sequence[Sequence[Linear]]
    pruning: PruneSettings
    capture: Artifact
    grams: Artifact | None
    plans: tuple[SparsityPlan, ...]
    recovery_windows: int | None = None
    criterion: Criterion = "perplexity"
    dense_states: Artifact | None = None

    @property
    def lane_pruning(self) -> PruneSettings:
        """Settings of the lanes that are compared: with training, they are only refitted."""
        return self.pruning.refitting

    @property
    def dense_perplexity(self) -> float:
        """Perplexity of the dense model on the selection windows."""
        return float(str(self.capture.facts[DENSE_PERPLEXITY]))

    def inputs(self, scored: Role, windows: tuple[int, int] | None = None) -> LaneInputs:
        """Return the inputs of lanes that are scored on all windows of a role, or on a range of them."""
        return LaneInputs(
            self.checkpoint,
            self.capture,
            self.windows["calibration"],
            self.windows[scored],
            self.grams,
            windows,
            self.recovery_windows,
            criterion=self.criterion,
            # On the other windows, the dense model is a lane of the group.
            dense_states=self.dense_states if scored == "selection" else None,
        )


@dataclass(frozen=True)
class Scored:
    """Lanes that a search has scored.

    Attributes:
        settings: settings of a search with exactly these lanes; ``stop_after`` is set if the time limit was reached.
        scores: scores of the lanes, uniform first.
    """

    settings: Search
    captured: Captured
    scores: Sequence[LaneScore]

    @property
    def best(self) -> LaneScore:
        """Lane that the criterion prefers."""
        return self.scores[compare(self.scores, self.captured.dense_perplexity).best]

    @property
    def uniform(self) -> LaneScore:
        """Lane in which all layers have the same sparsity."""
        return self.scores[0]

    def expert_rows(self, store: ArtifactStore) -> list[dict[str, Any]]:
        """Return the calibration tokens of the experts, see ``statistics_table.expert_rows``."""
        before = self.captured
        calibrates_itself = before.pruning.calibration_mode == "sequential"
        statistics = self.best.artifact if calibrates_itself else before.capture
        return expert_rows(store, statistics, before.pruning.prunable(before.linears), before.pruning)

    @property
    def plans_to_recover(self) -> dict[str, SparsityPlan]:
        """Uniform and best plan by role; only the best if they are equal."""
        both = {RECOVERED_UNIFORM: self.uniform.plan, RECOVERED_BEST: self.best.plan}
        return {RECOVERED_BEST: self.best.plan} if self.best == self.uniform else both


@dataclass(frozen=True)
class Chosen:
    """Outcome of a search.

    Attributes:
        exported: the pruned checkpoint; None if the search does not export.
        tested: evaluation on the test windows.
    """

    scored: Scored
    selection: Selection
    exported: Artifact | None
    tested: Artifact


def search_steps(
    store: ArtifactStore, settings: Search, inputs: SearchInputs, deadline: float = inf
) -> Steps[Chosen | None]:
    """Yield all steps of a search.

    Args:
        deadline: time after which no further lanes are started, on the clock ``time.monotonic``.
    """
    captured = yield from capture_steps(store, settings, inputs)
    scored = yield from lane_steps(store, settings, inputs, captured, deadline)
    return (yield from choice_steps(store, settings, scored))


def scoring_steps(store: ArtifactStore, settings: Search, inputs: SearchInputs) -> Steps[Scored | None]:
    """Yield the steps up to the scores of all lanes that the search's strategy requests."""
    captured = yield from capture_steps(store, settings, inputs)
    return (yield from lane_steps(store, settings, inputs, captured))


def capture_steps(store: ArtifactStore, settings: Search, inputs: SearchInputs) -> Steps[Captured | None]:
    """Yield the steps before the lanes: import, text windows, the pass of the dense model, plans."""
    checkpoint, linears, index = inputs.checkpoint, inputs.linears, inputs.index
    windows: dict[Role, Artifact] = {}

    def require_device(execution: Execution) -> None:
        plans = len(expected_plans(settings, inputs.linears))
        inputs.sizes(settings, plans).require_device(execution.torch_device)

    def build_checkpoint(execution: Execution) -> list[Artifact]:
        nonlocal checkpoint
        if checkpoint is None:
            require_device(execution)
        checkpoint = load_checkpoint(store, settings)
        return [checkpoint.artifact]

    yield Step(
        name="import_checkpoint",
        stages=[("checkpoint", inputs.import_stage)],
        build=build_checkpoint,
        work="import",
        reads=lambda sizes: sizes.files,
        writes=lambda sizes: 0 if sizes.index.in_place else sizes.files,
        seconds=lambda times: times.importing,
    )

    for role, request in inputs.texts.requests.items():

        def build_windows(execution: Execution, request: WindowRequest = request) -> list[Artifact]:
            return [sample_windows(store, known(checkpoint), request)]

        (sampled,) = yield Step(
            name=f"sample_tokens: {role}",
            stages=[(role, token_stage(inputs.texts.encoding_identity, request))],
            build=build_windows,
            work=f"cut {inputs.texts.windows[role]} windows of {settings.seqlen} tokens",
        )
        if sampled is not None:
            windows[role] = sampled
    calibration, selection = windows.get("calibration"), windows.get("selection")

    dtype = settings.dtype_for((index if checkpoint is None else checkpoint.index).dtype)
    capture_settings = CaptureSettings(dtype, settings.retain, settings.calibrate_on)
    stage = None
    if checkpoint is not None and calibration is not None and selection is not None:
        stage = capture_stage(checkpoint.identity, calibration, selection, capture_settings)

    by_kl = settings.criterion == "kl"

    def build_capture(execution: Execution) -> list[Artifact]:
        if store.find(known(stage)) is None:
            require_device(execution)
        texts = known(calibration), known(selection)
        return [capture(store, known(checkpoint), *texts, capture_settings, execution, by_kl)]

    (statistics,) = yield Step(
        name="capture",
        stages=[("capture", stage)],
        build=build_capture,
        work="run the dense model",
        reads=lambda sizes: sizes.weights,
        writes=lambda sizes: sizes.capture,
        seconds=lambda times: times.capture,
    )

    dense: Artifact | None = None
    if by_kl:
        was_captured = statistics is not None
        dense = yield from _dense_states_steps(store, checkpoint, selection, dtype, was_captured)
    grams: Artifact | None = None
    if settings.needs_grams:
        grams = yield from _grams_steps(store, settings, checkpoint, calibration, dtype)
    plans = yield from _plan_steps(store, settings, inputs, checkpoint, statistics, grams)
    if (
        checkpoint is None
        or calibration is None
        or selection is None
        or statistics is None
        or (settings.needs_grams and grams is None)
        or (by_kl and dense is None)
        or plans is None
    ):
        return None
    all_windows = inputs.texts.windows["calibration"]
    some_windows = settings.windows_to_recover_on(all_windows)
    recovery_windows = some_windows if some_windows < all_windows else None
    return Captured(
        checkpoint,
        windows,
        linears,
        settings.pruning(dtype),
        statistics,
        grams,
        plans,
        recovery_windows,
        settings.criterion,
        dense,
    )


def _dense_states_steps(
    store: ArtifactStore,
    checkpoint: Checkpoint | None,
    selection: Artifact | None,
    dtype: str,
    was_captured: bool,
) -> Steps[Artifact | None]:
    """Yield the step that keeps the output of the dense model on the selection windows.

    Args:
        was_captured: whether the capture existed before this run; otherwise it has kept this output.
    """
    stage = None
    if checkpoint is not None and selection is not None:
        stage = dense_states_stage(checkpoint.identity, selection, dtype)
    (dense,) = yield Step(
        name="dense_states",
        stages=[("dense states", stage)],
        build=lambda execution: [
            capture_dense_states(store, known(checkpoint), known(selection), dtype, execution)
        ],
        work="run the dense model on the selection windows" if was_captured else "keep them in the capture",
        reads=lambda sizes: sizes.weights if was_captured else 0,
        writes=lambda sizes: sizes.dense_states,
        seconds=lambda times: times.dense_states if was_captured else 0.0,
    )
    return dense


def _grams_steps(
    store: ArtifactStore,
    settings: Search,
    checkpoint: Checkpoint | None,
    calibration: Artifact | None,
    dtype: str,
) -> Steps[Artifact | None]:
    """Yield the step that collects the second moments of the linears' inputs."""
    how = settings.calibrate_on, settings.pruning(dtype).needs_sums
    stage = None
    if checkpoint is not None and calibration is not None:
        stage = grams_stage(checkpoint.identity, calibration, dtype, *how)
    (grams,) = yield Step(
        name="grams",
        stages=[("grams", stage)],
        build=lambda execution: [
            capture_grams(store, known(checkpoint), known(calibration), dtype, execution, *how)
        ],
        work="second moments of the linears' inputs, in the dense model",
        reads=lambda sizes: sizes.weights,
        writes=lambda sizes: sizes.grams,
        seconds=lambda times: times.grams,
    )
    return grams


def _plan_steps(
    store: ArtifactStore,
    settings: Search,
    inputs: SearchInputs,
    checkpoint: Checkpoint | None,
    statistics: Artifact | None,
    grams: Artifact | None,
) -> Steps[tuple[SparsityPlan, ...] | None]:
    """Yield the steps that measure the layers, if the allocator does, and that make the plans."""
    allocation, prunable = settings.allocation, settings.pruning("auto").prunable(inputs.linears)
    measured: Artifact | None = None
    scores: tuple[float, ...] = ()
    if is_measured(allocation.allocator):
        to_measure = allocation.allocator, allocation.granularity, prunable
        threshold = threshold_of(allocation.allocator, settings.pruner, settings.sparsity)
        stage = None
        if checkpoint is not None and statistics is not None and (grams or not settings.needs_grams):
            stage = measure_stage(checkpoint, statistics, grams, *to_measure, threshold)
        (measured,) = yield Step(
            name="measure",
            stages=[("measure", stage)],
            build=lambda execution: [
                measure(store, known(checkpoint), known(statistics), grams, *to_measure, execution, threshold)
            ],
            work=f"measure the layers for {allocation.allocator.method}",
            reads=lambda sizes: sum(sizes.index.layer_bytes) * (1 if threshold is None else 2),
            seconds=lambda times: None,  # the methods differ too much
        )
        if measured is not None:
            scores = read_scores(store, measured)

    plans_known = measured is not None or not is_measured(allocation.allocator)
    (allocated,) = yield Step(
        name="allocate",
        stages=[("allocate", allocate_stage(prunable, allocation, measured) if plans_known else None)],
        build=lambda execution: [allocate(store, prunable, allocation, measured)],
    )
    if not plans_known:
        return None
    return allocation.plans(prunable, scores) if allocated is None else read_plans(store, allocated)


def lane_steps(
    store: ArtifactStore,
    settings: Search,
    inputs: SearchInputs,
    captured: Captured | None,
    deadline: float = inf,
) -> Steps[Scored | None]:
    """Yield the lanes, request by request; each request depends on the losses of the earlier ones."""
    windows = inputs.texts.windows["selection"]
    if captured is None:
        plans = expected_plans(settings, inputs.linears)
        yield lane_step(store, None, plans, first_lanes(settings, plans, inputs.linears, windows))
        return None
    strategy = strategy_of(settings, captured.plans, captured.linears, windows)
    # For every plan, one score for each range of windows that it was scored on.
    rounds: dict[SparsityPlan, list[LaneScore]] = {}
    while request := strategy.next_lanes(losses_of(rounds)):
        scored = {plan: len(losses) for plan, losses in losses_of(rounds).items()}
        step = lane_step(store, captured, captured.plans, request, scored)
        is_late = is_too_late(len(rounds), deadline) and not request.continues
        if is_late and not any(store.find(known(stage)) for _, stage in step.stages):
            settings = stop_after_tried(settings, len(rounds))
            strategy = strategy_of(settings, captured.plans, captured.linears, windows)
            continue
        artifacts = yield step
        for plan, artifact in zip(request.plans, artifacts, strict=True):
            if artifact is None:
                return None
            rounds.setdefault(plan, []).append(read_score(store, plan, artifact))
    order = {plan: number for number, plan in enumerate(captured.plans)}
    # The sort is stable: plans made by the strategy follow those of the allocator, in the order of their trials.
    lanes = [rounds[plan] for plan in sorted(rounds, key=lambda plan: order.get(plan, len(order)))]
    if all(len(scores) == 1 for scores in lanes):
        return Scored(settings, captured, [score for (score,) in lanes])
    joined = yield Step(
        name="join_rounds",
        stages=[(role_of(scores[0].plan), joined_stage(scores)) for scores in lanes],
        build=lambda execution: [score.artifact for score in join_rounds(store, lanes)],
    )
    whole = [
        read_score(store, scores[0].plan, artifact)
        for scores, artifact in zip(lanes, joined, strict=True)
        if artifact is not None
    ]
    return Scored(settings, captured, whole) if len(whole) == len(lanes) else None


def lane_step(
    store: ArtifactStore,
    captured: Captured | None,
    plans: Sequence[SparsityPlan],
    request: LaneRequest,
    scored: Mapping[SparsityPlan, int] = MappingProxyType({}),
) -> LaneStep:
    """Return the step of one request.

    Args:
        captured: inputs of the lanes; None if they do not exist yet.
        plans: all plans of the allocator.
        scored: see ``LaneStep``.
    """
    inputs = None if captured is None else captured.inputs("selection", request.windows)

    def stage(plan: SparsityPlan) -> Stage | None:
        return None if inputs is None else lane_stage(plan, inputs, known(captured).lane_pruning)

    def build(execution: Execution) -> list[Artifact]:
        linears, pruning = known(captured).linears, known(captured).lane_pruning
        scores = branch(store, known(inputs), request.plans, linears, pruning, execution)
        return [score.artifact for score in scores]

    return LaneStep(
        name="branch",
        stages=[(role_of(plan), stage(plan)) for plan in request.plans],
        build=build,
        request=request,
        plans=tuple(plans),
        scored=scored,
    )


def choice_steps(store: ArtifactStore, settings: Search, scored: Scored | None) -> Steps[Chosen | None]:
    """Yield the steps after the lanes: choose a plan, export the model pruned by it, test it."""
    stage = None
    if scored is not None:
        dense, parameter = scored.captured.dense_perplexity, settings.parameter
        stage = select_stage(scored.scores, dense, parameter)
    (selected,) = yield Step(
        name="select",
        stages=[(SELECT, stage)],
        build=lambda execution: [select(store, known(scored).scores, dense, parameter)],
        work="choose the best plan",
    )

    recovered = None
    if settings.recover is not None:
        recovered = yield from _recovery_steps(store, scored)

    test = None
    if scored is not None and "test" in scored.captured.windows and (settings.recover is None or recovered):
        test = _test_stage(scored, recovered or ())
    exported = None
    if settings.export:
        exported = yield from _export_step(store, scored, recovered, test)
    in_one_pass = settings.export and exported is None
    (tested,) = yield Step(
        name="evaluate",
        stages=[(EVALUATE, test)],
        build=lambda execution: [_evaluate(store, known(scored), execution)],
        work="dense, uniform and best on the test windows",
        reads=lambda sizes: sizes.index.outer_bytes if in_one_pass else sizes.weights,
        seconds=lambda times: times.evaluation,
    )
    if scored is None or selected is None or tested is None or (settings.export and exported is None):
        return None
    return Chosen(scored, read_selection(store, selected), exported, tested)


def _export_step(
    store: ArtifactStore, scored: Scored | None, recovered: Sequence[Artifact] | None, test: Stage | None
) -> Steps[Artifact | None]:
    """Yield the export of the best plan, which also tests it in the same pass over the weights.

    Args:
        recovered: None without recovery.
        test: stage of the test; None if it is not known yet.
    """
    stage = None
    if scored is not None:
        before, recovery = scored.captured, None
        if recovered is not None and test is not None:
            recovery = RecoveredExport(recovered[-1], test.key, before.windows["test"])
        if (before.pruning.recover is None) == (recovery is None):
            lanes = scored.best, scored.uniform
            stage = export_stage(before.inputs("selection"), *lanes, before.pruning, recovery)
    (exported,) = yield Step(
        name="export",
        stages=[(EXPORT, stage)],
        build=lambda execution: [export_lane(store, known(scored), known(scored).best, execution)],
        work="write the pruned checkpoint",
        reads=lambda sizes: sizes.files,
        writes=lambda sizes: sizes.files,
        seconds=lambda times: times.export,
    )
    return exported


def _test_stage(scored: Scored, recovered: Sequence[Artifact]) -> Stage:
    """Describe the test of the dense, the uniform and the best model."""
    plans, keys = (scored.uniform.plan, scored.best.plan), [artifact.key for artifact in recovered]
    return evaluate_stage(scored.captured.inputs("test"), *plans, scored.captured.pruning, keys)


def _recovery_steps(store: ArtifactStore, scored: Scored | None) -> Steps[list[Artifact] | None]:
    """Yield the recovery of the uniform and of the best plan; return both artifacts, or one if the plans are equal."""
    stages: list[tuple[str, Stage | None]] = [(RECOVERED_UNIFORM, None), (RECOVERED_BEST, None)]
    if scored is not None:
        inputs, pruning = scored.captured.inputs("selection"), scored.captured.pruning
        stages = [
            (role, recovered_stage(plan, inputs, pruning)) for role, plan in scored.plans_to_recover.items()
        ]
    artifacts = yield Step(
        name="recover",
        stages=stages,
        build=lambda execution: _recover(
            store, known(scored), list(known(scored).plans_to_recover.values()), execution
        ),
        work=f"recover {'the best' if len(stages) == 1 else 'the uniform and the best'} plan",
        reads=lambda sizes: sizes.weights * len(stages),
        writes=lambda sizes: sum(sizes.index.layer_bytes) * len(stages),
        seconds=lambda times: times.recovery(len(stages)),
    )
    found = [artifact for artifact in artifacts if artifact is not None]
    return found if len(found) == len(stages) and scored is not None else None


def _recover(
    store: ArtifactStore, scored: Scored, plans: Sequence[SparsityPlan], execution: Execution
) -> list[Artifact]:
    before = scored.captured
    return recover(store, before.inputs("selection"), plans, before.linears, before.pruning, execution)


def export_lane(store: ArtifactStore, scored: Scored, lane: LaneScore, execution: Execution) -> Artifact:
    """Export the checkpoint pruned by the plan of ``lane``, and recovered if the search recovers, unless it exists.

    The test of the search, if it is missing, runs in the same pass over the weights.
    """
    before, recovery = scored.captured, None
    test = _test_stage(scored, _recovered_plans(store, scored, execution))
    if before.pruning.recover is not None:
        (recovered,) = _recover(store, scored, [lane.plan], execution)
        recovery = RecoveredExport(recovered, test.key, before.windows["test"])

    def run_test(watch: LayerWatch, execution: Execution) -> None:
        _evaluate(store, scored, execution, watch)

    inputs, lanes = before.inputs("selection"), (lane, scored.uniform)
    beside = run_test if store.find(test) is None else None
    return export(store, inputs, *lanes, before.linears, before.pruning, execution, recovery, beside)


def _recovered_plans(store: ArtifactStore, scored: Scored, execution: Execution) -> Sequence[Artifact]:
    """Return the recovered uniform and best plan; nothing without recovery."""
    if scored.captured.pruning.recover is None:
        return ()
    return _recover(store, scored, list(scored.plans_to_recover.values()), execution)


def _evaluate(
    store: ArtifactStore, scored: Scored, execution: Execution, watch: LayerWatch | None = None
) -> Artifact:
    before, plans = scored.captured, (scored.uniform.plan, scored.best.plan)
    keys = [artifact.key for artifact in _recovered_plans(store, scored, execution)]
    inputs = before.inputs("test"), *plans, before.linears, before.pruning, execution
    # Within the export, whose retries repeat both.
    task = evaluate if watch is None else evaluate.with_options(retries=0)
    return task(store, *inputs, keys, watch)


def run(steps: Steps[Result], answer: Callable[[Step], Answer]) -> Result:
    """Run a graph to its end.

    Args:
        answer: returns the artifacts of a step.
    """
    step = next(steps)
    while True:
        artifacts = answer(step)
        try:
            step = steps.send(artifacts)
        except StopIteration as end:
            result: Result = end.value
            return result


def known(value: Value | None) -> Value:
    """Return a value that an earlier step of the build has set."""
    assert value is not None, "a step is built after the steps that it depends on"
    return value


def role_of(plan: SparsityPlan) -> str:
    """Return the role of a plan's lane in the search's result."""
    return lane_role(plan.beta, plan.offset)


def losses_of(rounds: Mapping[SparsityPlan, Sequence[LaneScore]]) -> dict[SparsityPlan, list[float]]:
    """Return the loss of each plan, or with ``kl`` its divergence, on the selection windows seen so far, in nats."""
    return {plan: [value for score in scores for value in score.compared] for plan, scores in rounds.items()}


@stage_task(name="import_checkpoint", about=lambda settings, **_: title_of(settings.model))
def load_checkpoint(store: ArtifactStore, settings: Search) -> Checkpoint:
    """Import the model unless the store has it, and open it for reading.

    Raises:
        ValueError: the model cannot be pruned.
    """
    return import_checkpoint(store, settings.model)


@stage_task(
    name="sample_tokens", about=lambda checkpoint, request, **_: f"{model_title(checkpoint)}: {request.role}"
)
def sample_windows(store: ArtifactStore, checkpoint: Checkpoint, request: WindowRequest) -> Artifact:
    """Cut the token windows of one role. Roles that share a text never share windows."""
    return sample_tokens(store, checkpoint.tokenizer, checkpoint.encoding_identity, request)
