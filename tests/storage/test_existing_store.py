"""Opening a store that must exist: wrong paths and URLs are reported, and nothing is created."""

import os
import uuid

import pytest

from layerwise.flows.cli.status import show_status
from layerwise.flows.cli.store_commands import collect_garbage, verify_store
from layerwise.storage.existing_store import existing_store
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from tests.faults import error
from tests.leftovers import OTHER, STAGE, build_weights, die_in_attempt, paths_in


def test_a_missing_folder_is_reported_and_not_created(store, fresh_store_url):
    with pytest.raises(FileNotFoundError, match="is not a store: nothing is there. Check the path or URL."):
        existing_store(fresh_store_url)
    assert not store.fs.exists(store.root)


def test_a_sign_of_life_makes_a_store(store, fresh_store_url):
    with announced(store, "a search"):
        assert existing_store(fresh_store_url).root == store.root


@pytest.mark.parametrize("fill", [build_weights, die_in_attempt])
def test_an_artifact_or_an_attempt_makes_a_store(store, fresh_store_url, fill):
    overwrite(store.fs, f"{store.root}/notes.txt", b"somebody else's")
    fill(store)
    assert existing_store(fresh_store_url).root == store.root


def test_a_folder_with_other_files_is_refused_and_some_are_named(store, fresh_store_url):
    for name in ("config.json", "model/weights.safetensors", "running/log.json", "x/y/z", "zzz"):
        overwrite(store.fs, f"{store.root}/{name}", b"{}")
    before = paths_in(store)
    with pytest.raises(FileNotFoundError, match="'config.json', 'model', 'running' and 2 more, but nothing"):
        existing_store(fresh_store_url)
    assert paths_in(store) == before


def test_a_file_is_refused(store, fresh_store_url):
    overwrite(store.fs, store.root, b"{}")
    with pytest.raises(FileNotFoundError, match="it is a file"):
        existing_store(fresh_store_url)


def test_an_empty_folder_is_an_empty_store(tmp_path):
    assert list(existing_store(str(tmp_path)).artifacts()) == []
    assert os.listdir(tmp_path) == []


def test_a_missing_bucket_is_reported_and_not_created(s3_bucket):
    bucket = f"no-{uuid.uuid4().hex}"
    for url in (f"s3://{bucket}", f"s3://{bucket}/runs"):
        with pytest.raises(FileNotFoundError, match=r"no such bucket|nothing is there"):
            existing_store(url)
    assert not ArtifactStore(f"s3://{s3_bucket}").fs.exists(bucket)


def test_a_store_in_a_read_only_bucket_can_be_read(fault_proxy, s3_bucket, capsys, caplog):
    store = ArtifactStore(f"s3://{s3_bucket}/{uuid.uuid4().hex}")
    build_weights(store)
    die_in_attempt(store, OTHER)
    before = paths_in(store)
    store = ArtifactStore(store.url)  # it has not checked yet that it can write
    fault_proxy.inject(error(403), lambda request: request.writes, times=float("inf"))
    show_status(store.url)
    assert collect_garbage(store.url, apply=False, results_only=False) == 0
    assert verify_store(store.url) == 0
    assert [artifact.key for artifact in existing_store(store.url).artifacts()] == [STAGE.key]
    with announced(store, "a search"), pytest.raises(PermissionError, match="was refused"):
        store.get_or_build(Stage("new", 1), lambda draft: pytest.fail("work that cannot be kept"))
    with pytest.raises(PermissionError, match="was refused"):
        collect_garbage(store.url, apply=True, results_only=False)
    assert "nothing to delete." in capsys.readouterr().out
    assert caplog.records == []
    fault_proxy.heal()
    assert paths_in(store) == before


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name, tmp_path, monkeypatch):
    ArtifactStore(str(tmp_path)).get_or_build(Stage("example", 1, {}), lambda draft: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="name of the store is empty"):
        existing_store(name)
    assert list(existing_store(".").artifacts())
