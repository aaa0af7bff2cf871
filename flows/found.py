"""What of a search is in the store already: looked up, nothing is built."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flows.settings import Search
from flows.token_requests import token_requests
from layerwise.allocation import SparsityPlan
from layerwise.skeleton import Linear
from storage.artifact import Artifact
from storage.stage import Stage
from storage.store import ArtifactStore
from tasks.allocate import allocate_stage
from tasks.branch import lane_stage, read_score
from tasks.capture import DENSE_PERPLEXITY, CaptureSettings, capture_stage
from tasks.checkpoint import Checkpoint
from tasks.evaluate import evaluate_stage
from tasks.export import export_stage
from tasks.import_checkpoint import import_checkpoint, import_stage
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
        plans: one per beta; empty if it is not.
        lanes: the stages of the plans' lanes; empty as long as there is no capture.
    """

    stages: dict[str, Artifact | None]
    checkpoint: Checkpoint | None = None
    linears: Sequence[Sequence[Linear]] = ()
    plans: tuple[SparsityPlan, ...] = ()
    lanes: tuple[Stage, ...] = ()

    @property
    def missing_lanes(self) -> list[int]:
        """Numbers of the plans whose lanes are not there."""
        return [n for n, plan in enumerate(self.plans) if self.stages.get(lane_role(plan)) is None]

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
    return _look_up_lanes(store, inputs, settings.pruning(dtype), found)


def _look_up_lanes(store: ArtifactStore, inputs: LaneInputs, pruning: PruneSettings, found: Found) -> Found:
    """Go on from what comes before the lanes."""
    lanes = tuple(lane_stage(plan, inputs, pruning) for plan in found.plans)
    done = [store.find(lane) for lane in lanes]
    stages = {role: found.stages[role] for role in CAPTURED}
    stages |= {lane_role(plan): lane for plan, lane in zip(found.plans, done, strict=True)}
    stages |= dict.fromkeys(CHOSEN)
    there = [lane for lane in done if lane is not None]
    if len(there) == len(lanes):
        scores = [read_score(store, plan, lane) for plan, lane in zip(found.plans, there, strict=True)]
        dense = float(str(inputs.capture.facts[DENSE_PERPLEXITY]))
        chosen, uniform = scores[compare(scores, dense).best], scores[0]
        stages["select"] = store.find(select_stage(scores, dense))
        stages["export"] = store.find(
            export_stage(inputs.checkpoint, inputs.capture, chosen, uniform, pruning)
        )
        if test := stages["test"]:
            testing = replace(inputs, scored=test)
            stages["evaluate"] = store.find(evaluate_stage(testing, uniform.plan, chosen.plan, pruning))
    return replace(found, stages=stages, lanes=lanes)
