"""Plan: what a search would run, what the store already has, and what it will take. Runs nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flows.search import token_requests
from flows.search_sizes import SearchSizes
from flows.settings import Runtime, Search
from layerwise.allocation import SparsityPlan
from storage.artifact import Artifact
from storage.store import ArtifactStore
from tasks.branch import lane_stage, read_score
from tasks.capture import DENSE_PERPLEXITY, CaptureSettings, capture_stage
from tasks.checkpoint import Checkpoint
from tasks.documents import Role
from tasks.evaluate import evaluate_stage
from tasks.export import export_stage
from tasks.import_checkpoint import import_checkpoint, import_stage, inspect_source
from tasks.lane_group import LaneInputs
from tasks.sample_tokens import TokenRequest, token_stage
from tasks.select import compare, select_stage
from tasks.streamed import layer_sizes_of, linears_by_layer

GIB = 2**30


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    Attributes:
        state: "in the store", or what there is to do.
        reads: bytes of weights that are read.
        writes: bytes that the store grows by, resume points (deleted at the end) left out.
    """

    name: str
    state: str
    reads: int = 0
    writes: int = 0

    @property
    def to_do(self) -> bool:
        return self.state != "in the store"


@dataclass(frozen=True)
class Plan:
    """What a search would do.

    Attributes:
        memory: peak bytes beside Python's own, by what they hold.
        scratch: bytes of hidden states beyond the memory budget, in files.
        resume_point: bytes of one resume point of the largest stage.
        resume_bytes_an_hour: bytes of resume points that are written in an hour, each replacing the one before.
        resume_bytes_a_stage: the same for those after so many layers; 0 if they are committed by time only.
        uncounted: roles whose windows are in none of these figures: all that the text gives, which is known once it
            is tokenised.
    """

    stages: tuple[PlannedStage, ...]
    betas: tuple[float, ...]
    memory: Mapping[str, int]
    scratch: int
    resume_point: int
    resume_bytes_an_hour: float
    resume_bytes_a_stage: int
    uncounted: tuple[Role, ...] = ()


def plan_search(settings: Search, runtime: Runtime) -> Plan:
    """Look into the store and at the model's headers; writes nothing and reads no weights.

    Raises:
        ValueError: whatever a search would refuse about these settings before it computes.
    """
    store = ArtifactStore(runtime.store)
    requests = token_requests(settings)
    imported = store.find(import_stage(settings.model))
    checkpoint = import_checkpoint(store, settings.model) if imported else None
    index = checkpoint.index if checkpoint else inspect_source(settings.model)
    linears = linears_by_layer(index, settings.seqlen)
    plans = settings.allocation.plans(layer_sizes_of(linears))
    dtype = index.dtype if settings.dtype == "auto" else settings.dtype
    windows: dict[Role, Artifact | None] = {
        role: store.find(token_stage(checkpoint.tokenizer_identity, request)) if checkpoint else None
        for role, request in requests.items()
    }
    found = _look_up(store, checkpoint, windows, settings, plans, dtype)
    counts = {role: _count(request, windows[role]) for role, request in requests.items()}
    sizes = SearchSizes(settings, index, linears, dtype, len(plans) + 1, counts)
    weights = sum(index.layer_bytes) + index.outer_bytes
    missing = len(plans) - found.lanes
    stages = [
        _stage(
            "import_checkpoint", imported is not None, "import", weights, 0 if index.in_place else weights
        ),
        *(_stage(f"sample_tokens: {role}", there is not None, "sample") for role, there in windows.items()),
        _stage("capture", found.captured, "run the dense model", weights, sizes.capture),
        _stage(
            f"branch: {len(plans)} betas",
            missing == 0,
            f"prune and score {missing} of them",
            weights,
            sizes.lanes_files(missing),
        ),
        _stage("select", found.selected, "choose the best of them"),
        _stage("export", found.exported, "write the pruned checkpoint", weights, weights),
        _stage("evaluate", found.evaluated, "dense, uniform and best on the test windows", weights),
    ]
    budget = int(runtime.hidden_states_gib * GIB)
    states = sizes.hidden_states
    memory = sizes.memory | {"hidden states": min(states, budget)}
    uncounted = tuple(role for role, count in counts.items() if count is None)
    betas = tuple(plan.beta for plan in plans)
    an_hour = 60 / runtime.boundary_minutes * states
    by_layers = 0 if runtime.boundary_layers is None else index.num_layers // runtime.boundary_layers
    return Plan(
        tuple(stages),
        betas,
        memory,
        max(states - budget, 0),
        states,
        an_hour,
        by_layers * states,
        uncounted,
    )


def _stage(name: str, there: bool, todo: str, reads: int = 0, writes: int = 0) -> PlannedStage:
    return PlannedStage(name, "in the store") if there else PlannedStage(name, todo, reads, writes)


def _count(request: TokenRequest, windows: Artifact | None) -> int | None:
    """How many windows a role has; None where nobody knows yet."""
    if request.windows is None and windows is not None:
        return int(str(windows.facts["windows"]))
    return request.windows


@dataclass(frozen=True)
class _Found:
    """What of a search is in the store already."""

    captured: bool = False
    lanes: int = 0
    selected: bool = False
    exported: bool = False
    evaluated: bool = False


def _look_up(
    store: ArtifactStore,
    checkpoint: Checkpoint | None,
    windows: Mapping[Role, Artifact | None],
    settings: Search,
    plans: Sequence[SparsityPlan],
    dtype: str,
) -> _Found:
    calibration, selection, test = windows["calibration"], windows["selection"], windows["test"]
    if checkpoint is None or calibration is None or selection is None:
        return _Found()
    captured = store.find(
        capture_stage(checkpoint.identity, calibration, selection, CaptureSettings(dtype, settings.retain))
    )
    if captured is None:
        return _Found()
    pruning = settings.pruning(dtype)
    inputs = LaneInputs(checkpoint, captured, calibration, selection)
    lanes = [store.find(lane_stage(plan, inputs, pruning)) for plan in plans]
    there = [lane for lane in lanes if lane is not None]
    if len(there) < len(plans):
        return _Found(captured=True, lanes=len(there))
    scores = [read_score(store, plan, lane) for plan, lane in zip(plans, there, strict=True)]
    dense = float(str(captured.facts[DENSE_PERPLEXITY]))
    chosen, uniform = scores[compare(scores, dense).best], scores[0]
    stages = [select_stage(scores, dense), export_stage(checkpoint, captured, chosen, uniform, pruning)]
    if test is not None:
        testing = LaneInputs(checkpoint, captured, calibration, test)
        stages.append(evaluate_stage(testing, uniform.plan, chosen.plan, pruning))
    selected, exported, evaluated = ([store.find(stage) is not None for stage in stages] + [False])[:3]
    return _Found(True, len(there), selected, exported, evaluated)
