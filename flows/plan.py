"""Plan: list the work that a search still has to do, and estimate its cost. Runs nothing."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from layerwise.flows.fan_out.lane_groups import lane_groups
from layerwise.flows.pipeline.graph import LaneStep
from layerwise.flows.pipeline.lookup import FoundSearch, FoundStep, NextLanes, look_up
from layerwise.flows.pipeline.search_strategy import LaneRequest, strategy_of
from layerwise.flows.pipeline.size_estimate import SearchSizes
from layerwise.flows.pipeline.time_estimate import SearchTimes, expected_requests, measure_times
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
        seconds: estimate of the time; None if there is none.
    """

    name: str
    state: str
    reads: int = 0
    writes: int = 0
    seconds: float | None = None

    @property
    def to_do(self) -> bool:
        """Whether the stage has to run."""
        return self.state != IN_STORE


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Remaining work of a search, and its cost.

    Attributes:
        layer_bytes: bytes of the weights of every decoder layer.
        weights: bytes of all weights of the model.
        betas: betas of the allocator's plans.
        device: torch device of the computation.
        memory: peak bytes of this machine by content, in addition to Python itself.
        device_memory: peak bytes of the device by content; empty if it is the CPU.
        scratch: bytes of hidden states that exceed the memory for them, in files.
        resume_point: bytes of one resume point of the largest stage.
        resume_bytes_an_hour: maximum bytes of resume points written by time per hour; each replaces the previous one.
        resume_bytes_a_stage: bytes of resume points that one stage commits after numbers of layers; 0 if they are
            committed by time only.
        groups: number of betas in each group that has to run; each group reads the model once.
        fan_out: where the groups run; None if one process does all the work. Otherwise memory, scratch files and
            resume points are those of one of the processes.
        resume_point_seconds: time to write one resume point of the largest stage; None if the store's rate is unknown.
        measuring: seconds that the measurement of this machine took; None if nothing was measured.
        notes: sentences on what was measured, and on what the times lack.
    """

    stages: tuple[PlannedStage, ...]
    layer_bytes: tuple[int, ...]
    weights: int
    betas: tuple[float, ...]
    device: str
    memory: Mapping[str, int]
    device_memory: Mapping[str, int]
    scratch: int
    resume_point: int
    resume_bytes_an_hour: float
    resume_bytes_a_stage: int
    groups: tuple[int, ...]
    fan_out: str | None
    resume_point_seconds: float | None
    measuring: float | None
    notes: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Time of all stages that have an estimate."""
        return sum(stage.seconds or 0.0 for stage in self.stages)


def plan_search(settings: Search, runtime: SearchRuntime, measure: bool = False) -> Plan:
    """Plan a search from the store and the headers of the model. Leaves nothing behind.

    Args:
        measure: also estimate the time of every stage, from a few seconds of reading and computing on this machine.

    Raises:
        ValueError: the search would refuse these settings.
    """
    check_minutes(settings, runtime)
    store = ArtifactStore(runtime.store)  # without the layer cache, whose folder would be created
    found = look_up(store, settings)
    index, linears, windows = found.inputs.index, found.inputs.linears, found.inputs.texts.windows
    lanes = found.next_lanes
    request, plans = lanes.step.request, lanes.step.plans
    sizes = found.inputs.sizes(settings, len(plans))
    workers = _workers(store, runtime)
    groups = lane_groups(store, lanes, sizes.of(request), runtime, workers)
    together = max(map(len, groups), default=len(plans))
    most: LaneRequest | None = request
    if not _is_last(settings, lanes):  # a later request may have more lanes, and score them on more windows
        most = None
        if settings.strategy in TRIALS:
            largest = strategy_of(settings, plans, linears, windows["selection"]).largest_request
            together = max(together, ceil(largest / max(len(groups), 1)))
    available, states = runtime.hidden_states_bytes, sizes.hidden_states(together, most)
    by_layers = 0 if runtime.boundary_layers is None else index.num_layers // runtime.boundary_layers
    memory, device_memory = sizes.memory(runtime.device_name)
    times, began, notes = None, time.monotonic(), list[str]()
    if measure and any(each.step.work and not each.is_done for each in found.steps):
        try:
            execution = runtime.execution()
        except ValueError as error:  # a plan for another machine
            notes.append(f"No times: {error}")
        else:
            try:
                times = measure_times(store, sizes, found.inputs.checkpoint, execution)
                notes += times.transfer.notes
            except Exception as error:  # the rest of the plan does not depend on the measurement
                notes.append(f"No times, because the measurement failed: {type(error).__name__}: {error}")
    if runtime.layer_cache is not None:
        notes.append("Bytes and times are those without the layer cache, from which later stages read.")
    lanes_seconds = None
    if times is not None:
        lanes_seconds = _seconds_of_lanes(settings, found, times, groups, runtime, workers)
    if problem := _device_problem(sizes, runtime):
        notes.append(f"On this machine, the search would be refused: {problem}")
    lane = sizes.of(most).lane
    on_device = min(states, _device_states(runtime) // lane * lane)  # whole lanes
    if on_device:
        device_memory = {**device_memory, "hidden states": on_device}
    return Plan(
        stages=tuple(_lines(settings, found, sizes, groups, times, lanes_seconds)),
        layer_bytes=tuple(index.layer_bytes),
        weights=sizes.weights,
        betas=tuple(plan.beta for plan in plans),
        device=runtime.device_name,
        memory=memory
        | {"hidden states": min(states - on_device, available)}
        | _transfers(store, settings.model),
        device_memory=device_memory,
        scratch=max(states - on_device - available, 0),
        resume_point=states,
        resume_bytes_an_hour=60 / runtime.boundary_minutes * states,
        resume_bytes_a_stage=by_layers * states,
        groups=tuple(map(len, groups)),
        fan_out=None if runtime.fan_out == "local" else f"{runtime.fan_out}, {workers} at a time",
        resume_point_seconds=None if times is None else times.written(states) or None,
        measuring=None if times is None else time.monotonic() - began,
        notes=tuple(notes),
    )


def _lines(
    settings: Search,
    found: FoundSearch,
    sizes: SearchSizes,
    groups: Sequence[Sequence[int]],
    times: SearchTimes | None,
    lanes_seconds: float | None,
) -> Iterator[PlannedStage]:
    """Yield a line for every step that takes time; all requests for lanes share one line."""
    lanes = found.next_lanes
    for each in found.steps:
        if each.step is lanes.step:
            yield _line_of_lanes(settings, lanes, sizes, groups, lanes_seconds)
        elif each.step.work and not isinstance(each.step, LaneStep):
            yield _line(each, sizes, times)


def _line(found: FoundStep, sizes: SearchSizes, times: SearchTimes | None) -> PlannedStage:
    step = found.step
    if found.is_done:
        return PlannedStage(step.name, IN_STORE)
    seconds = None if times is None else step.seconds(times)
    return PlannedStage(step.name, step.work, step.reads(sizes), step.writes(sizes), seconds)


def _line_of_lanes(
    settings: Search,
    lanes: NextLanes,
    sizes: SearchSizes,
    groups: Sequence[Sequence[int]],
    seconds: float | None,
) -> PlannedStage:
    tried = "trials" if settings.makes_plans else "betas"
    name = f"{lanes.step.name}: {settings.trials_of(sizes.plans)} {tried}"
    if not lanes.missing:
        return PlannedStage(name, IN_STORE)
    missing = len(lanes.missing)
    more = "" if _is_last(settings, lanes) else "; more may follow"
    verbs = "prune and score" if settings.recover is None else "prune, refit and score"
    work = f"{verbs} {missing} of them{windows_title(lanes.step.request.windows)}{more}"
    return PlannedStage(name, work, sizes.weights * len(groups), sizes.lanes_files(missing), seconds)


def _seconds_of_lanes(
    settings: Search,
    found: FoundSearch,
    times: SearchTimes,
    groups: Sequence[Sequence[int]],
    runtime: SearchRuntime,
    workers: int,
) -> float:
    """Return the time of the lanes that are missing, and of those that the strategy is expected to request later."""
    windows, lanes = found.inputs.texts.windows["selection"], found.next_lanes
    if not lanes.missing:
        return 0.0
    together = workers if runtime.pool is not None else min(workers, _devices(runtime))

    def seconds(request: LaneRequest, count: int, in_groups: int) -> float:
        first, end = request.windows or (0, windows)
        return times.lanes(count, end - first, in_groups, together)

    total = seconds(lanes.step.request, len(lanes.missing), len(groups))
    if _is_last(settings, lanes):
        return total
    strategy = strategy_of(settings, lanes.step.plans, found.inputs.linears, windows)
    end = (lanes.step.request.windows or (0, windows))[1]
    scored = {**lanes.step.scored, **dict.fromkeys(lanes.step.request.plans, end)}
    return total + sum(
        seconds(request, len(request.plans), min(workers, len(request.plans)))
        for request in expected_requests(strategy, scored)
    )


def _device_problem(sizes: SearchSizes, runtime: SearchRuntime) -> str:
    """Return why the device of this machine is too small for a search; "" if it is not, or is on another machine."""
    try:
        device = runtime.execution().torch_device
    except ValueError:
        return ""
    try:
        sizes.require_device(device)
    except ValueError as error:
        return str(error)
    return ""


def _device_states(runtime: SearchRuntime) -> int:
    """Return the bytes of hidden states that the device takes; 0 if it is the CPU, or unknown."""
    try:
        return runtime.execution().most_device_states_bytes
    except ValueError:  # a plan for another machine
        given = runtime.device_memory_gib
        return 0 if given is None else int(given * 2**30)


def _devices(runtime: SearchRuntime) -> int:
    """Return the number of devices of this machine: processes share its CPU."""
    import torch

    return torch.cuda.device_count() if runtime.device_name == "cuda" else 1


def _transfers(store: ArtifactStore, model: str) -> dict[str, int]:
    """Return the memory for requests to remote storages."""
    reads = READ_MEMORY if not store.is_local or "://" in model else 0
    writes = 0 if store.is_local else UPLOAD_MEMORY
    return {"transfers": reads + writes} if reads else {}


def _is_last(settings: Search, lanes: NextLanes) -> bool:
    """Return whether these lanes are the strategy's last request."""
    name = settings.strategy_for(len(lanes.step.plans))
    if name == "grid" or (name == "auto" and lanes.step.request.continues):
        return True
    requested = lanes.step.tried + len(lanes.step.request.plans)
    return name != "auto" and settings.stop_after is not None and requested >= settings.stop_after


def _workers(store: ArtifactStore, runtime: FanOutRuntime) -> int:
    """Return the number of groups that run at a time."""
    if runtime.fan_out == "store":
        from layerwise.flows.fan_out.store_workers import living_workers

        return living_workers(store)
    if runtime.pool is None:
        return runtime.processes or 1
    from prefect.client.orchestration import get_client

    from layerwise.flows.fan_out.work_pool import WorkPool, require_server

    require_server()
    with get_client(sync_client=True) as client:
        return WorkPool(client, runtime.pool).workers
