"""Damaged artifacts are identified by key, set aside and rebuilt."""

import pickle

import pytest

from layerwise.storage.artifact import Damaged
from layerwise.storage.stage import Stage
from layerwise.storage.upkeep.set_aside import set_aside

STAGE = Stage("capture", 1)


@pytest.fixture
def artifact(store):
    return build(store)


def build(store):
    return store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", b"weights"))


def flip(store, artifact):
    store.fs.pipe_file(f"{store.root}/{artifact.files['weights.bin'].path}", b"weightz")


def damage_of(store, artifact):
    with pytest.raises(Damaged) as caught:
        store.read(artifact, "weights.bin")
    return caught.value


def test_the_error_has_key_and_token_of_the_artifact(store, artifact):
    flip(store, artifact)
    damaged = damage_of(store, artifact)
    assert (damaged.key, damaged.token) == (artifact.key, artifact.token)
    assert artifact.key in str(damaged)
    assert "weights.bin" in str(damaged)
    copy = pickle.loads(pickle.dumps(damaged))  # as between processes
    assert (str(copy), copy.key, copy.token) == (str(damaged), damaged.key, damaged.token)


def test_an_artifact_that_was_set_aside_is_rebuilt_and_its_manifest_is_kept(store, artifact):
    flip(store, artifact)
    damaged = damage_of(store, artifact)
    manifest = f"{store.root}/{artifact.key}/manifest.json"
    content = store.fs.cat_file(manifest)
    assert set_aside(store, damaged)
    assert store.find(STAGE) is None
    (aside,) = [path for path in store.fs.find(store.root) if "manifest.json.damaged-" in path]
    assert store.fs.cat_file(aside) == content
    rebuilt = build(store)
    assert store.read(rebuilt, "weights.bin") == b"weights"
    assert rebuilt.content == artifact.content


def test_an_artifact_that_another_process_has_rebuilt_stays(store, artifact):
    flip(store, artifact)
    damaged = damage_of(store, artifact)
    assert set_aside(store, damaged)
    rebuilt = build(store)
    assert not set_aside(store, damaged)
    assert store.find(STAGE) == rebuilt


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 1}'])
def test_a_damaged_manifest_is_set_aside(store, artifact, content):
    store.fs.pipe_file(f"{store.root}/{artifact.key}/manifest.json", content)
    with pytest.raises(Damaged, match=r"manifest\.json") as caught:
        store.find(STAGE)
    assert set_aside(store, caught.value)
    assert build(store).content == artifact.content


def test_the_manifest_of_another_artifact_is_set_aside(store, artifact):
    other = store.get_or_build(Stage("capture", 2), lambda draft: draft.write("weights.bin", b"others"))
    path = f"{store.root}/{artifact.key}/manifest.json"
    store.fs.pipe_file(path, store.fs.cat_file(f"{store.root}/{other.key}/manifest.json"))
    with pytest.raises(Damaged, match=f"it belongs to {other.key}") as caught:
        store.find(STAGE)
    assert caught.value.key == artifact.key
    assert set_aside(store, caught.value)
    assert store.find(STAGE) is None
    assert store.find(Stage("capture", 2)) == other


@pytest.mark.parametrize(
    "key", ["../secret", "capture/../../etc", "/etc/passwd", "capture/manifest.json", ""]
)
def test_an_invalid_key_is_refused(store, artifact, key):
    with pytest.raises(KeyError):
        store.get(key)
