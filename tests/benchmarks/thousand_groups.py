"""Work and memory of the parent process with 250 to 1,000 lane groups.

    .venv/bin/python tests/benchmarks/thousand_groups.py --folder /tmp/thousand \\
        --database postgresql+asyncpg://prefect:PASSWORD@localhost/prefect

Uses a real Prefect server (with SQLite, many concurrent writes can block it for up to a minute) and the real code of
the parent, which starts and watches the lane groups. The workers are simulated: each lane group takes one second, in
which it writes signs of life. Exits with 1 if the time per lane group is more than 1.5 times that of the smallest
number, or if the parent's memory grows by more than 50 MB.
"""

import argparse
import asyncio
import functools
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings
from prefect.states import Completed, Pending, Running

from layerwise.flows.fan_out import part_flows
from layerwise.flows.fan_out.dispatch import FanOut
from layerwise.flows.fan_out.part import Part, parameters_of
from layerwise.flows.fan_out.work_pool import WorkPool
from layerwise.flows.runtime import FanOutRuntime
from layerwise.flows.settings import Search
from layerwise.storage.draft import Draft
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from tests.prefect_server import PrefectServer, prefect_environment
from tests.workers import create_pool, deploy

COUNTS = (250, 500, 1000)
POOL, WORKERS = "lanes", 20
GROUP_SECONDS = 1.0
HEADER = "groups  total s   s/group  begin ms/group  watch ms/group  ms/poll  parent's CPU ms/group  peak MB"
SLOWER_LIMIT, GROWTH_LIMIT = 1.5, 50.0  # ratio; MB


@dataclass
class Cost:
    """Cost of one number of lane groups."""

    groups: int
    total: float = 0.0  # seconds of wall time
    processor: float = 0.0  # seconds of the parent's CPU time
    peak: float = 0.0  # peak memory of the parent in MB
    spent: dict[str, list[float]] = field(default_factory=lambda: {"begin": [], "poll": []})

    def __str__(self) -> str:
        poll = 1000 * sum(self.spent["poll"]) / len(self.spent["poll"])
        return (
            f"{self.groups:6d} {self.total:8.1f} {self.total / self.groups:9.3f} {1000 * self.submission:15.1f}"
            f" {1000 * self.watching:15.1f} {poll:8.0f} {1000 * self.processor / self.groups:22.1f} {self.peak:8.1f}"
        )

    @property
    def submission(self) -> float:
        """Seconds per group."""
        return sum(self.spent["begin"]) / self.groups

    @property
    def watching(self) -> float:
        """Seconds per group."""
        return sum(self.spent["poll"]) / self.groups


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=lambda name: Path(name).resolve(), required=True, help="a new folder"
    )
    parser.add_argument(
        "--database", help="postgresql+asyncpg://... of an empty database; SQLite in the folder if left out"
    )
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        asyncio.run(work())
        return
    database = {"PREFECT_API_DATABASE_CONNECTION_URL": arguments.database} if arguments.database else {}
    with PrefectServer(arguments.folder / "server", **database) as server:
        environment = prefect_environment(arguments.folder / "workers", PREFECT_API_URL=server.url)
        with temporary_settings({PREFECT_API_URL: server.url, PREFECT_HOME: arguments.folder / "home"}):
            with get_client(sync_client=True) as client:
                create_pool(client, POOL)
            for each in (part_flows.capture, part_flows.branch, part_flows.evaluate):
                deploy(each, POOL, each.name)
            command = [sys.executable, __file__, "--folder", str(arguments.folder), "--work"]
            worker = subprocess.Popen(command, env=environment)
            try:
                print(HEADER)
                costs = []
                for count in COUNTS:
                    costs.append(measure(count, arguments.folder / f"store-{count}"))
                    print(costs[-1], flush=True)
            finally:
                worker.kill()
                worker.wait()
    sys.exit(report(costs))


def report(costs: list[Cost]) -> int:
    """Compare the last cost with the first; return 1 if something grows too much."""
    first, last = costs[0], costs[-1]
    ratios = {
        "total": last.total * first.groups / (first.total * last.groups),
        "begin": last.submission / first.submission,
        "watch": last.watching / first.watching,
        "parent's CPU": last.processor * first.groups / (first.processor * last.groups),
    }
    growth = last.peak - first.peak
    shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
    print(f"per group, {last.groups} against {first.groups}: {shown} (at most {SLOWER_LIMIT})")
    print(f"the parent's memory grew by {growth:.1f} MB (at most {GROWTH_LIMIT:g})")
    return int(max(ratios.values()) > SLOWER_LIMIT or growth > GROWTH_LIMIT)


def measure(count: int, folder: Path) -> Cost:
    """Run ``count`` lane groups with an empty store."""
    cost, process, store = Cost(count), psutil.Process(), ArtifactStore(str(folder))
    settings = Search(model="demo", sparsity=0.5)
    runtime = FanOutRuntime(store=str(folder), fan_out=f"pool:{POOL}", groups=count)

    def part(number: int) -> Part:
        parameters = parameters_of(settings, runtime) | {"points": [[number / count, 0.0]]}
        stage = lane(number / count)
        title = f"group {number + 1} of {count}"
        return Part("branch", title, title, parameters, lambda: store.find(stage) is not None)

    @flow(name=f"parent of {count}")
    def parent() -> None:
        with get_client(sync_client=True) as client:
            fan_out = FanOut(client, store, WorkPool(client, POOL), f"groups:{count}")
            for name, method in (("begin", "_start"), ("poll", "_poll")):
                setattr(fan_out, method, timed(getattr(fan_out, method), cost.spent[name]))
            fan_out.run([part(number) for number in range(count)])

    before, began = process.cpu_times(), time.monotonic()
    with peak_memory(process, cost):
        parent()
    after = process.cpu_times()
    cost.total = time.monotonic() - began
    cost.processor = after.user + after.system - before.user - before.system
    assert sum(1 for _ in store.artifacts()) == count, "a lane group was not run"
    return cost


def lane(beta: float) -> Stage:
    return Stage("lane", 1, {"beta": beta})


def timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    @functools.wraps(function)
    def timing(*args: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args)
        finally:
            seconds.append(time.monotonic() - began)

    return timing


@contextmanager
def peak_memory(process: psutil.Process, cost: Cost) -> Iterator[None]:
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.1):
            cost.peak = max(cost.peak, process.memory_info().rss / 1e6)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


async def work() -> None:
    """Simulate all workers: take flow runs from the pool, as Prefect's workers do, and write only signs of life."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(WORKERS))
    # One request at a time, because many concurrent writes can block a server with SQLite for up to a minute.
    turn = asyncio.Lock()
    tasks: set[asyncio.Task] = set()
    async with get_client() as client:
        while True:
            soon = datetime.now(UTC) + timedelta(seconds=1)
            async with turn:
                await client.send_worker_heartbeat(POOL, "workers", heartbeat_interval_seconds=30)
                found = await client.get_scheduled_flow_runs_for_work_pool(POOL, scheduled_before=soon)
            for each in found[: WORKERS - len(tasks)]:
                async with turn:
                    await client.set_flow_run_state(each.flow_run.id, Pending())
                task = asyncio.create_task(run_group(client, each.flow_run, turn))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            await asyncio.sleep(0.5)


async def run_group(client: PrefectClient, run: FlowRun, turn: asyncio.Lock) -> None:
    async with turn:
        await client.set_flow_run_state(run.id, Running())
    await asyncio.to_thread(sleep_and_build, run)
    async with turn:
        await client.set_flow_run_state(run.id, Completed())


def sleep_and_build(run: FlowRun) -> None:
    store = ArtifactStore(run.parameters["runtime"]["store"])
    with announced(store, run.name, run.id.hex):
        time.sleep(GROUP_SECONDS)
        store.get_or_build(lane(run.parameters["points"][0][0]), write_lane)


def write_lane(draft: Draft) -> None:
    draft.write("lane", b"done")


if __name__ == "__main__":
    main()
