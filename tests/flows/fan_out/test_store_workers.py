"""A search spread over workers that share only the store with it: no Prefect server in between."""

import os
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import CancelledRun

from layerwise.flows.fan_out import liveness, store_workers
from layerwise.flows.fan_out.dispatch import FanOut
from layerwise.flows.fan_out.part import Part, PartFailed
from layerwise.flows.fan_out.published_parts import (
    PartEnd,
    PublishedPart,
    claim_part,
    list_parts,
    publish_part,
    read_claim,
    read_end,
    read_part,
    remove_part,
    report_end,
)
from layerwise.flows.fan_out.store_workers import StoreWorkers
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.storage.signs_of_life import announced, running_processes, storage_clock
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import plan_collection

LIMIT = 600.0  # seconds of each wait
SIGN = "0123456789abcdef" * 2
PART = PublishedPart(
    "f" * 32, "search:1", "key", "branch", "a group", {"points": [[0.1, 0.0]], "windows": None}
)
# A worker that gets a signal while it reads the second layer of its first lane group. Its Prefect server gets it, too, and
# SIGTERM: SLURM and systemd signal all processes of a job step.
SIGNALLED = """
import sys, psutil
from prefect.runtime import flow_run
from layerwise.tasks.models.checkpoint import Checkpoint

number, read = int(sys.argv.pop(1)), Checkpoint.layers

def layers(checkpoint, first=0, *device):
    for index, layer in enumerate(read(checkpoint, first, *device), first):
        if flow_run.flow_name == "branch" and index == 1:
            for server in psutil.Process().children():
                server.send_signal(number)
                server.terminate()
            psutil.Process().send_signal(number)
        yield layer

Checkpoint.layers = layers
from layerwise.flows.cli.main import main
main()
"""


def test_one_of_two_workers_gets_a_part_and_its_end_reaches_the_search(store):
    name = publish_part(store, PART)
    assert list_parts(store) == {name: {""}}
    assert read_part(store, name) == PART
    assert read_claim(store, name) is None
    assert [claim_part(store, name, sign) for sign in (SIGN, "a" * 32)] == [True, False]
    assert read_claim(store, name) == SIGN
    report_end(store, name, PartEnd(StateType.CRASHED, "stopped"))
    assert read_end(store, name) == PartEnd(StateType.CRASHED, "stopped")
    assert list_parts(store) == {name: {"", ".claim", ".end"}}
    now = plan_collection(store)
    assert (now.garbage, now.not_ours) == ((), ())
    later = plan_collection(store, now=storage_clock(store) + 2 * 3600)
    assert {each.path for each in later.garbage} == {
        f"parts/{name}{kind}.json" for kind in ("", ".claim", ".end")
    }
    remove_part(store, name)
    # A worker that was paused for too long.
    report_end(store, name, PartEnd(StateType.COMPLETED, "done"))
    assert not claim_part(store, name, SIGN)
    assert list_parts(store) == {}


def test_a_listing_that_the_client_keeps_does_not_hide_processes_and_parts(s3_bucket):
    url = f"s3://{s3_bucket}/{uuid.uuid4().hex}"
    # As gcsfs does by default, and s3fs if the user's configuration says so.
    here, elsewhere = ArtifactStore(url, use_listings_cache=True), ArtifactStore(url)
    for number in (1, 2):
        with announced(elsewhere, "search", f"{number}" * 32):
            publish_part(elsewhere, PART)
            assert [each.name for each in running_processes(here, 0.0)] == [f"{number}" * 32]
        assert len(list_parts(here)) == number


class Machine:
    """A folder that is the home of one worker at a time, which has a Prefect server of its own."""

    def __init__(self, folder, store):
        folder.mkdir()
        self.folder, self.store = folder, store

    def start(self, *script, options=()):
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "XDG_"))
        }
        home = {
            "HOME": str(self.folder),
            "PREFECT_HOME": str(self.folder / "prefect"),
            "OMP_NUM_THREADS": "1",
        }
        slow = {"PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "300", "PYTHONPATH": os.getcwd()}
        return subprocess.Popen(
            [sys.executable, *(script or ("-m", "layerwise")), "work", self.store, *options],
            env=kept | home | slow,
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "said").open("a"),
        )

    def said(self):
        return (self.folder / "said").read_text()


def test_groups_of_a_killed_and_of_a_stopped_worker_continue_in_another_one(
    workshop, finished, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(liveness, "SILENT", 20.0)
    monkeypatch.setattr(store_workers, "ALONE", 1.0)
    store = str(tmp_path / "store")
    killed, stopped = Machine(tmp_path / "killed", store), Machine(tmp_path / "stopped", store)
    runtime = SearchRuntime(store=store, fan_out="store", groups=2)
    processes = []
    with ThreadPoolExecutor() as threads:
        parent = threads.submit(copy_context().run, search, workshop.settings(), runtime)
        try:
            processes.append(killed.start("-c", SIGNALLED, "9", options=["--boundary-layers=1"]))
            processes.append(stopped.start("-c", SIGNALLED, "10", options=["--on-signal=USR1"]))
            assert processes[1].wait(LIMIT) == 143, stopped.said()
            assert processes[0].wait(LIMIT) == -9, killed.said()
            processes.append(stopped.start())
            result = parent.result(LIMIT)
            assert processes[2].wait(LIMIT) == 0, stopped.said()  # no search is running any more
        finally:
            for process in processes:
                process.kill()
    assert result.bytes_read == 0  # no weight was read here
    assert {role: artifact.content for role, artifact in result.stages.items()} == {
        role: artifact.content for role, artifact in finished[0].stages.items()
    }
    assert "layerwise: stopped by SIGUSR1; finished stages" in stopped.said()
    assert stopped.said().count(" resumed from layer ") >= 2
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert f"the search waits. Start workers on machines that reach the store: layerwise work {store}" in said
    assert "no sign of life for 20 s" in said
    assert "stopped by SIGUSR1" in said
    files = ArtifactStore(store).fs.find(store)
    assert [file for file in files if "/parts/" in file] == []


@pytest.fixture
def local_store(tmp_path) -> ArtifactStore:
    return ArtifactStore(str(tmp_path / "store"))


@pytest.fixture
def dispatch(prefect_backend, local_store, monkeypatch):
    """Return a function that runs one part of a search within a flow, and the parameters that its `running` gave."""
    monkeypatch.setattr("layerwise.flows.fan_out.dispatch.POLL", 0.1)
    parameters = {**PART.parameters, "runtime": {"store": local_store.url}}

    def run(done):
        part = Part("branch", "a group", "a search: a group", parameters, done)

        @flow(name="parent")
        def parent():
            with get_client(sync_client=True) as client:
                workers = StoreWorkers(client, local_store, PART.tag)
                fan_out = FanOut(client, local_store, workers, PART.tag)
                running = fan_out.running("branch")
                try:
                    fan_out.run([part])
                finally:
                    workers.close()
                return running

        return parent()

    return run, Part("branch", "", "", parameters, lambda: False).key


def test_a_search_that_starts_again_waits_for_the_worker_that_has_its_group(local_store, dispatch):
    run, key = dispatch
    left = PublishedPart("e" * 32, PART.tag, key, PART.flow, PART.title, PART.parameters)
    taken, left_open = publish_part(local_store, left), publish_part(local_store, left)
    done = threading.Event()

    def end():
        while left_open in list_parts(local_store):  # the search removes it when it begins
            time.sleep(0.05)
        done.set()
        report_end(local_store, taken, PartEnd(StateType.COMPLETED, ""))

    with announced(local_store, "worker", SIGN):
        assert claim_part(local_store, taken, SIGN)
        threading.Thread(target=end).start()
        assert run(done.is_set) == [PART.parameters]
    assert list_parts(local_store) == {}


@pytest.mark.parametrize(
    ("state", "raised"), [(StateType.FAILED, PartFailed), (StateType.CANCELLED, CancelledRun)]
)
def test_a_part_that_fails_in_its_worker_ends_the_search(local_store, dispatch, state, raised):
    run, _ = dispatch

    def fail():
        while not (parts := list_parts(local_store)):
            time.sleep(0.05)
        (name,) = parts
        assert claim_part(local_store, name, SIGN)
        report_end(local_store, name, PartEnd(state, "ValueError: no such text"))

    threading.Thread(target=fail).start()
    with pytest.raises(raised):
        run(lambda: False)
    assert list_parts(local_store) == {}
