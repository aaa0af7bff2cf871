"""The stages of a search, one after the other; those that the store has are not run again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flows.next_lanes import LaneRequest, follow, strategy_of
from flows.settings import Search
from flows.token_requests import token_requests
from layerwise.skeleton import Linear
from storage.artifact import Artifact
from storage.store import ArtifactStore
from tasks.allocate import allocate, read_plans
from tasks.branch import LaneScore, branch
from tasks.capture import DENSE_PERPLEXITY, CaptureSettings, capture
from tasks.capture_grams import capture_grams
from tasks.checkpoint import Checkpoint
from tasks.documents import Role
from tasks.evaluate import evaluate
from tasks.execution import Execution
from tasks.export import export
from tasks.import_checkpoint import import_checkpoint, import_stage, inspect_source
from tasks.join_rounds import join_rounds
from tasks.lane_group import LaneInputs, PruneSettings
from tasks.run_names import model_title, title_of
from tasks.sample_tokens import TokenRequest, sample_tokens
from tasks.select import Selection, read_selection, select
from tasks.stage_task import stage_task
from tasks.streamed import layer_sizes_of, linears_by_layer


@dataclass(frozen=True)
class Captured:
    """All that comes before the betas."""

    checkpoint: Checkpoint
    windows: Mapping[Role, Artifact]
    linears: Sequence[Sequence[Linear]]
    pruning: PruneSettings
    allocation: Artifact
    capture: Artifact
    grams: Artifact | None  # for a pruner that corrects weights

    def inputs(self, scored: Role, windows: tuple[int, int] | None = None) -> LaneInputs:
        """What lanes read that are scored on the windows of this role, or on some of them."""
        windows_of = self.windows["calibration"], self.windows[scored]
        return LaneInputs(self.checkpoint, self.capture, *windows_of, self.grams, windows)


@dataclass(frozen=True)
class Chosen:
    """What came out in the end."""

    captured: Captured
    scores: Sequence[LaneScore]
    selected: Artifact
    selection: Selection
    exported: Artifact
    tested: Artifact


def captured(store: ArtifactStore, settings: Search, execution: Execution) -> Captured:
    """Import the model, sample the windows, make the plans, run the dense model."""
    requests = token_requests(settings)
    checkpoint = load_checkpoint(store, settings)
    windows = sample_windows(store, checkpoint, requests)
    linears = linears_by_layer(checkpoint.index, settings.seqlen)
    dtype = checkpoint.index.dtype if settings.dtype == "auto" else settings.dtype
    allocation = allocate(store, layer_sizes_of(linears), settings.allocation)
    capture_settings = CaptureSettings(dtype, settings.retain)
    capture_artifact = capture(
        store, checkpoint, windows["calibration"], windows["selection"], capture_settings, execution
    )
    pruning = settings.pruning(dtype)
    grams = None
    if pruning.needs_grams:
        grams = capture_grams(store, checkpoint, windows["calibration"], dtype, execution)
    return Captured(checkpoint, windows, linears, pruning, allocation, capture_artifact, grams)


def scored(
    store: ArtifactStore,
    settings: Search,
    execution: Execution,
    betas: Sequence[float],
    windows: tuple[int, int] | None,
) -> list[LaneScore]:
    """Prune and score one lane per beta, in one group.

    Args:
        betas: some of the search's.
        windows: of the selection windows, these; None for all of them.

    Raises:
        ValueError: one of ``betas`` is none of the search's.
    """
    before = captured(store, settings, execution)
    plans = read_plans(store, before.allocation)
    if unknown := set(betas) - {plan.beta for plan in plans}:
        raise ValueError(
            f"betas {sorted(unknown)} are none of this search's, which are {[plan.beta for plan in plans]}. "
            "Give some of these, or leave betas empty."
        )
    chosen = tuple(plan for plan in plans if plan.beta in betas)
    return branch(
        store, before.inputs("selection", windows), chosen, before.linears, before.pruning, execution
    )


def all_scored(
    store: ArtifactStore, settings: Search, execution: Execution
) -> tuple[Captured, list[LaneScore]]:
    """Prune and score what the search's strategy asks for, request by request.

    Returns:
        The lanes that were tried, by rising beta, the uniform one first.
    """
    before = captured(store, settings, execution)
    plans = read_plans(store, before.allocation)

    def advance(request: LaneRequest) -> list[LaneScore]:
        inputs = before.inputs("selection", request.windows)
        wanted = [plans[number] for number in request.plans]
        return branch(store, inputs, wanted, before.linears, before.pruning, execution)

    lanes, _ = follow(strategy_of(settings, plans, before.windows["selection"]), advance)
    if all(len(rounds) == 1 for rounds in lanes):
        return before, [score for (score,) in lanes]
    return before, join_rounds(store, lanes)


def chosen(store: ArtifactStore, settings: Search, execution: Execution) -> Chosen:
    """Score all betas, choose the best, export the model pruned by it, and test it."""
    before, scores = all_scored(store, settings, execution)
    selected = select(store, scores, float(str(before.capture.facts[DENSE_PERPLEXITY])))
    selection = read_selection(store, selected)
    best, uniform = scores[selection.best], scores[0]
    exported = export(
        store, before.inputs("selection"), best, uniform, before.linears, before.pruning, execution
    )
    tested = evaluate(
        store, before.inputs("test"), uniform.plan, best.plan, before.linears, before.pruning, execution
    )
    return Chosen(before, scores, selected, selection, exported, tested)


@stage_task(name="import_checkpoint", about=lambda settings, **_: title_of(settings.model))
def load_checkpoint(store: ArtifactStore, settings: Search) -> Checkpoint:
    """Import the model unless the store has it; open it for reading.

    Raises:
        ValueError: a model that cannot be pruned, or betas that its depth does not allow; before anything is
        copied.
    """
    if store.find(import_stage(settings.model)) is None:
        sizes = layer_sizes_of(linears_by_layer(inspect_source(settings.model), settings.seqlen))
        settings.allocation.plans(sizes)
    return import_checkpoint(store, settings.model)


@stage_task(name="sample_tokens", about=lambda checkpoint, **_: model_title(checkpoint))
def sample_windows(
    store: ArtifactStore, checkpoint: Checkpoint, requests: Mapping[Role, TokenRequest]
) -> dict[Role, Artifact]:
    """Token windows for calibration, selection and test; where they share a corpus they never overlap."""
    return {
        role: sample_tokens(store, checkpoint.tokenizer, checkpoint.tokenizer_identity, request)
        for role, request in requests.items()
    }
