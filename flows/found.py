"""What of a search is in the store already: looked up, nothing is built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flows.next_lanes import LaneRequest, Strategy, follow, strategy_of
from flows.settings import Search
from flows.token_requests import token_requests
from layerwise.allocation import SparsityPlan
from layerwise.skeleton import Linear
from storage.artifact import Artifact
from storage.stage import Stage
from storage.store import ArtifactStore
from tasks.allocate import allocate_stage
from tasks.branch import LaneScore, lane_stage, read_score
from tasks.capture import DENSE_PERPLEXITY, CaptureSettings, capture_stage
from tasks.checkpoint import Checkpoint
from tasks.evaluate import evaluate_stage
from tasks.export import export_stage
from tasks.import_checkpoint import import_checkpoint, import_stage
from tasks.join_rounds import joined_stage
from tasks.lane_group import LaneInputs, PruneSettings
from tasks.sample_tokens import token_stage
from tasks.select import compare, select_stage
from tasks.streamed import layer_sizes_of, linears_by_layer

CAPTURED = ("checkpoint", "calibration", "selection", "test", "allocate", "capture")
CHOSEN = ("select", "export", "evaluate")


@dataclass(frozen=True)
class Found:
    """What a look into the store brought.

    Attributes:
        stages: artifacts by role, as a search's result names them; None for what is missing, and for what can only be
            known by something that is missing.
        checkpoint: the model, if it is imported.
        linears: the prunable weights by layer; empty if it is not.
        plans: one per beta that may be tried; empty if it is not.
        request: the lanes that are to be scored next; None if there is no capture, or all are.
        lanes: their stages.
    """

    stages: dict[str, Artifact | None]
    checkpoint: Checkpoint | None = None
    linears: Sequence[Sequence[Linear]] = ()
    plans: tuple[SparsityPlan, ...] = ()
    request: LaneRequest | None = None
    lanes: tuple[Stage, ...] = ()
    missing_lanes: tuple[int, ...] = ()  # positions in ``lanes`` of those that are not there

    @property
    def requested(self) -> list[SparsityPlan]:
        """The plans of ``lanes``."""
        return [] if self.request is None else [self.plans[number] for number in self.request.plans]

    @property
    def missing(self) -> list[str]:
        """Roles of what is not there, as far as it can be known."""
        return [role for role, artifact in self.stages.items() if artifact is None]


def lane_role(plan: SparsityPlan) -> str:
    """What a lane is called in a search's result."""
    return f"lane beta {plan.beta:.12g}"


def look_up(store: ArtifactStore, settings: Search) -> Found:
    """Look which artifacts of a search the store has.

    Raises:
        ValueError: for settings that a search would refuse.
        Damaged: an artifact that was to be looked into is damaged.
        OSError: the model, a text or the store cannot be reached.
    """
    stages: dict[str, Artifact | None] = dict.fromkeys((*CAPTURED, *CHOSEN))
    requests = token_requests(settings)
    if store.find(import_stage(settings.model)) is None:
        return Found(stages)
    checkpoint = import_checkpoint(store, settings.model)
    linears = linears_by_layer(checkpoint.index, settings.seqlen)
    plans = settings.allocation.plans(layer_sizes_of(linears))
    dtype = checkpoint.index.dtype if settings.dtype == "auto" else settings.dtype
    stages["checkpoint"] = checkpoint.artifact
    for role, request in requests.items():
        stages[role] = store.find(token_stage(checkpoint.tokenizer_identity, request))
    stages["allocate"] = store.find(allocate_stage(layer_sizes_of(linears), settings.allocation))
    calibration, selection = stages["calibration"], stages["selection"]
    if calibration is None or selection is None:
        return Found(stages, checkpoint, linears, plans)
    capture = CaptureSettings(dtype, settings.retain)
    captured = store.find(capture_stage(checkpoint.identity, calibration, selection, capture))
    stages["capture"] = captured
    if captured is None:
        return Found(stages, checkpoint, linears, plans)
    inputs = LaneInputs(checkpoint, captured, calibration, selection)
    found = Found(stages, checkpoint, linears, plans)
    strategy = strategy_of(settings, plans, selection)
    return _look_up_lanes(store, inputs, settings.pruning(dtype), strategy, found)


def _look_up_lanes(
    store: ArtifactStore, inputs: LaneInputs, pruning: PruneSettings, strategy: Strategy, found: Found
) -> Found:
    """Go on from what comes before the lanes."""
    stages: list[Stage] = []
    lanes: list[Artifact | None] = []

    def look(request: LaneRequest) -> list[LaneScore] | None:
        asked = [found.plans[number] for number in request.plans]
        part = replace(inputs, windows=request.windows)
        stages[:] = [lane_stage(plan, part, pruning) for plan in asked]
        lanes[:] = [store.find(stage) for stage in stages]
        there = [lane for lane in lanes if lane is not None]
        if len(there) < len(lanes):
            return None
        return [read_score(store, plan, lane) for plan, lane in zip(asked, there, strict=True)]

    scores, request = follow(strategy, look)
    roles, joined = _joined(store, scores)
    ends: dict[str, Artifact | None] = dict.fromkeys(CHOSEN)
    if request is not None:
        roles |= {lane_role(found.plans[number]): None for number in request.plans}
        missing = tuple(number for number, lane in enumerate(lanes) if lane is None)
        found = replace(found, request=request, lanes=tuple(stages), missing_lanes=missing)
    elif joined:
        ends |= _look_up_ends(store, inputs, pruning, joined, found)
    return replace(found, stages={role: found.stages[role] for role in CAPTURED} | roles | ends)


def _joined(
    store: ArtifactStore, lanes: Sequence[Sequence[LaneScore]]
) -> tuple[dict[str, Artifact | None], list[LaneScore]]:
    """The lanes' artifacts by role, each joined from its parts; and their scores, if all of them are there."""
    roles, scores = dict[str, Artifact | None](), list[LaneScore]()
    in_rounds = any(len(rounds) > 1 for rounds in lanes)
    for rounds in lanes:
        plan = rounds[0].plan
        artifact = store.find(joined_stage(rounds)) if in_rounds else rounds[0].artifact
        roles[lane_role(plan)] = artifact
        if artifact is not None:
            scores.append(read_score(store, plan, artifact) if in_rounds else rounds[0])
    return roles, scores if len(scores) == len(lanes) else []


def _look_up_ends(
    store: ArtifactStore,
    inputs: LaneInputs,
    pruning: PruneSettings,
    scores: Sequence[LaneScore],
    found: Found,
) -> dict[str, Artifact | None]:
    """What comes after the lanes."""
    dense = float(str(inputs.capture.facts[DENSE_PERPLEXITY]))
    chosen, uniform = scores[compare(scores, dense).best], scores[0]
    stages = {
        "select": store.find(select_stage(scores, dense)),
        "export": store.find(export_stage(inputs, chosen, uniform, pruning)),
    }
    if test := found.stages["test"]:
        testing = replace(inputs, scored=test)
        stages["evaluate"] = store.find(evaluate_stage(testing, uniform.plan, chosen.plan, pruning))
    return stages
