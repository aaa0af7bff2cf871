"""Plan: what a search would run, what the store already has, and what it will take. Runs nothing."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from layerwise.allocators.sparsity_plan import SparsityPlan
from layerwise.flows.fan_out.lane_groups import lane_groups
from layerwise.flows.pipeline.lane_requests import LaneRequest, first_lanes, strategy_of
from layerwise.flows.pipeline.lookup import Found, look_up
from layerwise.flows.pipeline.memory_estimate import SearchSizes
from layerwise.flows.pipeline.stages import expected_plans
from layerwise.flows.pipeline.time_budget import check_minutes
from layerwise.flows.runtime import Runtime
from layerwise.flows.settings import TRIALS, Search
from layerwise.models.skeleton import Linear
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.measure import is_measured
from layerwise.tasks.results.run_names import windows_title


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
        groups: how many betas there are in each group that is to run; each group reads the model once.
        fan_out: over what the groups are spread, for people; None if one process does all of it. Memory, scratch and
            resume points are those of one of the processes then.
    """

    stages: tuple[PlannedStage, ...]
    betas: tuple[float, ...]
    memory: Mapping[str, int]
    scratch: int
    resume_point: int
    resume_bytes_an_hour: float
    resume_bytes_a_stage: int
    groups: tuple[int, ...]
    fan_out: str | None


def plan_search(settings: Search, runtime: Runtime) -> Plan:
    """Look into the store and at the model's headers; writes nothing and reads no weights.

    Raises:
        ValueError: whatever a search would refuse about these settings before it computes.
    """
    check_minutes(settings, runtime)
    store = ArtifactStore(runtime.store)
    found = look_up(store, settings)
    index, linears, windows = found.inputs.index, found.linears, found.inputs.texts.windows
    plans = found.plans or expected_plans(settings, linears)
    dtype = settings.dtype_for(index.dtype)
    there = {role for role, artifact in found.stages.items() if artifact is not None}
    request, missing = _next_lanes(settings, found, plans, linears, windows["selection"])
    sizes = SearchSizes(settings, index, linears, dtype, len(plans), windows)
    workers = _workers(runtime)
    groups = lane_groups(store, found.lanes, missing, sizes.of(request), runtime, workers)
    together = max(map(len, groups), default=len(plans))
    is_last = _is_last(settings, found, request)
    if settings.strategy in TRIALS and not is_last:  # later requests may be larger than the next one
        most = strategy_of(settings, plans, linears, windows["selection"]).most_together
        together = max(together, ceil(most / max(len(groups), 1)))
    stages = _stages(settings, there, sizes, groups, request, missing, is_last)
    budget, states = runtime.hidden_states_bytes, sizes.hidden_states(together, request)
    memory = sizes.memory | {"hidden states": min(states, budget)}
    an_hour = 60 / runtime.boundary_minutes * states
    by_layers = 0 if runtime.boundary_layers is None else index.num_layers // runtime.boundary_layers
    return Plan(
        tuple(stages),
        tuple(plan.beta for plan in plans),
        memory,
        max(states - budget, 0),
        states,
        an_hour,
        by_layers * states,
        tuple(map(len, groups)),
        None if runtime.fan_out == "local" else f"{runtime.fan_out}, {workers} at a time",
    )


def _stages(
    settings: Search,
    there: Collection[str],
    sizes: SearchSizes,
    groups: Sequence[Sequence[int]],
    request: LaneRequest | None,
    missing: Sequence[int],
    is_last: bool,
) -> list[PlannedStage]:
    """All stages of a search, in their order."""
    index = sizes.index
    weights = sum(index.layer_bytes) + index.outer_bytes
    return [
        _stage(
            "import_checkpoint",
            "checkpoint" in there,
            "import",
            weights,
            0 if index.in_place else weights,
        ),
        *(
            _stage(
                f"sample_tokens: {role}", role in there, f"cut {count} windows of {settings.seqlen} tokens"
            )
            for role, count in sizes.windows.items()
        ),
        _stage("capture", "capture" in there, "run the dense model", weights, sizes.capture),
        *_extra_stages(settings, there, weights, sizes),
        _stage(
            f"branch: {settings.trials_of(sizes.plans)} {'trials' if settings.makes_plans else 'betas'}",
            not missing,
            _lanes_to_do(request, missing, is_last),
            weights * len(groups),
            sizes.lanes_files(len(missing)),
        ),
        _stage("select", "select" in there, "choose the best of them"),
        *(
            [_stage("export", "export" in there, "write the pruned checkpoint", weights, weights)]
            if settings.export
            else []
        ),
        _stage("evaluate", "evaluate" in there, "dense, uniform and best on the test windows", weights),
    ]


def _extra_stages(
    settings: Search, there: Collection[str], weights: int, sizes: SearchSizes
) -> Iterator[PlannedStage]:
    """What some pruners and allocators need besides."""
    if settings.needs_grams:
        todo = "second moments of the linears' inputs, in the dense model"
        yield _stage("grams", "grams" in there, todo, weights, sizes.grams)
    if is_measured(settings.allocator):
        todo = f"what {settings.allocator.method} goes by"
        yield _stage("measure", "measure" in there, todo, sum(sizes.index.layer_bytes))


def _next_lanes(
    settings: Search,
    found: Found,
    plans: Sequence[SparsityPlan],
    linears: Sequence[Sequence[Linear]],
    windows: int,
) -> tuple[LaneRequest | None, Sequence[int]]:
    """The lanes that are to be scored next, and the positions among them of those that are missing."""
    if found.is_captured:
        return found.request, found.missing_lanes
    # Without a capture nothing is known of the lanes.
    request = first_lanes(settings, plans, linears, windows)
    return request, range(len(request.plans))


def _is_last(settings: Search, found: Found, request: LaneRequest | None) -> bool:
    """Whether nothing is asked for after this request."""
    asked = found.tried + (0 if request is None else len(request.plans))
    return settings.strategy == "grid" or (settings.stop_after is not None and asked >= settings.stop_after)


def _lanes_to_do(request: LaneRequest | None, missing: Sequence[int], is_last: bool) -> str:
    windows = "" if request is None else windows_title(request.windows)
    then = "" if is_last else "; then what these tell"
    return f"prune and score {len(missing)} of them{windows}{then}"


def _stage(name: str, there: bool, todo: str, reads: int = 0, writes: int = 0) -> PlannedStage:
    return PlannedStage(name, "in the store") if there else PlannedStage(name, todo, reads, writes)


def _workers(runtime: Runtime) -> int:
    """How many groups run at a time."""
    if runtime.pool is None:
        return runtime.processes or 1
    from prefect.client.orchestration import get_client

    from layerwise.flows.fan_out.work_pool import WorkPool, require_server

    require_server()
    with get_client(sync_client=True) as client:
        return WorkPool(client, runtime.pool).workers
