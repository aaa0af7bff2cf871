"""The stages of a search, one after the other; those that the store has are not run again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

from layerwise.allocators.allocation import SparsityPlan
from layerwise.flows.pipeline.lane_requests import LaneRequest, first_lanes, follow, strategy_of
from layerwise.flows.pipeline.time_budget import is_too_late, stopped
from layerwise.flows.pipeline.window_requests import Texts, count_texts, open_corpora
from layerwise.flows.settings import Search
from layerwise.models.skeleton import Linear
from layerwise.storage.artifact import Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.allocate import allocate, read_plans
from layerwise.tasks.branch import branch, join_rounds, lane_stage
from layerwise.tasks.capture import CaptureSettings, capture
from layerwise.tasks.capture_grams import capture_grams
from layerwise.tasks.evaluate import evaluate
from layerwise.tasks.export import export
from layerwise.tasks.import_checkpoint import import_checkpoint, import_stage, inspect_source
from layerwise.tasks.lanes.lane_group import LaneInputs
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.measure import is_measured, measure
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.models.checkpoint_index import CheckpointIndex
from layerwise.tasks.models.streamed import linears_by_layer
from layerwise.tasks.models.tokenizer import tokenizer_of_source
from layerwise.tasks.results.lane_scores import LaneScore
from layerwise.tasks.results.run_names import model_title, title_of
from layerwise.tasks.results.selection import DENSE_PERPLEXITY, Selection, read_selection
from layerwise.tasks.running.execution import Execution
from layerwise.tasks.running.stage_task import stage_task
from layerwise.tasks.sample_tokens import TokenRequest, sample_tokens
from layerwise.tasks.select import select
from layerwise.tasks.sources.model_config import config_from_document
from layerwise.tasks.texts.documents import Role


@dataclass(frozen=True)
class SearchInputs:
    """The model and the texts of a search, before anything is computed.

    Attributes:
        checkpoint: the model, if it is imported.
        index: its configuration and the shapes of its tensors, imported or not.
        linears: its prunable weights, by layer.
        texts: the windows that each text gives.
    """

    checkpoint: Checkpoint | None
    index: CheckpointIndex
    linears: Sequence[Sequence[Linear]]
    texts: Texts


EXAMPLES = 8  # linears that an error names: those of a layer


@dataclass(frozen=True)
class Captured:
    """All that comes before the betas."""

    checkpoint: Checkpoint
    windows: Mapping[Role, Artifact]
    linears: Sequence[Sequence[Linear]]
    pruning: PruneSettings
    capture: Artifact
    grams: Artifact | None  # for a pruner that corrects weights, or an allocator that goes by second moments
    measured: Artifact | None  # for an allocator that goes by the layers' weights
    allocation: Artifact

    @property
    def artifacts(self) -> dict[str, Artifact]:
        """All of it, by role."""
        of_some = {"grams": self.grams, "measure": self.measured}
        there = {role: artifact for role, artifact in of_some.items() if artifact is not None}
        windows = {str(role): windows for role, windows in self.windows.items()}
        own = {"checkpoint": self.checkpoint.artifact, **windows, "capture": self.capture}
        return own | there | {"allocate": self.allocation}

    def inputs(self, scored: Role, windows: tuple[int, int] | None = None) -> LaneInputs:
        """What lanes read that are scored on the windows of this role, or on some of them."""
        windows_of = self.windows["calibration"], self.windows[scored]
        return LaneInputs(self.checkpoint, self.capture, *windows_of, self.grams, windows)


@dataclass(frozen=True)
class Chosen:
    """What came out in the end.

    Attributes:
        settings: the search of which all is done: where its time was over, the one that stops there.
    """

    settings: Search
    captured: Captured
    scores: Sequence[LaneScore]
    selected: Artifact
    selection: Selection
    exported: Artifact | None
    tested: Artifact


def captured(store: ArtifactStore, settings: Search, execution: Execution) -> Captured:
    """Import the model, sample the windows, run the dense model, make the plans."""
    inputs = check_inputs(store, settings)
    checkpoint = load_checkpoint(store, settings)
    windows = sample_windows(store, checkpoint, inputs.texts.requests)
    linears = inputs.linears
    dtype = settings.dtype_for(checkpoint.index.dtype)
    capture_settings = CaptureSettings(dtype, settings.retain)
    capture_artifact = capture(
        store, checkpoint, windows["calibration"], windows["selection"], capture_settings, execution
    )
    pruning, allocation = settings.pruning(dtype), settings.allocation
    prunable = pruning.prunable(linears)
    grams = measured = None
    if settings.needs_grams:
        grams = capture_grams(store, checkpoint, windows["calibration"], dtype, execution)
    if is_measured(allocation.allocator):
        how = allocation.allocator, allocation.by_linear
        measured = measure(store, checkpoint, capture_artifact, grams, *how, prunable, execution)
    plans = allocate(store, prunable, allocation, measured)
    return Captured(checkpoint, windows, linears, pruning, capture_artifact, grams, measured, plans)


def scored(
    store: ArtifactStore,
    settings: Search,
    execution: Execution,
    points: Sequence[tuple[float, float]],
    windows: tuple[int, int] | None,
    layers: Sequence[tuple[float | tuple[float, ...], ...]] | None = None,
) -> list[LaneScore]:
    """Prune and score one lane per plan, in one group.

    Args:
        points: beta and offset of some of the search's plans.
        windows: of the selection windows, these; None for all of them.
        layers: sparsities of the plans, where the strategy makes them.

    Raises:
        ValueError: one of ``points`` is none of the search's.
    """
    before = captured(store, settings, execution)
    inputs = before.inputs("selection", windows)
    if layers is not None:
        made = [SparsityPlan(beta, each) for (beta, _), each in zip(points, layers, strict=True)]
        return branch(store, inputs, made, before.linears, before.pruning, execution)
    plans = {(plan.beta, plan.offset): plan for plan in read_plans(store, before.allocation)}
    if unknown := set(points) - set(plans):
        raise ValueError(
            f"(beta, offset) {sorted(unknown)} are none of this search's, which are {sorted(plans)}. "
            "Give some of these, or leave betas empty."
        )
    chosen = [plans[point] for point in points]
    return branch(store, inputs, chosen, before.linears, before.pruning, execution)


def all_scored(
    store: ArtifactStore, settings: Search, execution: Execution
) -> tuple[Captured, list[LaneScore]]:
    """Prune and score what the search's strategy asks for, request by request.

    Returns:
        The lanes that were tried, the uniform one first.
    """
    before, scores, _ = _scored_in_time(store, settings, execution, inf)
    return before, scores


def _scored_in_time(
    store: ArtifactStore, settings: Search, execution: Execution, end: float
) -> tuple[Captured, list[LaneScore], LaneRequest | None]:
    """As ``all_scored``, with the request that it was too late for; None if there was none.

    Args:
        end: no request is begun any more from then on, on the clock ``time.monotonic``.
    """
    before = captured(store, settings, execution)
    plans = read_plans(store, before.allocation)

    tried: set[SparsityPlan] = set()

    def advance(request: LaneRequest) -> list[LaneScore] | None:
        inputs = before.inputs("selection", request.windows)
        if is_too_late(len(tried), end):
            lanes = (lane_stage(plan, inputs, before.pruning) for plan in request.plans)
            if not any(map(store.find, lanes)):
                return None
        tried.update(request.plans)
        return branch(store, inputs, request.plans, before.linears, before.pruning, execution)

    windows = int(str(before.windows["selection"].facts["windows"]))
    lanes, left = follow(strategy_of(settings, plans, before.linears, windows), advance)
    if all(len(rounds) == 1 for rounds in lanes):
        return before, [score for (score,) in lanes], left
    return before, join_rounds(store, lanes), left


def chosen(store: ArtifactStore, settings: Search, execution: Execution, end: float = inf) -> Chosen:
    """Score all plans, choose the best, export the model pruned by it if that is wanted, and test it.

    Args:
        end: no plans are begun any more from then on, on the clock ``time.monotonic``.
    """
    before, scores, left = _scored_in_time(store, settings, execution, end)
    if left is not None:
        settings = stopped(settings, len(scores))
    dense = float(str(before.capture.facts[DENSE_PERPLEXITY]))
    selected = select(store, scores, dense, settings.parameter)
    selection = read_selection(store, selected)
    best, uniform = scores[selection.best], scores[0]
    exported = None
    if settings.export:
        inputs = before.inputs("selection")
        exported = export(store, inputs, best, uniform, before.linears, before.pruning, execution)
    tested = evaluate(
        store, before.inputs("test"), uniform.plan, best.plan, before.linears, before.pruning, execution
    )
    return Chosen(settings, before, scores, selected, selection, exported, tested)


def check_plans(settings: Search, linears: Sequence[Sequence[Linear]]) -> None:
    """Refuse plans that this model does not allow, as far as that can be known from its shape.

    Raises:
        ValueError: betas outside of their legal range, nothing to prune, inputs that no N:M pattern divides.
    """
    pruning = settings.pruning("auto")
    prunable = pruning.prunable(linears)
    names = [f"{index}.{linear.name}" for index, layer in enumerate(linears) for linear in layer]
    left = sum(map(len, prunable))
    if settings.exclude is not None and left in (0, len(names)):
        found = "every one" if left == 0 else "none"
        raise ValueError(
            f"exclude is {settings.exclude!r}, which is found in {found} of the model's {len(names)} linears, such as "
            f"{', '.join(names[:EXAMPLES])}. Correct the expression, or leave it out."
        )
    if not all(prunable):
        empty = [index for index, layer in enumerate(prunable) if not layer]
        raise ValueError(
            f"{settings.exclude!r} leaves nothing to prune in the layers {empty}: every layer needs a linear. Exclude "
            "fewer of them."
        )
    for index, layer in enumerate(prunable):
        for linear in layer:
            if pruning.group is not None and linear.in_features % pruning.group:
                raise ValueError(
                    f"layer {index}, {linear.name} has {linear.in_features} inputs, which the pattern "
                    f"{settings.pattern} does not divide. Use another M, or exclude it (--exclude '{linear.name}')."
                )
    first_lanes(settings, expected_plans(settings, linears), linears, None)


def expected_plans(settings: Search, linears: Sequence[Sequence[Linear]]) -> tuple[SparsityPlan, ...]:
    """The plans, as many as there will be: what an allocator will measure is not known yet, and taken for equal."""
    prunable = settings.pruning("auto").prunable(linears)
    entries = sum(map(len, prunable)) if settings.granularity == "linear" else len(prunable)
    return settings.allocation.plans(prunable, (0.0,) * entries)


def look_at_inputs(store: ArtifactStore, settings: Search) -> SearchInputs:
    """Look at the model and the texts of a search, and refuse what cannot work. Imports and writes nothing.

    Raises:
        ValueError: a model that cannot be pruned; plans, windows or a tokenizer that do not fit it; a text that is too
            short or cannot be read.
        OSError: the model, a text or the store cannot be reached.
    """
    corpora = open_corpora(settings)
    checkpoint = None
    if store.find(import_stage(settings.model)) is not None:
        checkpoint = import_checkpoint(store, settings.model)
    index = inspect_source(settings.model) if checkpoint is None else checkpoint.index
    linears = linears_by_layer(index, settings.seqlen)
    check_plans(settings, linears)
    vocabulary = config_from_document(index.config, settings.model).get_text_config().vocab_size
    if checkpoint is None:
        tokenizer = tokenizer_of_source(settings.model)
        how = tokenizer.encoding_identity, tokenizer.load
    else:
        how = checkpoint.encoding_identity, checkpoint.tokenizer
    return SearchInputs(checkpoint, index, linears, count_texts(store, settings, corpora, *how, vocabulary))


@stage_task(name="check_inputs", about=lambda settings, **_: title_of(settings.model))
def check_inputs(store: ArtifactStore, settings: Search) -> SearchInputs:
    """Check the model and the texts before anything is imported; keep what was counted.

    Raises:
        ValueError: as ``look_at_inputs``.
        OSError: as ``look_at_inputs``.
    """
    inputs = look_at_inputs(store, settings)
    inputs.texts.keep(store)
    return inputs


@stage_task(name="import_checkpoint", about=lambda settings, **_: title_of(settings.model))
def load_checkpoint(store: ArtifactStore, settings: Search) -> Checkpoint:
    """Import the model unless the store has it; open it for reading.

    Raises:
        ValueError: a model that cannot be pruned.
    """
    return import_checkpoint(store, settings.model)


@stage_task(name="sample_tokens", about=lambda checkpoint, **_: model_title(checkpoint))
def sample_windows(
    store: ArtifactStore, checkpoint: Checkpoint, requests: Mapping[Role, TokenRequest]
) -> dict[Role, Artifact]:
    """Token windows for calibration, selection and test; where they share a corpus they never overlap."""
    return {
        role: sample_tokens(store, checkpoint.tokenizer, checkpoint.encoding_identity, request)
        for role, request in requests.items()
    }
