"""The store's contract, the same on local disk, in memory and on S3."""

import logging

import pytest
from fsspec.core import url_to_fs

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore

STAGE = Stage("prune-layer", version=1, settings={"layer": 3, "sparsity": 0.5}, inputs={"dense": "import/0"})


def write_weights(draft):
    draft.write("weights.bin", b"wwww")


def never_called(draft):
    raise AssertionError("a committed stage must not be built again")


def stored_path(store, artifact, name="weights.bin"):
    return f"{store.root}/{artifact.files[name].path}"


def manifest_path(store, stage=STAGE):
    return f"{store.root}/{stage.key}/manifest.json"


def files_below(store):
    return store.fs.find(store.root)


def test_a_committed_stage_is_not_built_again(store):
    first = store.get_or_build(STAGE, write_weights)
    assert store.get_or_build(STAGE, never_called) == first
    assert store.read(first, "weights.bin") == b"wwww"


def test_another_process_with_the_same_url_finds_the_artifact(store, fresh_store_url):
    first = store.get_or_build(STAGE, write_weights)
    assert ArtifactStore(fresh_store_url).get(STAGE.key) == first


def test_a_stage_that_was_not_committed_is_not_found(store):
    assert store.find(STAGE) is None
    with pytest.raises(KeyError, match=rf"has no artifact '{STAGE.key}'. Build it first"):
        store.get(STAGE.key)


def test_the_manifest_records_recipe_facts_and_making(store):
    def build(draft):
        draft.write("report/losses.json", [b"[1,", b" 2]"])
        draft.facts["loss"] = 0.1
        draft.made["by"] = "hand"

    artifact = store.get_or_build(STAGE, build)
    assert artifact.facts == {"loss": 0.1}
    assert artifact.recipe == {
        "name": "prune-layer",
        "version": 1,
        "settings": {"layer": 3, "sparsity": 0.5},
        "inputs": {"dense": "import/0"},
    }
    assert artifact.made.keys() == {"at", "clock", "seconds", "peak_memory", "by"}
    assert artifact.made["by"] == "hand"
    assert 1 << 20 < artifact.made["peak_memory"] < 1 << 40  # bytes of a process with torch in it
    assert artifact.size == 6
    assert store.read(artifact, "report/losses.json") == b"[1, 2]"


def test_content_depends_on_the_bytes_and_not_on_the_key(store):
    first = store.get_or_build(STAGE, write_weights)
    same = store.get_or_build(Stage("copy", 1), write_weights)
    other = store.get_or_build(Stage("other", 1), lambda draft: draft.write("weights.bin", b"vvvv"))
    assert first.content == same.content != other.content


def test_a_build_that_crashes_leaves_no_artifact(store):
    def crash(draft):
        draft.write("weights.bin", b"half")
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        store.get_or_build(STAGE, crash)
    assert store.find(STAGE) is None
    assert store.get_or_build(STAGE, write_weights).files.keys() == {"weights.bin"}


@pytest.mark.parametrize("size", [3, 40 << 20], ids=["small", "several parts of an upload"])
def test_an_exception_during_a_write_publishes_nothing_of_the_file(store, size):
    def pieces():
        for _ in range(0, size, 1 << 20):
            yield bytes(min(size, 1 << 20))
        raise RuntimeError("the download broke")

    with pytest.raises(RuntimeError, match="the download broke"):
        store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", pieces()))
    assert [path for path in files_below(store) if path.endswith("weights.bin")] == []


def test_a_file_of_many_parts_is_written_completely(store):
    piece = bytes(range(256)) * (5 << 12)  # 5 MB, so that parts of 16 MB end inside a piece
    artifact = store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", [piece] * 7))
    assert artifact.size == 35 << 20
    assert store.read(artifact, "weights.bin") == piece * 7


def test_an_empty_file_can_be_written_and_read(store):
    artifact = store.get_or_build(STAGE, lambda draft: draft.write("empty", b""))
    assert store.read(artifact, "empty") == b""


def test_two_builders_agree_on_the_first_one_to_commit(store):
    def overtaken(draft):
        store.get_or_build(STAGE, lambda rival: rival.write("weights.bin", b"rival"))
        draft.write("weights.bin", b"late")

    artifact = store.get_or_build(STAGE, overtaken)
    assert artifact == store.find(STAGE)
    assert store.read(artifact, "weights.bin") == b"rival"


def test_an_unknown_file_is_reported_with_the_known_ones(store):
    artifact = store.get_or_build(STAGE, write_weights)
    with pytest.raises(KeyError, match=r"no file 'mask.bin'; it has \['weights.bin'\]"):
        store.read(artifact, "mask.bin")


@pytest.mark.parametrize(
    ("damage", "finding"),
    [
        (b"www", "has 3 bytes, but 4 were written"),
        (b"wwwx", "has digest .* but .* was recorded"),
        (b"wwwww", "has 5 bytes, but 4 were written"),
        (None, "is missing"),
    ],
    ids=["truncated", "flipped byte", "longer", "missing"],
)
def test_the_error_about_a_damaged_file_names_it(store, damage, finding):
    artifact = store.get_or_build(STAGE, write_weights)
    path = stored_path(store, artifact)
    store.fs.rm_file(path) if damage is None else store.fs.pipe_file(path, damage)
    with pytest.raises(Corrupt, match=f"(?s)'weights.bin'.*{finding}"):
        store.read(artifact, "weights.bin")


def test_two_swapped_files_are_detected(store):
    def build(draft):
        draft.write("first.bin", b"1111")
        draft.write("second.bin", b"2222")

    artifact = store.get_or_build(STAGE, build)
    store.fs.pipe_file(stored_path(store, artifact, "first.bin"), b"2222")
    with pytest.raises(Corrupt, match=r"first\.bin"):
        store.read(artifact, "first.bin")


@pytest.mark.parametrize(
    ("old", "new"),
    [("weights.bin", "weightz.bin"), ('"size": 4', '"size": 5'), ("}", ""), ('"format": 1', '"format": 2')],
)
def test_a_changed_manifest_is_refused(store, old, new):
    store.get_or_build(STAGE, write_weights)
    manifest = store.fs.cat_file(manifest_path(store)).decode()
    store.fs.pipe_file(manifest_path(store), manifest.replace(old, new).encode())
    with pytest.raises(Corrupt, match=r"manifest\.json is not readable"):
        store.find(STAGE)


def test_a_manifest_copied_from_another_stage_is_refused(store):
    store.get_or_build(STAGE, write_weights)
    other = Stage("other", 1)
    manifest = store.fs.cat_file(manifest_path(store))
    store.fs.makedirs(f"{store.root}/{other.key}", exist_ok=True)
    store.fs.pipe_file(manifest_path(store, other), manifest)
    with pytest.raises(Corrupt, match=f"it belongs to {STAGE.key}"):
        store.find(other)


def test_names_that_leave_the_folder_are_refused(store):
    for name in ["../weights.bin", "/etc/passwd", "a//b", "a/./b", "", "a\\b", "a\nb"]:
        with pytest.raises(ValueError, match="cannot be the name of a file in an artifact"):
            store.get_or_build(STAGE, lambda draft, name=name: draft.write(name, b""))


def test_a_file_is_written_only_once(store):
    def twice(draft):
        draft.write("weights.bin", b"1")
        draft.write("weights.bin", b"2")

    with pytest.raises(ValueError, match=r"'weights\.bin' was already written"):
        store.get_or_build(STAGE, twice)


def test_facts_that_are_not_plain_are_refused_before_the_commit(store):
    with pytest.raises(ValueError, match=r"\['facts'\]\['loss'\] is nan"):
        store.get_or_build(STAGE, lambda draft: draft.facts.update(loss=float("nan")))
    assert store.find(STAGE) is None


def test_listing_shows_committed_artifacts_only_and_skips_damaged_ones(store, caplog):
    first = store.get_or_build(STAGE, write_weights)
    damaged = Stage("damaged", 1)
    store.get_or_build(damaged, write_weights)
    store.fs.pipe_file(manifest_path(store, damaged), b"{")
    with pytest.raises(ZeroDivisionError):
        store.get_or_build(Stage("unfinished", 1), lambda draft: (write_weights(draft), 1 / 0))
    with caplog.at_level(logging.WARNING):
        assert list(store.artifacts()) == [first]
    assert "damaged" in caplog.text


def test_an_empty_store_lists_nothing(store):
    assert list(store.artifacts()) == []


def test_other_programs_can_open_the_location_of_a_file(store):
    artifact = store.get_or_build(STAGE, write_weights)
    fs, path = url_to_fs(store.location(artifact, "weights.bin"))
    assert fs.cat_file(path) == b"wwww"
    assert store.location(artifact, "weights.bin") == f"{store.location(artifact)}/weights.bin"
