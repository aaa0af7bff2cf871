"""What of a search is in the store already: looked up, nothing is built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from layerwise.allocators.allocation import SparsityPlan
from layerwise.flows.pipeline.lane_requests import LaneRequest, Strategy, follow, strategy_of
from layerwise.flows.pipeline.stages import SearchInputs, look_at_inputs
from layerwise.flows.settings import Search
from layerwise.models.skeleton import Linear
from layerwise.storage.artifact import Artifact
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.allocate import allocate_stage
from layerwise.tasks.branch import joined_stage, lane_stage
from layerwise.tasks.capture import CaptureSettings, capture_stage
from layerwise.tasks.capture_grams import grams_stage
from layerwise.tasks.evaluate import evaluate_stage
from layerwise.tasks.export import export_stage
from layerwise.tasks.lanes.lane_group import LaneInputs
from layerwise.tasks.lanes.prune_settings import PruneSettings
from layerwise.tasks.measure import is_measured, measure_stage, read_scores
from layerwise.tasks.models.checkpoint import Checkpoint
from layerwise.tasks.results.lane_scores import LaneScore, read_score
from layerwise.tasks.results.search_result import lane_role
from layerwise.tasks.results.selection import DENSE_PERPLEXITY
from layerwise.tasks.sample_tokens import token_stage
from layerwise.tasks.select import compare, select_stage

CAPTURED = ("checkpoint", "calibration", "selection", "test", "capture")
CHOSEN = ("select", "export", "evaluate")


@dataclass(frozen=True)
class Found:
    """What a look into the store brought.

    Attributes:
        stages: artifacts by role, as a search's result names them; None for what is missing, and for what can only be
            known by something that is missing.
        inputs: the model and the texts.
        plans: those of the allocator; empty if they cannot be known yet.
        tried: how many plans are scored before those.
        request: the lanes that are to be scored next; None if there is no capture, or all are.
        lanes: their stages.
    """

    stages: dict[str, Artifact | None]
    inputs: SearchInputs
    plans: tuple[SparsityPlan, ...] = ()
    tried: int = 0
    request: LaneRequest | None = None
    lanes: tuple[Stage, ...] = ()
    missing_lanes: tuple[int, ...] = ()  # positions in ``lanes`` of those that are not there

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The model, if it is imported."""
        return self.inputs.checkpoint

    @property
    def linears(self) -> Sequence[Sequence[Linear]]:
        """The prunable weights, by layer."""
        return self.inputs.linears

    @property
    def is_captured(self) -> bool:
        """Whether all is there that the lanes read, and so it is known which they are."""
        read = [self.stages[role] for role in ("capture", "grams", "measure") if role in self.stages]
        return bool(self.plans) and None not in read

    @property
    def requested(self) -> list[SparsityPlan]:
        """The plans of ``lanes``."""
        return [] if self.request is None else list(self.request.plans)

    @property
    def missing(self) -> list[str]:
        """Roles of what is not there, as far as it can be known."""
        return [role for role, artifact in self.stages.items() if artifact is None]


def _role_of(plan: SparsityPlan) -> str:
    return lane_role(plan.beta, plan.offset)


def look_up(store: ArtifactStore, settings: Search) -> Found:
    """Look which artifacts of a search the store has.

    Raises:
        ValueError: for settings that a search would refuse.
        Damaged: an artifact that was to be looked into is damaged.
        OSError: the model, a text or the store cannot be reached.
    """
    ends = [role for role in CHOSEN if role != "export" or settings.export]
    stages: dict[str, Artifact | None] = dict.fromkeys((*_roles_before(settings), *ends))
    inputs = look_at_inputs(store, settings)
    for role, request in inputs.texts.requests.items():
        stages[role] = store.find(token_stage(inputs.texts.encoding_identity, request))
    checkpoint, linears = inputs.checkpoint, inputs.linears
    if checkpoint is None:
        return Found(stages, inputs)
    stages["checkpoint"] = checkpoint.artifact
    found = _look_up_captured(store, settings, Found(stages, inputs))
    capture, calibration, selection = (stages[role] for role in ("capture", "calibration", "selection"))
    if not found.is_captured or capture is None or calibration is None or selection is None:
        return found
    pruning = settings.pruning(settings.dtype_for(checkpoint.index.dtype))
    lane_inputs = LaneInputs(checkpoint, capture, calibration, selection, stages.get("grams"))
    strategy = strategy_of(settings, found.plans, linears, inputs.texts.windows["selection"])
    return _look_up_lanes(store, lane_inputs, pruning, strategy, settings.parameter, found)


def _roles_before(settings: Search) -> list[str]:
    """Roles of all that comes before the lanes, in the order in which it is made."""
    optional = {"grams": settings.needs_grams, "measure": is_measured(settings.allocator)}
    return [*CAPTURED, *(role for role, wanted in optional.items() if wanted), "allocate"]


def _look_up_captured(store: ArtifactStore, settings: Search, found: Found) -> Found:
    """Go on from the windows; notes what is there in ``found.stages``."""
    stages, checkpoint = found.stages, found.checkpoint
    assert checkpoint is not None, "it was imported"
    dtype, allocation = settings.dtype_for(checkpoint.index.dtype), settings.allocation
    prunable = settings.pruning(dtype).prunable(found.linears)
    calibration, selection = stages["calibration"], stages["selection"]
    if calibration is not None and selection is not None:
        how = CaptureSettings(dtype, settings.retain)
        stages["capture"] = store.find(capture_stage(checkpoint.identity, calibration, selection, how))
    if calibration is not None and settings.needs_grams:
        stages["grams"] = store.find(grams_stage(checkpoint.identity, calibration, dtype))
    measured = None
    if is_measured(allocation.allocator):
        capture, grams = stages["capture"], stages.get("grams")
        if capture is None or (settings.needs_grams and grams is None):
            return found
        stage = measure_stage(
            checkpoint, capture, grams, allocation.allocator, allocation.by_linear, prunable
        )
        measured = stages["measure"] = store.find(stage)
        if measured is None:
            return found
    stages["allocate"] = store.find(allocate_stage(prunable, allocation, measured))
    scores = () if measured is None else read_scores(store, measured)
    return replace(found, plans=allocation.plans(prunable, scores))


def _look_up_lanes(
    store: ArtifactStore,
    inputs: LaneInputs,
    pruning: PruneSettings,
    strategy: Strategy,
    parameter: str,
    found: Found,
) -> Found:
    """Go on from what comes before the lanes."""
    stages: list[Stage] = []
    lanes: list[Artifact | None] = []

    def look(request: LaneRequest) -> list[LaneScore] | None:
        part = replace(inputs, windows=request.windows)
        stages[:] = [lane_stage(plan, part, pruning) for plan in request.plans]
        lanes[:] = [store.find(stage) for stage in stages]
        there = [lane for lane in lanes if lane is not None]
        if len(there) < len(lanes):
            return None
        return [read_score(store, plan, lane) for plan, lane in zip(request.plans, there, strict=True)]

    scores, request = follow(strategy, look)
    roles, joined = _joined(store, scores)
    ends: dict[str, Artifact | None] = {role: None for role in found.stages if role in CHOSEN}
    if request is not None:
        roles |= {_role_of(plan): None for plan in request.plans}
        missing = tuple(number for number, lane in enumerate(lanes) if lane is None)
        found = replace(found, tried=len(scores), request=request, lanes=tuple(stages), missing_lanes=missing)
    elif joined:
        ends |= _look_up_ends(store, inputs, pruning, joined, parameter, found)
    before = {role: artifact for role, artifact in found.stages.items() if role not in CHOSEN}
    return replace(found, stages=before | roles | ends)


def _joined(
    store: ArtifactStore, lanes: Sequence[Sequence[LaneScore]]
) -> tuple[dict[str, Artifact | None], list[LaneScore]]:
    """The lanes' artifacts by role, each joined from its parts; and their scores, if all of them are there."""
    roles, scores = dict[str, Artifact | None](), list[LaneScore]()
    in_rounds = any(len(rounds) > 1 for rounds in lanes)
    for rounds in lanes:
        plan = rounds[0].plan
        artifact = store.find(joined_stage(rounds)) if in_rounds else rounds[0].artifact
        roles[_role_of(plan)] = artifact
        if artifact is not None:
            scores.append(read_score(store, plan, artifact) if in_rounds else rounds[0])
    return roles, scores if len(scores) == len(lanes) else []


def _look_up_ends(
    store: ArtifactStore,
    inputs: LaneInputs,
    pruning: PruneSettings,
    scores: Sequence[LaneScore],
    parameter: str,
    found: Found,
) -> dict[str, Artifact | None]:
    """What comes after the lanes."""
    dense = float(str(inputs.capture.facts[DENSE_PERPLEXITY]))
    chosen, uniform = scores[compare(scores, dense).best], scores[0]
    stages = {"select": store.find(select_stage(scores, dense, parameter))}
    if "export" in found.stages:
        stages["export"] = store.find(export_stage(inputs, chosen, uniform, pruning))
    if test := found.stages["test"]:
        testing = replace(inputs, scored=test)
        stages["evaluate"] = store.find(evaluate_stage(testing, uniform.plan, chosen.plan, pruning))
    return stages
