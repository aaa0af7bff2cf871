"""Artifacts: the time of their commit by the storage's clock, and manifests that are read from JSON."""

import json
import os
import shutil
import time
from datetime import UTC, datetime

import pytest
from fsspec.implementations.local import LocalFileSystem

from layerwise.storage.artifact import Artifact, StoredFile, files_from_json
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from tests.leftovers import build_weights

FIRST, SECOND = Stage("search", 1, {"beta": 0.1}), Stage("search", 1, {"beta": 0.2})
HOUR = 3600.0


class HourAhead(LocalFileSystem):
    """A storage whose clock is an hour ahead of the clock of this machine."""

    def info(self, path, **kwargs):
        row = super().info(path, **kwargs)
        return row | {"mtime": row["mtime"] + HOUR}


def manifest_of(store, stage):
    return f"{store.root}/{stage.key}/manifest.json"


def as_older_version(store, stage, at):
    """Rewrite the manifest as an older version did, which recorded the time ``at`` by the clock of its machine."""
    content = read_sealed(store.fs, manifest_of(store, stage))
    content["made"] = {"at": datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds"), "seconds": 1.0}
    overwrite(store.fs, manifest_of(store, stage), seal({k: content[k] for k in content if k != "token"}))


def newest_first(store):
    return [each.key for each in sorted(store.artifacts(), key=lambda each: each.committed, reverse=True)]


@pytest.mark.parametrize("write", [True, False])
def test_the_recorded_time_is_by_the_clock_of_the_storage(tmp_path, write):
    store = ArtifactStore(str(tmp_path))
    store.fs = HourAhead()
    artifact = store.get_or_build(FIRST, lambda draft: draft.write("weights.bin", b"w") if write else None)
    assert artifact.committed == pytest.approx(time.time() + HOUR, abs=60)


def test_listed_artifacts_have_the_date_of_their_manifest(store):
    build_weights(store, FIRST)
    [artifact] = store.artifacts("search/")
    # Some storages round to whole seconds.
    assert artifact.dated == pytest.approx(store.fs.modified(manifest_of(store, FIRST)).timestamp(), abs=1)
    assert artifact.committed == pytest.approx(artifact.dated, abs=5)
    assert list(store.artifacts("capture/")) == []


@pytest.mark.parametrize("ahead", [60.0, 400 * 24 * HOUR])
def test_a_machine_whose_clock_was_ahead_does_not_make_its_artifact_the_newest(store, ahead):
    build_weights(store, FIRST)
    as_older_version(store, FIRST, time.time() + ahead)
    time.sleep(1.1)  # some storages round to whole seconds
    build_weights(store, SECOND)
    assert newest_first(store) == [SECOND.key, FIRST.key]


def test_a_machine_whose_clock_was_behind_does_not_make_its_artifact_the_oldest(store):
    build_weights(store, FIRST)
    time.sleep(1.1)
    build_weights(store, SECOND)
    as_older_version(store, SECOND, time.time() - HOUR / 2)
    assert newest_first(store) == [SECOND.key, FIRST.key]


@pytest.mark.parametrize("by_older_version", [False, True])
def test_a_copy_without_times_keeps_the_order(tmp_path, by_older_version):
    store, now = ArtifactStore(str(tmp_path / "store")), time.time()
    build_weights(store, FIRST)
    # A recorded time is early by the delay between writing a file and reading its date, which a busy machine extends.
    time.sleep(1.1)
    build_weights(store, SECOND)
    if by_older_version:
        as_older_version(store, FIRST, now - 3 * HOUR)
        as_older_version(store, SECOND, now - 2 * HOUR)
    copy = ArtifactStore(str(shutil.copytree(store.root, tmp_path / "copy")))
    for stage, date in ((FIRST, now + 24 * HOUR + 9), (SECOND, now + 24 * HOUR)):  # in any order
        os.utime(manifest_of(copy, stage), (date, date))
    assert newest_first(copy) == [SECOND.key, FIRST.key]


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret", f"{FIRST.key}/../../../secret", "other/0/weights.bin", FIRST.key, 7, None],
)
def test_a_manifest_path_outside_the_artifact_is_refused(store, path):
    files = {"weights.bin": {"path": path, "size": 1, "digest": "0"}}
    manifest = seal({"key": FIRST.key, "recipe": {}, "files": files, "facts": {}, "made": {}})
    store.fs.makedirs(f"{store.root}/{FIRST.key}", exist_ok=True)
    store.fs.pipe_file(f"{store.root}/{FIRST.key}/manifest.json", manifest)
    with pytest.raises(Corrupt, match=r"manifest\.json is not the manifest of search"):
        store.find(FIRST)


def test_a_stored_file_is_read_from_its_json():
    file = StoredFile("a/b/c", 3, "d")
    assert files_from_json(json.loads(json.dumps({"c": file.to_json()})), "a") == {"c": file}


def test_an_artifact_without_files_has_size_zero():
    assert Artifact("a/b", {}).size == 0
