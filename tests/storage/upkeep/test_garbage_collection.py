"""Garbage collection: referenced files stay, all other files of ours are deleted."""

import uuid

import pytest

from layerwise.storage.files.publishing import overwrite
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import (
    ATTEMPTS,
    RESUME_POINTS,
    SET_ASIDE,
    STALE,
    TEMPORARY,
    UPLOADS,
    collect,
    plan_collection,
)
from tests.leftovers import (
    OTHER,
    STAGE,
    build_weights,
    collect_all,
    die_in_attempt,
    kinds_of,
    paths_in,
    plan,
)


def finish(store, stage=STAGE):
    def build(draft):
        draft.write("last.bin", b"last")

    return store.get_or_build(stage, build)


@pytest.fixture
def leave_states(monkeypatch):
    """Simulate processes that are killed before they delete the state of the previous resume point."""
    monkeypatch.setattr("layerwise.storage.draft.remove_quietly", lambda fs, paths: None)


def test_a_store_of_complete_artifacts_has_no_garbage(store):
    artifacts = [build_weights(store), build_weights(store, OTHER)]
    before = paths_in(store)
    assert plan(store).garbage == ()
    assert collect_all(store).garbage == ()
    assert paths_in(store) == before
    assert [store.read(artifact, "weights.bin") for artifact in artifacts] == [b"wwww"] * 2


def test_an_abandoned_attempt_is_deleted(store):
    die_in_attempt(store)
    artifact = build_weights(store)
    [garbage] = plan(store).garbage
    assert (garbage.kind, garbage.key, garbage.size) == (ATTEMPTS, STAGE.key, 5)
    assert collect_all(store).garbage == (garbage,)
    assert paths_in(store) == {f"{STAGE.key}/manifest.json", artifact.files["weights.bin"].path}


def test_an_attempt_in_a_folder_without_documents_is_deleted(store):
    die_in_attempt(store)
    assert kinds_of(collect_all(store)) == {ATTEMPTS}
    assert paths_in(store) == set()


def test_a_resume_point_stays_with_all_files_it_names(store):
    die_in_attempt(store, resume_points=2)
    collected = collect_all(store)
    assert [each.path.rpartition("/")[2] for each in collected.garbage] == ["layer-unnamed.bin"]
    resumed = []

    def build(draft):
        resumed.append((draft.resumed.step, sorted(draft.files)))
        assert store.read(draft.resumed.state, "state.bin") == b"state"

    artifact = store.get_or_build(STAGE, build)
    assert resumed == [(2, ["layer-0.bin", "layer-1.bin"])]
    assert store.read(artifact, "layer-1.bin") == b"layer"


def test_superseded_resume_points_are_deleted(store, leave_states):
    die_in_attempt(store, resume_points=3)
    states = {path for path in paths_in(store) if path.endswith("state.bin")}
    assert len(states) == 3
    collected = collect_all(store)
    assert len(states & paths_in(store)) == 1
    assert {each.path for each in collected.garbage if each.kind == RESUME_POINTS} == states - paths_in(store)


def test_a_resume_point_next_to_a_manifest_is_deleted(store, leave_states):
    die_in_attempt(store, resume_points=1)
    artifact = finish(store)
    assert any(path.endswith("progress.json") for path in paths_in(store))
    collected = collect_all(store)
    assert kinds_of(collected) == {ATTEMPTS, RESUME_POINTS}
    assert paths_in(store) == {f"{STAGE.key}/manifest.json", *(file.path for file in artifact.files.values())}
    assert store.read(artifact, "layer-0.bin") == b"layer"


def test_temporary_files_are_deleted(store):
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
    assert {each.path for each in plan(store).garbage if each.kind == TEMPORARY} == left
    assert kinds_of(collect_all(store)) == {TEMPORARY}
    assert store.read(artifact, "weights.bin") == b"wwww"


def test_a_file_that_only_looks_temporary_stays_if_it_is_named(store):
    name = f"weights.{'0' * 32}.tmp"
    artifact = store.get_or_build(STAGE, lambda draft: draft.write(name, b"w"))
    assert plan(store).garbage == ()
    assert store.read(artifact, name) == b"w"


def test_a_manifest_that_was_set_aside_is_deleted_with_the_files_that_only_it_names(store):
    damaged = build_weights(store)
    document = store.fs.cat_file(f"{store.root}/{STAGE.key}/manifest.json")
    overwrite(store.fs, f"{store.root}/{STAGE.key}/manifest.json.damaged-{'a' * 32}", document)
    store.fs.rm_file(f"{store.root}/{STAGE.key}/manifest.json")
    artifact = build_weights(store, content=b"anew")
    collection = plan(store)
    assert {each.path for each in collection.garbage if each.kind == SET_ASIDE} == {
        f"{STAGE.key}/manifest.json.damaged-{'a' * 32}",
        damaged.files["weights.bin"].path,
    }
    collect_all(store)
    assert store.read(artifact, "weights.bin") == b"anew"
    assert plan(store).garbage == ()


@pytest.mark.usefixtures("no_grace_period")
def test_a_stale_sign_of_life_is_deleted(store):
    path = f"running/{'a' * 32}.json"
    overwrite(store.fs, f"{store.root}/{path}", b"{}")
    assert plan(store, later=300.0).garbage == ()
    [garbage] = collect_all(store).garbage
    assert (garbage.kind, garbage.path) == (STALE, path)


@pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
def test_a_folder_with_a_damaged_document_stays_and_is_named(store, name):
    if name == "manifest.json":
        build_weights(store)
    else:
        die_in_attempt(store, resume_points=1)
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


def test_files_that_are_not_ours_are_named_and_stay(store):
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


def test_a_plan_changes_nothing(store):
    die_in_attempt(store, resume_points=1)
    build_weights(store, OTHER)
    before = {path: store.fs.info(path) for path in store.fs.find(store.root)}
    plan(store)
    plan(store, keys_to_keep=lambda artifacts: set())
    assert {path: store.fs.info(path) for path in store.fs.find(store.root)} == before


def test_folders_that_become_empty_are_removed_on_a_local_disk(tmp_path):
    store = ArtifactStore(str(tmp_path))
    die_in_attempt(store)
    kept = build_weights(store, OTHER)
    collect_all(store)
    folders = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_dir()}
    assert folders == {"branch", OTHER.key, kept.files["weights.bin"].path.rpartition("/")[0]}


@pytest.mark.parametrize("below", ["/models/run", ""], ids=["prefix", "whole bucket"])
def test_open_uploads_are_aborted_except_those_of_other_programs(s3_bucket, below):
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
    assert plan_collection(store).garbage == ()  # too new to be deleted
    [upload] = plan(store).garbage
    assert (upload.kind, upload.path) == (UPLOADS, ours.removeprefix(prefix))
    collect_all(store)
    left = [row["Key"] for row in store.fs.call_s3("list_multipart_uploads", Bucket=bucket)["Uploads"]]
    assert sorted(left) == sorted(others)
