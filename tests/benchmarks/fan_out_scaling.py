"""Speed-up of a search on two and four workers that mostly wait for the store.

    AWS_ENDPOINT_URL=http://... .venv/bin/python tests/benchmarks/fan_out_scaling.py --folder /tmp/scaling \\
        --store s3://bucket/scaling

Eight betas in four lane groups, on 1, 2 and 4 real process workers. A proxy in front of the S3 server delays every
response by a fixed time, so that each lane group waits much longer than its process needs to start on two cores. Prints
the speed-up relative to one worker, and the share of orchestration in the time of a lane group. Exits with 1 if the
speed-up is below 0.8 of the number of workers.
"""

import argparse
import os
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from layerwise.flows.fan_out import part_flows
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.flows.settings import Search
from layerwise.storage.store import ArtifactStore
from tests.fault_proxy import FaultProxy
from tests.faults import stall_before_head
from tests.prefect_server import FEW_WRITES, PrefectServer
from tests.small_search import small_search
from tests.workers import Worker, create_pool, deploy

WORKERS = (1, 2, 4)
GROUPS, LAYERS, BETAS = 4, 12, [0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07]  # and beta 0
LATENCY = 0.2  # seconds; a lane group then takes about 80
LEAST_EFFICIENCY = 0.8


@dataclass(frozen=True)
class Timing:
    """Times with one number of workers, in seconds.

    Attributes:
        workers: number of workers.
        total: time of the whole search.
        starts: for every lane group, the time from a free worker to the start of the work in its process.
        notices: for every lane group, the time from the end of its process until the parent notices it.
        works: for every lane group, the time between these two.
    """

    workers: int
    total: float
    starts: list[float]
    notices: list[float]
    works: list[float]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=lambda name: Path(name).resolve(), required=True, help="a new folder"
    )
    parser.add_argument("--store", required=True, help="an S3 URL that does not exist yet")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    settings = small_search(folder / "small", LAYERS) | {"betas": BETAS, "retain": "none"}
    with ExitStack() as stack:
        server = stack.enter_context(PrefectServer(folder / "server", **FEW_WRITES))
        ours = {PREFECT_API_URL: server.url, PREFECT_HOME: folder / "home"}
        stack.enter_context(temporary_settings(ours))
        client = stack.enter_context(get_client(sync_client=True))
        proxy = stack.enter_context(FaultProxy(os.environ["AWS_ENDPOINT_URL"]))
        proxy.inject(stall_before_head(LATENCY), times=float("inf"))
        whole = ArtifactStore(str(folder / "whole"))
        search(Search(**settings), SearchRuntime(store=whole.url))
        timings = []
        for count in WORKERS:
            store = ArtifactStore(f"{arguments.store}/{count}")
            copy_all_but_lanes(whole, store)
            timings.append(measure(client, settings, store, count, folder, server.url, proxy.url))
            proxy.requests.clear()
            proxy.caught.clear()
    sys.exit(report(timings))


def report(timings: list[Timing]) -> int:
    """Print the table; return 1 if the speed-up is too low."""
    print(f"{GROUPS} lane groups, every request delayed by {LATENCY:g} s")
    print("workers  total s  speed-up  of ideal  work s/group  start s/group  notice s/group")
    efficiencies = []
    for timing in timings:
        speed_up = timings[0].total / timing.total
        efficiencies.append(speed_up / timing.workers)
        print(
            f"{timing.workers:7d} {timing.total:8.1f} {speed_up:9.2f} {efficiencies[-1]:9.2f}"
            f" {statistics.mean(timing.works):13.1f} {statistics.mean(timing.starts):14.1f}"
            f" {statistics.mean(timing.notices):15.1f}"
        )
    print(f"(of ideal: at least {LEAST_EFFICIENCY})")
    return int(min(efficiencies) < LEAST_EFFICIENCY)


def copy_all_but_lanes(source: ArtifactStore, target: ArtifactStore) -> None:
    for artifact in source.artifacts():
        if artifact.recipe["name"] not in ("lane", "lane_group"):
            target.fs.put(f"{source.root}/{artifact.key}", f"{target.root}/{artifact.key}", recursive=True)


def measure(
    client: SyncPrefectClient,
    settings: dict[str, Any],
    store: ArtifactStore,
    count: int,
    folder: Path,
    prefect_url: str,
    s3_url: str,
) -> Timing:
    """Run the lane groups on ``count`` workers of a new pool."""
    pool = f"lanes-{count}"
    create_pool(client, pool)
    for each in (part_flows.capture, part_flows.branch, part_flows.evaluate):
        deploy(each, pool, pool)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                Worker(pool, folder / f"{pool}-{number}", prefect_url, AWS_ENDPOINT_URL=s3_url)
            )
            for number in range(count)
        ]
        for worker in workers:
            worker.wait_until_ready()
        runtime = SearchRuntime(store=store.url, fan_out=f"pool:{pool}", groups=GROUPS, boundary_layers=1)
        began = time.time()
        search(Search(**settings), runtime)
        total = time.time() - began
        return timing_of(client, store, workers, began, total)


def timing_of(
    client: SyncPrefectClient, store: ArtifactStore, workers: list[Worker], began: float, total: float
) -> Timing:
    runs = [run for run in flow_runs(client, "branch") if run.parameters["runtime"]["store"] == store.url]
    assert len(runs) == GROUPS, f"{len(runs)} flow runs for {GROUPS} groups"
    noticed = noticed_at(client, store)
    starts, notices, works = [], [], []
    times = []
    for run in runs:
        started, created, ended = (
            at.timestamp() for at in (run.start_time, run.created, run.end_time) if at is not None
        )
        times.append((started, created, ended, run.infrastructure_pid))
    for worker in workers:
        free = began
        for _, created, end, process in sorted(times):
            said = [each.at for each in worker.said() if str(each.pid) == process]
            if said:
                ready = max(free, created)
                starts.append(said[0] - ready)
                works.append(end - said[0])
                notices.append(min(at for at in noticed if at > end) - end)
                free = end
    return Timing(len(workers), total, starts, notices, works)


def flow_runs(client: SyncPrefectClient, flow: str) -> list[FlowRun]:
    return client.read_flow_runs(flow_filter=FlowFilter(name=FlowFilterName(any_=[flow])))


def noticed_at(client: SyncPrefectClient, store: ArtifactStore) -> list[float]:
    """Return the times at which the parent logged the end of a lane group, in order."""
    parents = [r.id for r in flow_runs(client, "search") if r.parameters["runtime"]["store"] == store.url]
    which = LogFilter(flow_run_id=LogFilterFlowRunId(any_=parents))
    deadline = time.monotonic() + 60  # the log of a run is sent in batches
    while True:
        logs = client.read_logs(which, limit=200)
        done = [log.timestamp.timestamp() for log in logs if log.message.endswith(": done")]
        if len(done) >= GROUPS or time.monotonic() > deadline:
            return sorted(done)
        time.sleep(1)


if __name__ == "__main__":
    main()
