"""Garbage collection: what somebody can reach or is still writing stays, everything else of ours goes."""

import json
import os
import signal
import subprocess
import sys
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from storage.collect import StoreInUse, collect, plan_collection
from storage.document import read_sealed, seal
from storage.garbage import (
    ARTIFACTS,
    ATTEMPTS,
    BOUNDARIES,
    SET_ASIDE,
    STALE,
    TEMPORARY,
    UPLOADS,
)
from storage.publishing import overwrite
from storage.running import announced, storage_clock
from storage.stage import Stage
from storage.store import ArtifactStore

DAY = 86400.0
STAGE = Stage("capture", 1)
OTHER = Stage("branch", 1, settings={"beta": 0.1}, inputs={"capture": STAGE.key})
WRITER = """
import json, sys
from storage.running import announced
from storage.stage import Stage
from storage.store import ArtifactStore

store = ArtifactStore(sys.argv[1])

def told(line):
    print(line, flush=True)
    assert sys.stdin.readline()

def build(draft):
    draft.write("inherited.bin", b"i" * 1000)
    draft.save_progress(1, lambda state: state.write("state.bin", b"s" * 1000))
    for number in range(3):
        told(f"round {number}")
        draft.write(f"layer-{number}.bin", str(number).encode() * 1000)
        told(f"written {number}")
        draft.save_progress(number + 2, lambda state: state.write("state.bin", b"s" * 1000))
    told("before the commit")

with announced(store.fs, store.root, "a search"):
    store.get_or_build(Stage("capture", 1), build)
    told("committed")
"""


class Killed(BaseException):
    """The process is gone: nothing tidies up after it."""


def paths_in(store):
    prefix = f"{store.root}/"
    rows = store.fs.find(store.root, detail=True)
    return {path.removeprefix(prefix) for path, row in rows.items() if row["type"] == "file"}


def plan(store, later=DAY, grace_seconds=0.0, **kwargs):
    """What would be deleted in a day, when everything that there is now is old."""
    return plan_collection(
        store, grace_seconds=grace_seconds, now=storage_clock(store.fs, store.root) + later, **kwargs
    )


def collect_all(store, **kwargs):
    collected = collect(store, plan(store, **kwargs))
    assert collected.failures == ()
    return collected


def kinds_of(collection):
    return {each.kind for each in collection.garbage}


def build_weights(store, stage=STAGE, content=b"wwww"):
    return store.get_or_build(stage, lambda draft: draft.write("weights.bin", content))


def die_in_attempt(store, stage=STAGE, boundaries=0):
    """An attempt that is killed after so many resume points, in the middle of a layer."""

    def build(draft):
        for layer in range(boundaries):
            draft.write(f"layer-{layer}.bin", b"layer")
            draft.save_progress(layer + 1, lambda state: state.write("state.bin", b"state"))
        draft.write("layer-unnamed.bin", b"layer")
        raise Killed

    with pytest.raises(Killed):
        store.get_or_build(stage, build)


def finish(store, stage=STAGE):
    def build(draft):
        draft.write("last.bin", b"last")

    return store.get_or_build(stage, build)


@pytest.fixture
def leave_states(monkeypatch):
    """Resume points that are killed before they delete the one before."""
    monkeypatch.setattr("storage.draft.remove_quietly", lambda fs, paths: None)


def test_a_store_of_whole_artifacts_has_no_garbage(store):
    artifacts = [build_weights(store), build_weights(store, OTHER)]
    before = paths_in(store)
    assert plan(store).garbage == ()
    assert collect_all(store).garbage == ()
    assert paths_in(store) == before
    assert [store.read(artifact, "weights.bin") for artifact in artifacts] == [b"wwww"] * 2


def test_an_abandoned_attempt_goes(store):
    die_in_attempt(store)
    artifact = build_weights(store)
    [garbage] = plan(store).garbage
    assert (garbage.kind, garbage.key, garbage.size) == (ATTEMPTS, STAGE.key, 5)
    assert collect_all(store).garbage == (garbage,)
    assert paths_in(store) == {f"{STAGE.key}/manifest.json", artifact.files["weights.bin"].path}


def test_an_attempt_without_anything_that_was_committed_goes(store):
    die_in_attempt(store)
    assert kinds_of(collect_all(store)) == {ATTEMPTS}
    assert paths_in(store) == set()


def test_a_resume_point_stays_with_all_it_names(store):
    die_in_attempt(store, boundaries=2)
    collected = collect_all(store)
    assert [each.path.rpartition("/")[2] for each in collected.garbage] == ["layer-unnamed.bin"]
    resumed = []

    def build(draft):
        resumed.append((draft.resumed.step, sorted(draft.files)))
        assert store.read(draft.resumed.state, "state.bin") == b"state"

    artifact = store.get_or_build(STAGE, build)
    assert resumed == [(2, ["layer-0.bin", "layer-1.bin"])]
    assert store.read(artifact, "layer-1.bin") == b"layer"


def test_superseded_resume_points_go(store, leave_states):
    die_in_attempt(store, boundaries=3)
    states = {path for path in paths_in(store) if path.endswith("state.bin")}
    assert len(states) == 3
    collected = collect_all(store)
    assert len(states & paths_in(store)) == 1
    assert {each.path for each in collected.garbage if each.kind == BOUNDARIES} == states - paths_in(store)


def test_a_resume_point_beside_a_manifest_goes(store, leave_states):
    die_in_attempt(store, boundaries=1)
    artifact = finish(store)
    assert any(path.endswith("progress.json") for path in paths_in(store))
    collected = collect_all(store)
    assert kinds_of(collected) == {ATTEMPTS, BOUNDARIES}
    assert paths_in(store) == {f"{STAGE.key}/manifest.json", *(file.path for file in artifact.files.values())}
    assert store.read(artifact, "layer-0.bin") == b"layer"


def test_files_that_were_being_written_go(store):
    artifact = build_weights(store)
    token = uuid.uuid4().hex
    left = {
        f"{STAGE.key}/manifest.json.{token}.tmp",
        f"{artifact.files['weights.bin'].path}.{token}.tmp",
        f"running/{token}.json.{token}.tmp",
        f"{token}.clock",
        f"probe-{token}",
    }
    for path in left:
        overwrite(store.fs, f"{store.root}/{path}", b"half")
    assert {each.path for each in plan(store).of_kind(TEMPORARY)} == left
    assert kinds_of(collect_all(store)) == {TEMPORARY}
    assert store.read(artifact, "weights.bin") == b"wwww"


def test_a_file_that_only_looks_temporary_stays_if_it_is_named(store):
    name = f"weights.{'0' * 32}.tmp"
    artifact = store.get_or_build(STAGE, lambda draft: draft.write(name, b"w"))
    assert plan(store).garbage == ()
    assert store.read(artifact, name) == b"w"


def test_a_manifest_that_was_set_aside_goes_with_the_files_that_only_it_names(store):
    damaged = build_weights(store)
    document = store.fs.cat_file(f"{store.root}/{STAGE.key}/manifest.json")
    overwrite(store.fs, f"{store.root}/{STAGE.key}/manifest.json.damaged-{'a' * 32}", document)
    store.fs.rm_file(f"{store.root}/{STAGE.key}/manifest.json")
    artifact = build_weights(store, content=b"anew")
    collection = plan(store)
    assert {each.path for each in collection.of_kind(SET_ASIDE)} == {
        f"{STAGE.key}/manifest.json.damaged-{'a' * 32}",
        damaged.files["weights.bin"].path,
    }
    collect_all(store)
    assert store.read(artifact, "weights.bin") == b"anew"
    assert plan(store).garbage == ()


def test_a_sign_of_life_goes_when_it_is_stale(store):
    path = f"running/{'a' * 32}.json"
    overwrite(store.fs, f"{store.root}/{path}", b"{}")
    assert plan(store, later=300.0).garbage == ()
    [garbage] = collect_all(store).garbage
    assert (garbage.kind, garbage.path) == (STALE, path)


def test_what_was_modified_in_the_time_of_grace_stays(store):
    die_in_attempt(store)
    build_weights(store, OTHER)
    assert plan(store, later=3500.0, grace_seconds=3600.0).garbage == ()
    assert len(plan(store, later=3700.0, grace_seconds=3600.0).garbage) == 1
    assert plan_collection(store).garbage == ()


def test_an_attempt_is_judged_by_its_newest_file(tmp_path):
    store = ArtifactStore(str(tmp_path))
    build_weights(store)
    attempt = tmp_path / STAGE.key / ("b" * 32)
    attempt.mkdir()
    for name, age in [("old.bin", 10 * DAY), ("new.bin", 0.0)]:
        (attempt / name).write_bytes(b"x")
        os.utime(attempt / name, (storage_clock(store.fs, store.root) - age,) * 2)
    assert plan_collection(store).garbage == ()
    os.utime(attempt / "new.bin", (storage_clock(store.fs, store.root) - DAY,) * 2)
    assert {each.path.rpartition("/")[2] for each in plan_collection(store).garbage} == {"old.bin", "new.bin"}


def test_a_folder_without_a_manifest_stays_whole_while_somebody_is_at_work_there(tmp_path):
    """A running process may have taken over old files that no resume point names any more."""
    store = ArtifactStore(str(tmp_path))
    die_in_attempt(store)
    for path in paths_in(store):
        os.utime(tmp_path / path, (1e9, 1e9))
    assert len(plan_collection(store).garbage) == 1
    die_in_attempt(store)
    assert plan_collection(store).garbage == ()


@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
def test_a_folder_whose_document_is_damaged_is_kept_and_named(store, name):
    if name == "manifest.json":
        build_weights(store)
    else:
        die_in_attempt(store, boundaries=1)
    overwrite(store.fs, f"{store.root}/{STAGE.key}/{name}", b'{"format": 1')
    overwrite(store.fs, f"{store.root}/{STAGE.key}/{'c' * 32}/unnamed.bin", b"x")
    before = paths_in(store)
    collection = plan(store)
    assert collection.garbage == ()
    assert name in collection.damaged[STAGE.key]
    collect(store, collection)
    assert paths_in(store) == before


NOT_OURS = [
    "README.md",
    "running/notes.json",
    "capture/notes.txt",
    f"{STAGE.key}/notes.txt",
    f"{STAGE.key}/{'a' * 31}/weights.bin",
    f"datasets/{STAGE.key}/manifest.json.{'a' * 32}.tmp",
    "a.tmp",
]


def test_files_that_are_not_ours_are_named_and_survive(store):
    die_in_attempt(store)
    for path in NOT_OURS:
        overwrite(store.fs, f"{store.root}/{path}", b"precious")
    assert plan(store).not_ours == tuple(sorted(NOT_OURS))
    collect_all(store, keys_to_keep=lambda artifacts: set())
    assert paths_in(store) == set(NOT_OURS)


def test_links_on_a_local_disk_are_not_followed_and_not_removed(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    build_weights(store)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious.bin").write_bytes(b"precious")
    (tmp_path / "store" / STAGE.key / ("a" * 32)).symlink_to(elsewhere)
    (tmp_path / "store" / STAGE.key / ("b" * 32)).mkdir()
    (tmp_path / "store" / STAGE.key / ("b" * 32) / "link.bin").symlink_to(elsewhere / "precious.bin")
    collect_all(store)
    assert (tmp_path / "store" / STAGE.key / ("a" * 32) / "precious.bin").read_bytes() == b"precious"
    assert (tmp_path / "store" / STAGE.key / ("b" * 32) / "link.bin").read_bytes() == b"precious"


def keep(*stages):
    return lambda artifacts: {stage.key for stage in stages}


def test_everything_but_the_artifacts_to_keep_goes_on_request(store):
    build_weights(store)
    kept = build_weights(store, OTHER)
    die_in_attempt(store, Stage("export", 1), boundaries=1)
    seen = []

    def keys_to_keep(artifacts):
        seen.extend(sorted(artifact.key for artifact in artifacts))
        return {OTHER.key}

    collection = plan(store, keys_to_keep=keys_to_keep)
    assert seen == sorted([STAGE.key, OTHER.key])
    assert {each.key for each in collection.of_kind(ARTIFACTS)} == {STAGE.key, Stage("export", 1).key}
    assert collect(store, collection).failures == ()
    assert paths_in(store) == {f"{OTHER.key}/manifest.json", kept.files["weights.bin"].path}
    assert store.read(kept, "weights.bin") == b"wwww"


def test_young_artifacts_stay_even_if_only_results_are_to_stay(store):
    build_weights(store)
    assert plan_collection(store, keep()).garbage == ()


def test_artifacts_stay_while_a_process_may_need_them(store):
    build_weights(store)
    old = plan(store, keys_to_keep=keep())
    assert old.garbage
    before = paths_in(store)
    with announced(store.fs, store.root, "search demo"):
        with pytest.raises(StoreInUse, match=rf"'search demo', process {os.getpid()} on .*, since \d{{4}}-"):
            plan(store, later=0.0, keys_to_keep=keep())
        with pytest.raises(StoreInUse, match="--results-only"):
            collect(store, old)
        assert before < paths_in(store)
    assert paths_in(store) == before


def test_artifacts_stay_when_a_damaged_one_might_need_them(store):
    build_weights(store)
    build_weights(store, OTHER)
    overwrite(store.fs, f"{store.root}/{OTHER.key}/manifest.json", b"{")
    with pytest.raises(ValueError, match=f"1 artifacts are damaged.*{OTHER.key}"):
        plan(store, keys_to_keep=keep(STAGE))


def test_files_of_an_artifact_stay_when_its_manifest_cannot_be_deleted(tmp_path, monkeypatch):
    store = ArtifactStore(str(tmp_path))
    artifact = build_weights(store)
    build_weights(store, OTHER)
    remove = store.fs.rm_file

    def refusing(path):
        if path.endswith(f"{STAGE.key}/manifest.json"):
            raise PermissionError("not yours")
        remove(path)

    monkeypatch.setattr(store.fs, "rm_file", refusing)
    collected = collect(store, plan(store, keys_to_keep=keep()))
    assert [(each.path, each.problem) for each in collected.failures] == [
        (f"{STAGE.key}/manifest.json", "not yours")
    ]
    assert {each.key for each in collected.garbage} == {OTHER.key}
    assert store.read(artifact, "weights.bin") == b"wwww"


def test_what_has_come_into_use_since_the_plan_stays(store):
    """The manifest that names the files is committed after the plan was made."""
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


def test_a_plan_changes_nothing(store):
    die_in_attempt(store, boundaries=1)
    build_weights(store, OTHER)
    before = {path: store.fs.info(path) for path in store.fs.find(store.root)}
    plan(store)
    plan(store, keys_to_keep=keep())
    assert {path: store.fs.info(path) for path in store.fs.find(store.root)} == before


def test_folders_that_become_empty_are_removed_on_a_local_disk(tmp_path):
    store = ArtifactStore(str(tmp_path))
    die_in_attempt(store)
    kept = build_weights(store, OTHER)
    collect_all(store)
    folders = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir()}
    assert folders == {"branch", OTHER.key, kept.files["weights.bin"].path.rpartition("/")[0]}


@pytest.mark.parametrize("below", ["/models/run", ""], ids=["prefix", "whole bucket"])
def test_uploads_that_were_left_open_are_aborted_and_those_of_others_are_not(s3_bucket, below):
    store = ArtifactStore(f"s3://{uuid.uuid4().hex}{below}")
    bucket = store.root.partition("/")[0]
    store.fs.mkdir(bucket)
    build_weights(store)
    prefix = below.lstrip("/") and f"{below.lstrip('/')}/"
    ours = f"{prefix}{STAGE.key}/{'d' * 32}/weights.bin"
    others = [
        "somebody/else.bin",
        f"{prefix}capture/else.bin",
        f"models/run2/{STAGE.key}/{'d' * 32}/weights.bin",
    ]
    for key in [ours, *others]:
        store.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
    assert plan_collection(store).garbage == ()  # they are young
    [upload] = plan(store).garbage
    assert (upload.kind, upload.path) == (UPLOADS, ours.removeprefix(prefix))
    collect_all(store)
    left = [row["Key"] for row in store.fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]]
    assert sorted(left) == sorted(others)


@pytest.fixture
def writer(pytestconfig):
    """A real process that builds an artifact in a store step by step, each on our word."""
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


def test_collecting_takes_nothing_from_a_process_at_work(shared_store, writer):
    store = shared_store
    die_in_attempt(store, OTHER)
    process = writer(store)
    lines = []
    while not lines or lines[-1] != "committed":
        lines.append(process.stdout.readline().strip())
        assert process.poll() is None
        # For all that is known here the process may be as old as the garbage: nothing but the horizon protects it.
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


def test_what_a_killed_process_leaves_goes_once_it_is_stale(shared_store, writer):
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
