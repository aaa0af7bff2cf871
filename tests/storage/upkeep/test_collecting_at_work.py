"""Garbage collection while other processes work, or collect garbage, in the store."""

import json
import os
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from layerwise.storage.files.publishing import overwrite
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.signs_of_life import storage_clock
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import STALE, collect, plan_collection
from tests.leftovers import (
    DAY,
    OTHER,
    STAGE,
    build_weights,
    collect_all,
    die_in_attempt,
    kinds_of,
    paths_in,
    plan,
)

WRITER = """
import json, sys
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

store = ArtifactStore(sys.argv[1])

def told(line):
    print(line, flush=True)
    assert sys.stdin.readline()

def build(draft):
    draft.write("inherited.bin", b"i" * 1000)
    draft.save_resume_point(1, lambda state: state.write("state.bin", b"s" * 1000))
    for number in range(3):
        told(f"round {number}")
        draft.write(f"layer-{number}.bin", str(number).encode() * 1000)
        told(f"written {number}")
        draft.save_resume_point(number + 2, lambda state: state.write("state.bin", b"s" * 1000))
    told("before the commit")

with announced(store, "a search"):
    store.get_or_build(Stage("capture", 1), build)
    told("committed")
"""


def test_files_modified_during_the_grace_period_stay(store):
    die_in_attempt(store)
    build_weights(store, OTHER)
    assert plan(store, later=3500.0).garbage == ()
    assert len(plan(store, later=3700.0).garbage) == 1
    assert plan_collection(store).garbage == ()


def test_the_age_of_an_attempt_is_that_of_its_newest_file(tmp_path):
    store = ArtifactStore(str(tmp_path))
    build_weights(store)
    attempt = tmp_path / STAGE.key / ("b" * 32)
    attempt.mkdir()
    for name, age in [("old.bin", 10 * DAY), ("new.bin", 0.0)]:
        (attempt / name).write_bytes(b"x")
        os.utime(attempt / name, (storage_clock(store) - age,) * 2)
    assert plan_collection(store).garbage == ()
    os.utime(attempt / "new.bin", (storage_clock(store) - DAY,) * 2)
    assert {each.path.rpartition("/")[2] for each in plan_collection(store).garbage} == {"old.bin", "new.bin"}


def test_a_folder_without_a_manifest_stays_completely_while_a_process_works_there(tmp_path):
    """A running process may have inherited old files that no resume point names any more."""
    store = ArtifactStore(str(tmp_path))
    die_in_attempt(store)
    for path in paths_in(store):
        os.utime(tmp_path / path, (1e9, 1e9))
    assert len(plan_collection(store).garbage) == 1
    die_in_attempt(store)
    assert plan_collection(store).garbage == ()


def test_files_that_came_into_use_after_the_plan_stay(store):
    """The manifest that names the files is committed after the plan."""
    die_in_attempt(store)
    [path] = paths_in(store)
    collection = plan(store)
    assert [each.path for each in collection.garbage] == [path]

    build_weights(store, OTHER)
    manifest = read_sealed(store.fs, f"{store.root}/{OTHER.key}/manifest.json")
    file = next(iter(manifest["files"].values())) | {"path": path}
    document = {**manifest, "key": STAGE.key, "files": {"layer-unnamed.bin": file}}
    overwrite(store.fs, f"{store.root}/{STAGE.key}/manifest.json", seal(document))
    assert collect(store, collection).garbage == ()
    assert path in paths_in(store)


def test_two_collections_at_once_delete_everything_once(store):
    for number in range(20):
        die_in_attempt(store, Stage("branch", 1, settings=number))
    artifact = build_weights(store)
    collections = [plan(store), plan(ArtifactStore(store.url))]
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(collect, [store, ArtifactStore(store.url)], collections))
    assert [each.failures for each in done] == [(), ()]
    assert paths_in(store) == {f"{STAGE.key}/manifest.json", artifact.files["weights.bin"].path}


@pytest.fixture
def writer(pytestconfig):
    """A real process that builds an artifact step by step, and waits for the test before each step."""
    started = []

    def start(store):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, store.url],
            cwd=pytestconfig.rootpath,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(params=["local", "s3"])
def shared_store(request, tmp_path) -> ArtifactStore:
    """A store that several processes can use."""
    if request.param == "local":
        return ArtifactStore(str(tmp_path / "store"))
    return ArtifactStore(f"s3://{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}")


@pytest.mark.usefixtures("no_grace_period")
def test_collecting_deletes_nothing_of_a_running_process(shared_store, writer):
    store = shared_store
    die_in_attempt(store, OTHER)
    process = writer(store)
    lines = []
    while not lines or lines[-1] != "committed":
        lines.append(process.stdout.readline().strip())
        assert process.poll() is None
        # The process may be as old as the garbage, so only the horizon protects its files.
        collection = plan(store, later=60.0)
        assert collection.running[0].pid == process.pid
        assert collect(store, collection).failures == ()
        process.stdin.write("go on\n")
        process.stdin.flush()
    assert lines[-2:] == ["before the commit", "committed"]
    assert process.wait() == 0
    artifact = store.get(STAGE.key)
    assert sorted(artifact.files) == ["inherited.bin", "layer-0.bin", "layer-1.bin", "layer-2.bin"]
    assert [store.read(artifact, f"layer-{n}.bin") for n in range(3)] == [
        str(n).encode() * 1000 for n in range(3)
    ]


@pytest.mark.usefixtures("no_grace_period")
def test_files_of_a_killed_process_are_deleted_once_it_is_stale(shared_store, writer):
    store = shared_store
    process = writer(store)
    for line in ("round 0", "written 0"):
        assert process.stdout.readline().strip() == line
        process.stdin.write("go on\n")
        process.stdin.flush()
    assert process.stdout.readline().strip() == "round 1"
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = paths_in(store)
    assert plan(store, later=300.0).garbage == ()
    collected = collect_all(store, later=700.0)
    assert kinds_of(collected) == {STALE}, "the rest is its resume point"
    assert before - paths_in(store) == {each.path for each in collected.garbage}
    assert json.loads(store.fs.cat_file(f"{store.root}/{STAGE.key}/progress.json"))["step"] == 2
