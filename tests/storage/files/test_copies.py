"""A resumed artifact can be brought into one folder, without its bytes coming to this machine."""

import pytest

from layerwise.storage.files.copies import copy_within
from layerwise.storage.stage import Stage

STAGE = Stage("export", 1)


def dies(draft):
    draft.write("weights/layer-0.bin", bytes(9 << 20))
    draft.save_progress(1, lambda state: None)
    raise RuntimeError("the machine is lost")


def finishes(draft):
    draft.write("config.json", b"{}")
    draft.gather()


def test_files_of_all_attempts_lie_in_one_folder(store):
    with pytest.raises(RuntimeError, match="the machine is lost"):
        store.get_or_build(STAGE, dies)
    artifact = store.get_or_build(STAGE, finishes)
    assert store.read(artifact, "weights/layer-0.bin") == bytes(9 << 20)
    folder = store.location(artifact)
    names = ["config.json", "weights/layer-0.bin"]
    assert [store.location(artifact, name) for name in names] == [f"{folder}/{name}" for name in names]


def test_the_copy_stays_when_the_first_attempt_is_collected(store):
    with pytest.raises(RuntimeError, match="the machine is lost"):
        store.get_or_build(STAGE, dies)
    (first,) = [path for path in store.fs.find(store.root) if path.endswith("layer-0.bin")]
    artifact = store.get_or_build(STAGE, finishes)
    store.fs.rm_file(first)
    assert store.read(artifact, "weights/layer-0.bin") == bytes(9 << 20)


def test_a_file_that_is_not_there_cannot_be_copied(store):
    with pytest.raises(FileNotFoundError):
        copy_within(store.fs, f"{store.root}/nothing", f"{store.root}/something")
