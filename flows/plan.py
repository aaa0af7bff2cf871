"""Plan: what a search would run, what the store already has, and what it will take. Runs nothing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from flows.search import token_requests
from flows.settings import Runtime, Search
from layerwise.allocation import SparsityPlan
from layerwise.skeleton import Linear
from storage.artifact import Artifact
from storage.stage import Stage
from storage.store import ArtifactStore
from tasks.branch import lane_stage
from tasks.capture import SAMPLED_WINDOWS, CaptureSettings, capture_stage
from tasks.checkpoint import Checkpoint
from tasks.checkpoint_index import CheckpointIndex
from tasks.documents import Role
from tasks.import_checkpoint import import_checkpoint, import_stage, inspect_source
from tasks.lane_group import LaneInputs
from tasks.sample_tokens import token_stage
from tasks.streamed import DTYPES, layer_sizes_of, linears_by_layer

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
    """

    stages: tuple[PlannedStage, ...]
    betas: tuple[float, ...]
    memory: Mapping[str, int]
    scratch: int
    resume_point: int


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
    linears = linears_by_layer(index)
    plans = settings.allocation.plans(layer_sizes_of(linears))
    dtype = index.dtype if settings.dtype == "auto" else settings.dtype
    windows: dict[Role, Artifact | None] = {
        role: store.find(token_stage(checkpoint.tokenizer_identity, request)) if checkpoint else None
        for role, request in requests.items()
    }
    captured, lanes_there = _look_up(store, checkpoint, windows, settings, plans, dtype)
    sizes = _Sizes(settings, index, linears, dtype, len(plans) + 1)
    weights = sum(index.layer_bytes) + index.outer_bytes
    missing = len(plans) - lanes_there
    stages = [
        _stage(
            "import_checkpoint", imported is not None, "import", weights, 0 if index.in_place else weights
        ),
        *(_stage(f"sample_tokens: {role}", found is not None, "sample") for role, found in windows.items()),
        _stage("capture", captured, "run the dense model", weights, sizes.capture),
        _stage(f"branch: {len(plans)} betas", missing == 0, f"prune and score {missing} of them", weights),
        PlannedStage("select, export", "once the branches are in", weights, weights),
        PlannedStage("evaluate", "dense, uniform and best on the test windows", weights),
    ]
    if missing == 0:
        stages[-2:] = [
            PlannedStage("select, export, evaluate", "in the store if this search was finished before")
        ]
    budget = int(runtime.hidden_states_gib * GIB)
    states = sizes.hidden_states
    memory = sizes.memory | {"hidden states": min(states, budget)}
    return Plan(tuple(stages), tuple(plan.beta for plan in plans), memory, max(states - budget, 0), states)


def _stage(name: str, there: bool, todo: str, reads: int = 0, writes: int = 0) -> PlannedStage:
    return PlannedStage(name, "in the store") if there else PlannedStage(name, todo, reads, writes)


def _look_up(
    store: ArtifactStore,
    checkpoint: Checkpoint | None,
    windows: Mapping[Role, Artifact | None],
    settings: Search,
    plans: Sequence[SparsityPlan],
    dtype: str,
) -> tuple[bool, int]:
    """Whether the capture is in the store, and how many of the lanes are."""
    calibration, selection = windows["calibration"], windows["selection"]
    if checkpoint is None or calibration is None or selection is None:
        return False, 0
    captured = store.find(
        capture_stage(checkpoint.identity, calibration, selection, CaptureSettings(dtype, settings.retain))
    )
    if captured is None:
        return False, 0
    inputs = LaneInputs(checkpoint, captured, calibration, selection)
    find: Callable[[Stage], Artifact | None] = store.find
    lanes = [find(lane_stage(plan, inputs, settings.pruning(dtype))) for plan in plans]
    return True, sum(lane is not None for lane in lanes)


@dataclass(frozen=True)
class _Sizes:
    """Bytes that a search needs, from shapes alone."""

    settings: Search
    index: CheckpointIndex
    linears: Sequence[Sequence[Linear]]
    dtype: str
    lanes: int

    @property
    def window(self) -> int:
        """Hidden states of one window."""
        config = self.index.config
        hidden_size = config.get("hidden_size") or config["n_embd"]
        return self.settings.seqlen * hidden_size * DTYPES[self.dtype].itemsize

    @property
    def selection_windows(self) -> int:
        return self.settings.selection_windows or 0

    @property
    def hidden_states(self) -> int:
        own = self.settings.calibration_windows if self.settings.calibration_mode == "sequential" else 0
        capture = self.settings.calibration_windows + self.selection_windows
        return self.window * max(self.lanes * (own + self.selection_windows), capture)

    @property
    def capture(self) -> int:
        """Statistics (20 bytes a channel before compression) and retained hidden states."""
        channels = sum(linear.in_features for layer in self.linears for linear in layer)
        windows = [self.settings.calibration_windows, self.selection_windows]
        kept = {"none": 0, "sampled": SAMPLED_WINDOWS, "all": sum(windows)}[self.settings.retain]
        count = sum(min(kept, number) for number in windows)
        return 20 * channels + (self.index.num_layers + 1) * count * self.window

    @property
    def memory(self) -> dict[str, int]:
        largest = max(self.index.layer_bytes)
        itemsize = DTYPES[self.dtype].itemsize
        weights = max(layer_sizes_of(self.linears))
        vocabulary = self.index.config.get("vocab_size", 0)
        cast = 0 if self.dtype == self.index.dtype else weights * itemsize
        return {
            "layer in use": largest + cast,
            "layer arriving": largest,
            "order of removal": weights,  # one byte a weight
            "embeddings and head": self.index.outer_bytes,
            "logits of one window": self.settings.seqlen * vocabulary * itemsize,
        }
