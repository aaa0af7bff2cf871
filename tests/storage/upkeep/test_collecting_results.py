"""Garbage collection of artifacts: only those that are kept or may be needed stay."""

import os

import pytest

from layerwise.storage.files.publishing import overwrite
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import ARTIFACTS, StoreInUse, collect, plan_collection
from tests.leftovers import (
    OTHER,
    STAGE,
    build_weights,
    die_in_attempt,
    paths_in,
    plan,
)


def keep(*stages):
    return lambda artifacts: {stage.key for stage in stages}


def test_all_artifacts_except_those_to_keep_are_deleted_on_request(store):
    build_weights(store)
    kept = build_weights(store, OTHER)
    die_in_attempt(store, Stage("export", 1), resume_points=1)
    seen = []

    def keys_to_keep(artifacts):
        seen.extend(sorted(artifact.key for artifact in artifacts))
        return {OTHER.key}

    collection = plan(store, keys_to_keep=keys_to_keep)
    assert seen == sorted([STAGE.key, OTHER.key])
    assert {each.key for each in collection.garbage if each.kind == ARTIFACTS} == {
        STAGE.key,
        Stage("export", 1).key,
    }
    assert collect(store, collection).failures == ()
    assert paths_in(store) == {f"{OTHER.key}/manifest.json", kept.files["weights.bin"].path}
    assert store.read(kept, "weights.bin") == b"wwww"


def test_new_artifacts_stay_even_if_only_results_are_kept(store):
    build_weights(store)
    assert plan_collection(store, keep()).garbage == ()


def test_artifacts_stay_while_a_process_works_in_the_store(store):
    build_weights(store)
    old = plan(store, keys_to_keep=keep())
    assert old.garbage
    before = paths_in(store)
    with announced(store, "search demo"):
        with pytest.raises(StoreInUse, match=rf"'search demo', process {os.getpid()} on .*, since \d{{4}}-"):
            plan(store, later=0.0, keys_to_keep=keep())
        with pytest.raises(StoreInUse, match="--results-only"):
            collect(store, old)
        assert before < paths_in(store)
    assert paths_in(store) == before


def test_artifacts_stay_if_another_one_is_damaged(store):
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
