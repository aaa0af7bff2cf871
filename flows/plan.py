"""Plan: list the work that a search still has to do, and estimate its cost. Runs nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from layerwise.flows.fan_out.lane_groups import lane_groups
from layerwise.flows.pipeline.graph import LaneStep
from layerwise.flows.pipeline.lookup import FoundSearch, FoundStep, NextLanes, look_up
from layerwise.flows.pipeline.search_strategy import strategy_of
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.pipeline.time_limit import check_minutes
from layerwise.flows.runtime import FanOutRuntime, SearchRuntime
from layerwise.flows.settings import TRIALS, Search
from layerwise.storage.files.reading import READ_MEMORY
from layerwise.storage.files.s3_upload import UPLOAD_MEMORY
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.run_names import windows_title

IN_STORE = "in the store"


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    Attributes:
        state: ``IN_STORE``, or the work to do.
        reads: bytes of weights to read.
        writes: bytes that the stage adds to the store, without resume points, which are deleted at its end.
    """

    name: str
    state: str
    reads: int = 0
    writes: int = 0

    @property
    def to_do(self) -> bool:
        """Whether the stage has to run."""
        return self.state != IN_STORE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Remaining work of a search, and its cost.

    Attributes:
        betas: betas of the allocator's plans.
        memory: peak bytes by content, in addition to Python itself.
        scratch: bytes of hidden states that exceed the memory for them, in files.
        resume_point: bytes of one resume point of the largest stage.
        resume_bytes_an_hour: maximum bytes of resume points written by time per hour; each replaces the previous one.
        resume_bytes_a_stage: bytes of resume points that one stage commits after numbers of layers; 0 if they are
            committed by time only.
        groups: number of betas in each group that has to run; each group reads the model once.
        fan_out: where the groups run; None if one process does all the work. Otherwise memory, scratch files and
            resume points are those of one of the processes.
        resume_point_seconds: time to write one resume point of the largest stage; None if the store's rate is unknown.
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
    resume_point_seconds: float | None = None


def plan_search(settings: Search, runtime: SearchRuntime) -> Plan:
    """Plan a search from the store and the headers of the model. Writes nothing and reads no weights.

    Raises:
        ValueError: the search would refuse these settings.
    """
    check_minutes(settings, runtime)
    store = ArtifactStore(runtime.store)
    found = look_up(store, settings)
    index, linears, windows = found.inputs.index, found.inputs.linears, found.inputs.texts.windows
    lanes = found.next_lanes
    request, plans = lanes.step.request, lanes.step.plans
    sizes = SearchSizes(settings, index, linears, settings.dtype_for(index.dtype), len(plans), windows)
    workers = _workers(runtime)
    groups = lane_groups(store, lanes, sizes.of(request), runtime, workers)
    together = max(map(len, groups), default=len(plans))
    if settings.strategy in TRIALS and not _is_last(settings, lanes):  # a later request may be larger
        largest = strategy_of(settings, plans, linears, windows["selection"]).largest_request
        together = max(together, ceil(largest / max(len(groups), 1)))
    available, states = runtime.hidden_states_bytes, sizes.hidden_states(together, request)
    by_layers = 0 if runtime.boundary_layers is None else index.num_layers // runtime.boundary_layers
    return Plan(
        stages=tuple(_lines(settings, found, sizes, groups)),
        betas=tuple(plan.beta for plan in plans),
        memory=sizes.memory | {"hidden states": min(states, available)} | _transfers(store, settings.model),
        scratch=max(states - available, 0),
        resume_point=states,
        resume_bytes_an_hour=60 / runtime.boundary_minutes * states,
        resume_bytes_a_stage=by_layers * states,
        groups=tuple(map(len, groups)),
        fan_out=None if runtime.fan_out == "local" else f"{runtime.fan_out}, {workers} at a time",
    )


def _lines(
    settings: Search, found: FoundSearch, sizes: SearchSizes, groups: Sequence[Sequence[int]]
) -> Iterator[PlannedStage]:
    """Yield a line for every step that takes time; all requests for lanes share one line."""
    lanes = found.next_lanes
    for each in found.steps:
        if each.step is lanes.step:
            yield _line_of_lanes(settings, lanes, sizes, groups)
        elif each.step.work and not isinstance(each.step, LaneStep):
            yield _line(each, sizes)


def _line(found: FoundStep, sizes: SearchSizes) -> PlannedStage:
    step = found.step
    if found.is_done:
        return PlannedStage(step.name, IN_STORE)
    return PlannedStage(step.name, step.work, step.reads(sizes), step.writes(sizes))


def _line_of_lanes(
    settings: Search, lanes: NextLanes, sizes: SearchSizes, groups: Sequence[Sequence[int]]
) -> PlannedStage:
    tried = "trials" if settings.makes_plans else "betas"
    name = f"{lanes.step.name}: {settings.trials_of(sizes.plans)} {tried}"
    if not lanes.missing:
        return PlannedStage(name, IN_STORE)
    missing = len(lanes.missing)
    more = "" if _is_last(settings, lanes) else "; more may follow"
    verbs = "prune and score" if settings.recover is None else "prune, refit and score"
    work = f"{verbs} {missing} of them{windows_title(lanes.step.request.windows)}{more}"
    return PlannedStage(name, work, sizes.weights * len(groups), sizes.lanes_files(missing))


def _transfers(store: ArtifactStore, model: str) -> dict[str, int]:
    """Return the memory for requests to remote storages."""
    reads = READ_MEMORY if not store.is_local or "://" in model else 0
    writes = 0 if store.is_local else UPLOAD_MEMORY
    return {"transfers": reads + writes} if reads else {}


def _is_last(settings: Search, lanes: NextLanes) -> bool:
    """Return whether these lanes are the strategy's last request."""
    requested = lanes.step.tried + len(lanes.step.request.plans)
    return settings.strategy_for(len(lanes.step.plans)) == "grid" or (
        settings.stop_after is not None and requested >= settings.stop_after
    )


def _workers(runtime: FanOutRuntime) -> int:
    """Return the number of groups that run at a time."""
    if runtime.pool is None:
        return runtime.processes or 1
    from prefect.client.orchestration import get_client

    from layerwise.flows.fan_out.work_pool import WorkPool, require_server

    require_server()
    with get_client(sync_client=True) as client:
        return WorkPool(client, runtime.pool).workers
