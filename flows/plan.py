"""Plan: what a search would run, what the store already has, and what the search takes. Runs nothing."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from layerwise.flows.fan_out.lane_groups import lane_groups
from layerwise.flows.pipeline.graph import LaneStep
from layerwise.flows.pipeline.lane_requests import strategy_of
from layerwise.flows.pipeline.lookup import Found, FoundStep, NextLanes, look_up
from layerwise.flows.pipeline.memory_estimate import SearchSizes
from layerwise.flows.pipeline.time_budget import check_minutes
from layerwise.flows.runtime import FanOutRuntime, SearchRuntime
from layerwise.flows.settings import TRIALS, Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.run_names import windows_title


@dataclass(frozen=True)
class PlannedStage:
    """One line of a plan.

    Attributes:
        state: "in the store", or the work to do.
        reads: bytes of weights that are read.
        writes: bytes by which the store grows, without resume points, which are deleted at the end.
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
        memory: peak bytes, in addition to Python's own, by what they hold.
        scratch: bytes of hidden states beyond the memory budget, in files.
        resume_point: bytes of one resume point of the largest stage.
        resume_bytes_an_hour: bytes of resume points written in an hour; each replaces the one before.
        resume_bytes_a_stage: bytes of resume points of one stage that are committed after a number of layers; 0 if
            they are committed by time only.
        groups: number of betas in each group that is to run; each group reads the model once.
        fan_out: where the groups run, in words; None if one process does all of it. Otherwise memory, scratch and
            resume points are those of one of the processes.
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


def plan_search(settings: Search, runtime: SearchRuntime) -> Plan:
    """Look into the store and at the headers of the model. Writes nothing and reads no weights.

    Raises:
        ValueError: everything that a search would refuse about these settings before it computes.
    """
    check_minutes(settings, runtime)
    store = ArtifactStore(runtime.store)
    found = look_up(store, settings)
    index, linears, windows = found.inputs.index, found.inputs.linears, found.inputs.texts.windows
    lanes = found.next_lanes
    request, plans = lanes.step.request, lanes.step.plans
    sizes = SearchSizes(settings, index, linears, settings.dtype_for(index.dtype), len(plans), windows)
    workers = _workers(runtime)
    groups = lane_groups(store, lanes.stages, lanes.missing, sizes.of(request), runtime, workers)
    together = max(map(len, groups), default=len(plans))
    if settings.strategy in TRIALS and not _is_last(settings, lanes):  # later requests may be larger
        most = strategy_of(settings, plans, linears, windows["selection"]).most_together
        together = max(together, ceil(most / max(len(groups), 1)))
    budget, states = runtime.hidden_states_bytes, sizes.hidden_states(together, request)
    by_layers = 0 if runtime.boundary_layers is None else index.num_layers // runtime.boundary_layers
    return Plan(
        tuple(_lines(settings, found, sizes, groups)),
        tuple(plan.beta for plan in plans),
        sizes.memory | {"hidden states": min(states, budget)},
        max(states - budget, 0),
        states,
        60 / runtime.boundary_minutes * states,
        by_layers * states,
        tuple(map(len, groups)),
        None if runtime.fan_out == "local" else f"{runtime.fan_out}, {workers} at a time",
    )


def _lines(
    settings: Search, found: Found, sizes: SearchSizes, groups: Sequence[Sequence[int]]
) -> Iterator[PlannedStage]:
    """Yield a line for every step that takes time; all requests for lanes share one."""
    lanes = found.next_lanes
    for each in found.steps:
        if each.step is lanes.step:
            yield _line_of_lanes(settings, lanes, sizes, groups)
        elif each.step.work and not isinstance(each.step, LaneStep):
            yield _line(each, sizes)


def _line(found: FoundStep, sizes: SearchSizes) -> PlannedStage:
    step = found.step
    if found.is_done:
        return PlannedStage(step.name, "in the store")
    return PlannedStage(step.name, step.work, step.reads(sizes), step.writes(sizes))


def _line_of_lanes(
    settings: Search, lanes: NextLanes, sizes: SearchSizes, groups: Sequence[Sequence[int]]
) -> PlannedStage:
    what = "trials" if settings.makes_plans else "betas"
    name = f"{lanes.step.name}: {settings.trials_of(sizes.plans)} {what}"
    if not lanes.missing:
        return PlannedStage(name, "in the store")
    missing = len(lanes.missing)
    then = "" if _is_last(settings, lanes) else "; then what these tell"
    work = f"prune and score {missing} of them{windows_title(lanes.step.request.windows)}{then}"
    return PlannedStage(name, work, sizes.weights * len(groups), sizes.lanes_files(missing))


def _is_last(settings: Search, lanes: NextLanes) -> bool:
    """Return whether the strategy asks for nothing after these lanes."""
    asked = lanes.step.tried + len(lanes.step.request.plans)
    return settings.strategy == "grid" or (settings.stop_after is not None and asked >= settings.stop_after)


def _workers(runtime: FanOutRuntime) -> int:
    """Return the number of groups that run at a time."""
    if runtime.pool is None:
        return runtime.processes or 1
    from prefect.client.orchestration import get_client

    from layerwise.flows.fan_out.work_pool import WorkPool, require_server

    require_server()
    with get_client(sync_client=True) as client:
        return WorkPool(client, runtime.pool).workers
