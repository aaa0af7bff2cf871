"""A search spread over workers, with a real server and real workers on separate machines, each of which dies once."""

import contextlib
import json
import logging
import signal
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Event
from time import monotonic, sleep, time

import psutil
import pytest
import torch
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.states import Cancelling

from layerwise.flows.fan_out import part_flows
from layerwise.flows.fan_out.part import PartFailed
from layerwise.flows.pipeline.result import SearchResult
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.report import REPORT_STAGE
from tests.prefect_server import FEW_WRITES, PrefectServer, flows_of_this_process_use
from tests.small_search import small_search
from tests.work_log import Log, Run, mark_of
from tests.workers import Machine, Worker, create_pool, deploy

LAYERS = 8
NEEDED = list(range(1, LAYERS + 1))
BETAS = [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08]  # nine lanes with the uniform one
LIMIT = 480.0  # maximum seconds of each wait
# The process of a search on a separate machine.
PARENT = """
import json, sys
from layerwise.flows.search import search
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.settings import Search
settings, runtime = json.loads(sys.argv[1])
print(search(Search(**settings), SearchRuntime(**runtime)).bytes_read, "bytes of weights read")
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Use one thread, as the workers do: sums of floats depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fan-out")


@pytest.fixture(scope="module")
def settings(folder) -> dict[str, object]:
    small = small_search(folder / "small", LAYERS, letters=16000)
    return small | {"betas": BETAS, "selection_windows": 24, "retain": "none"}


@pytest.fixture(scope="module")
def server(folder) -> Iterator[PrefectServer]:
    with (
        PrefectServer(folder / "server", **FEW_WRITES) as server,
        flows_of_this_process_use(server, folder / "home"),
    ):
        yield server


@pytest.fixture(scope="module")
def client(server) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def undisturbed(settings, server, folder) -> ArtifactStore:
    """The store of a search that ran in one process."""
    store = ArtifactStore(str(folder / "undisturbed"))
    search(Search(**settings), SearchRuntime(store=store.url))
    return store


@pytest.fixture(scope="module")
def machines(client, server, s3_bucket, folder) -> Iterator[list[Worker]]:
    """Two machines with a worker each for the pool "lanes", which has the deployments of the parts."""
    create_pool(client, "lanes")
    for flow in (part_flows.capture, part_flows.branch, part_flows.evaluate):
        deploy(flow, "lanes", flow.name)
    with (
        Worker("lanes", folder / "one", server.url) as one,
        Worker("lanes", folder / "other", server.url) as other,
    ):
        yield [one, other]


@pytest.fixture
def workers(machines) -> list[Worker]:
    """The two workers, alive."""
    dead = [worker for worker in machines if not worker.alive]
    for worker in dead:
        worker.start()
    for worker in dead or machines:
        worker.wait_until_ready()
    return machines


@pytest.fixture(scope="module")
def parents(client, server, s3_bucket, folder) -> Iterator[Worker]:
    """A machine with a worker for searches, which wait there for their parts."""
    create_pool(client, "parents")
    with Worker("parents", folder / "parents", server.url) as worker:
        worker.wait_until_ready()
        yield worker


@pytest.fixture(scope="module", autouse=True)
def scheduled(client, settings, undisturbed, parents) -> uuid.UUID:
    """A scheduled deployment of the finished search. The scheduler first sees it within seconds of its creation."""
    soon = IntervalSchedule(
        interval=timedelta(hours=1), anchor_date=datetime.now(UTC) + timedelta(seconds=30)
    )
    parameters = {"settings": settings, "runtime": {"store": undisturbed.url}}
    return deploy(search, "parents", "scheduled", schedule=soon, parameters=parameters)


@pytest.fixture
def bucket(s3_bucket) -> ArtifactStore:
    """An empty store that all machines can reach."""
    return ArtifactStore(f"s3://{s3_bucket}/{uuid.uuid4().hex}")


@pytest.fixture
def before_the_lanes(bucket, undisturbed) -> ArtifactStore:
    """A store that lacks only the lanes."""
    for artifact in undisturbed.artifacts():
        if artifact.recipe["name"] not in ("lane", "lane_group"):
            bucket.fs.put(
                f"{undisturbed.root}/{artifact.key}", f"{bucket.root}/{artifact.key}", recursive=True
            )
    return bucket


@pytest.fixture
def begin(server) -> Iterator[Callable[..., Future[SearchResult]]]:
    """Return a function that starts a search in a thread of this process."""
    with ThreadPoolExecutor() as threads:

        def begin(settings: dict, runtime: dict) -> Future[SearchResult]:
            return threads.submit(copy_context().run, search, Search(**settings), SearchRuntime(**runtime))

        yield begin


def pool_runtime(store: ArtifactStore, groups: int = 3) -> dict[str, object]:
    return {"store": store.url, "fan_out": "pool:lanes", "groups": groups, "boundary_layers": 1}


def contents(store: ArtifactStore) -> dict[str, str]:
    """Return digests by key, without groups and reports, which depend on the distribution of lanes and on times."""
    return {
        artifact.key: artifact.content
        for artifact in store.artifacts()
        if artifact.recipe["name"] not in ("lane_group", REPORT_STAGE)
    }


def runs_of(client: SyncPrefectClient, store: ArtifactStore, name: str) -> list[FlowRun]:
    """Return the flow runs of the flow ``name`` for this store, oldest first."""
    runs = client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[name])))
    ours = [run for run in runs if run.parameters["runtime"]["store"] == store.url]
    return sorted(ours, key=lambda run: run.created)


def logs_of(runs: list[FlowRun], machines: list[Machine]) -> list[Log]:
    """Return the work log of each flow run."""
    said = [each for machine in machines for each in machine.said()]
    return [Log.of([(each.at, each.line) for each in said if each.pid == pid_of(run)]) for run in runs]


def pid_of(run: FlowRun) -> int | None:
    """Return the id of the process that a worker started for the run."""
    return int(run.infrastructure_pid) if run.infrastructure_pid else None


def repeated(runs: list[FlowRun], machines: list[Machine], kind: str, numbers: list[int]) -> list[str]:
    """Return the work that these flow runs of one part repeated, except for one piece."""
    return list(Run("", logs_of(runs, machines)).repeated_work({kind: numbers}))


def groups_of(runs: list[FlowRun]) -> dict[tuple[float, ...], list[FlowRun]]:
    """Return the flow runs of groups by their betas."""
    groups: dict[tuple[float, ...], list[FlowRun]] = {}
    for run in runs:
        groups.setdefault(tuple(beta for beta, _ in run.parameters["points"]), []).append(run)
    return groups


def layer_of_a_group(number: int) -> Callable[[str], bool]:
    return lambda line: mark_of(line) == f"branch, layer {number}"


def until(condition: Callable[[], object], what: str) -> None:
    deadline = monotonic() + LIMIT
    while not condition():
        assert monotonic() < deadline, f"not within {LIMIT:.0f} s: {what}"
        sleep(0.1)


def now_at_work(machines: list[Worker], since: float, layer: int) -> Worker:
    """Wait until a group has finished this layer after ``since``, and return its machine."""
    wanted = layer_of_a_group(layer)

    def there() -> list[Worker]:
        return [m for m in machines if any(each.at > since and wanted(each.line) for each in m.said())]

    until(there, f"layer {layer} of a group")
    return there()[0]


@contextlib.contextmanager
def held_until_told(machines: list[Worker], since: float, layer: int) -> Iterator[dict[int, psutil.Process]]:
    """Suspend every group once it has finished this layer after ``since``, until a SIGTERM for it is pending.

    Yields:
        The suspended processes by their ids; the mapping grows.
    """
    held: dict[int, psutil.Process] = {}
    over = Event()

    def hold() -> None:
        for each in (each for machine in machines for each in machine.said()):
            if each.at > since and each.pid not in held and layer_of_a_group(layer)(each.line):
                with contextlib.suppress(psutil.NoSuchProcess):
                    held[each.pid] = psutil.Process(each.pid)
                    held[each.pid].suspend()
        for process in held.values():
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError):
                if process.status() == psutil.STATUS_STOPPED and has_waiting(process, signal.SIGTERM):
                    process.resume()

    def watch() -> None:
        while not over.wait(0.05):
            hold()

    with ThreadPoolExecutor() as threads:
        watching = threads.submit(watch)
        try:
            yield held
        finally:
            over.set()
            for process in held.values():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.resume()
            watching.result()


def has_waiting(process: psutil.Process, wanted: signal.Signals) -> bool:
    """Return whether a signal is pending for a suspended process."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = next(line for line in status.splitlines() if line.startswith("ShdPnd:"))
    return bool(int(pending.split()[1], 16) >> (wanted - 1) & 1)


def test_work_is_not_repeated_after_deaths_of_a_machine_the_parent_and_the_server(
    client, settings, bucket, undisturbed, workers, server, folder
):
    parents = [Machine(folder / f"parent-{number}", server.url) for number in range(2)]
    parameters = json.dumps([settings, pool_runtime(bucket, groups=4)])
    try:
        began = time()
        parents[0].run("-c", PARENT, parameters)
        victim = now_at_work(workers, began, 3)
        victim.kill()
        parents[0].kill()
        second = parents[1].run("-c", PARENT, parameters)
        until(
            lambda: "continues in the running flow run" in parents[1].last_output(), "a parent that continues"
        )
        now_at_work([worker for worker in workers if worker.alive], time(), 2)
        server.kill()
        sleep(3)
        server.start()
        assert second.wait(timeout=LIMIT) == 0, parents[1].last_output()
        assert "\n0 bytes of weights read" in parents[1].last_output()
    finally:
        for parent in parents:
            parent.kill()
    assert contents(bucket) == contents(undisturbed)
    for name in ("capture", "evaluate"):  # the export is written in the pass of the evaluation
        runs = runs_of(client, bucket, name)
        assert [log.work[f"{name}, layer"] for log in logs_of(runs, workers)] == [NEEDED]
    groups = groups_of(runs_of(client, bucket, "branch"))
    assert sorted(len(betas) for betas in groups) == [2, 2, 2, 3]
    for runs in groups.values():
        assert repeated(runs, workers, "branch, layer", NEEDED) == []
    # Only the group that died was restarted.
    assert sorted(len(runs) for runs in groups.values()) == [1, 1, 1, 2]
    ((dead, successor),) = [runs for runs in groups.values() if len(runs) == 2]
    assert (dead.state.name, dead.state.message) == ("Crashed", "no sign of life for 60 s")
    assert successor.state.is_completed()
    assert pid_of(successor) not in {each.pid for each in victim.said()}


def test_cancelling_a_search_stops_its_groups_and_the_next_search_continues_from_there(
    client, settings, before_the_lanes, undisturbed, workers, parents, caplog
):
    store, began = before_the_lanes, time()
    deployment = deploy(search, "parents", "cancelled")
    parameters = {"settings": settings, "runtime": pool_runtime(store, groups=2)}
    parent = client.create_flow_run_from_deployment(deployment, parameters=parameters)

    def ended() -> list[FlowRun]:
        runs = [client.read_flow_run(parent.id), *runs_of(client, store, "branch")]
        return runs if all(run.state.is_final() for run in runs) else []

    # Without holding them, a group could finish before the signal reaches it.
    with held_until_told(workers, began, 2) as held:
        until(lambda: held, "layer 2 of a group")
        client.set_flow_run_state(parent.id, Cancelling())
        until(ended, "the end of the search and its groups")
    assert [run.state.name for run in ended()] == ["Cancelled"] * 3
    branches = runs_of(client, store, "branch")
    layers = [log.work.get("branch, layer", [0])[-1] for log in logs_of(branches, workers)]
    assert 0 < max(layers) < LAYERS

    with caplog.at_level(logging.DEBUG, logger="layerwise.tasks.running.progress"):
        search(Search(**settings), SearchRuntime(store=store.url))
    assert contents(store) == contents(undisturbed)
    said = [f"DEBUG layerwise.tasks.running.progress - {record.getMessage()}" for record in caplog.records]
    resumed = [number for line in said if (number := mark_of(line)) and number.startswith("branch, layer")]
    assert len(resumed) <= 2 * LAYERS - sum(layers) + len(layers)


def test_a_part_that_cannot_work_fails_the_search_at_once_with_its_reason(
    client, settings, bucket, workers, folder, monkeypatch
):
    monkeypatch.chdir(folder / "small")  # no worker has this working folder
    with pytest.raises(
        PartFailed, match="^ValueError: 'small.gguf' is neither a file or folder on this machine"
    ):
        search(Search(**{**settings, "model": "small.gguf"}), SearchRuntime(**pool_runtime(bucket)))
    (run,) = runs_of(client, bucket, "capture")
    assert run.state.is_failed()
    # This machine has the model, and counts the tokens.
    assert {key.partition("/")[0] for key in contents(bucket)} == {"count_tokens"}


def test_a_scheduled_search_starts_by_itself_and_reuses_everything(client, scheduled, parents):
    runs: list[FlowRun] = []

    def ended() -> bool:
        which = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[scheduled]))
        runs[:] = [run for run in client.read_flow_runs(flow_run_filter=which) if run.state.is_final()]
        return bool(runs)

    until(ended, "the end of a scheduled search")
    (run,) = runs
    assert run.auto_scheduled
    assert run.state.is_completed()
    assert logs_of([run], [parents])[0].work == {}
    which = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))
    nothing_to_do = "Everything was in the store already: no layer was computed"
    until(lambda: any(nothing_to_do in log.message for log in client.read_logs(which)), "its log")


def test_the_group_of_a_killed_local_process_continues_from_its_last_layer(
    client, settings, before_the_lanes, undisturbed, server, begin, folder, monkeypatch
):
    store = before_the_lanes
    here = Machine(folder / "here", server.url)
    for name in ("PREFECT_HOME", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, here.environment[name])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    runtime = {"store": store.url, "fan_out": "processes:2", "groups": 2, "boundary_layers": 1}
    parent = begin(settings, runtime)
    pid = here.wait_until_said(layer_of_a_group(2), LIMIT).pid
    (process,) = [process for process in here.processes() if process.pid == pid]
    gpus = {process.environ().get("CUDA_VISIBLE_DEVICES") for process in here.processes()}
    assert {"4", "7"} <= gpus  # each process has a GPU of its own
    process.kill()
    parent.result(timeout=LIMIT)
    assert contents(store) == contents(undisturbed)
    logs: dict[int, list[tuple[float, str]]] = {}
    for each in here.said():
        logs.setdefault(each.pid, []).append((each.at, each.line))
    killed = Log.of(logs.pop(pid)).work["branch, layer"]
    other, successor = (Log.of(lines).work["branch, layer"] for lines in logs.values())
    assert other == NEEDED
    assert successor in (NEEDED[killed[-1] :], NEEDED[killed[-1] - 1 :])
    assert sorted(run.state.name for run in runs_of(client, store, "branch")) == [
        "Completed",
        "Completed",
        "Crashed",
    ]
