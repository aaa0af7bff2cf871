"""A manifest cannot make the store read files that are not the artifact's own."""

import json

import pytest

from layerwise.storage.artifact import Artifact, StoredFile, files_from_json
from layerwise.storage.files.corrupt import Corrupt
from layerwise.storage.formats.document import seal
from layerwise.storage.stage import Stage

STAGE = Stage("prune-layer", 1)


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "../secret", f"{STAGE.key}/../../../secret", "other/0/weights.bin", STAGE.key, 7, None],
)
def test_a_manifest_path_outside_the_artifact_is_refused(store, path):
    files = {"weights.bin": {"path": path, "size": 1, "digest": "0"}}
    manifest = seal({"key": STAGE.key, "recipe": {}, "files": files, "facts": {}, "made": {}})
    store.fs.makedirs(f"{store.root}/{STAGE.key}", exist_ok=True)
    store.fs.pipe_file(f"{store.root}/{STAGE.key}/manifest.json", manifest)
    with pytest.raises(Corrupt, match=r"manifest\.json is not the manifest of prune-layer"):
        store.find(STAGE)


def test_a_stored_file_survives_json():
    file = StoredFile("a/b/c", 3, "d")
    assert files_from_json(json.loads(json.dumps({"c": file.to_json()})), "a") == {"c": file}


def test_an_artifact_without_files_has_no_size():
    assert Artifact("a/b", {}).size == 0
