"""Drafts that are gathered: the files of several attempts end up in one folder."""

import pytest

from layerwise.storage.stage import Stage

STAGE = Stage("export", 1)


def dies(draft):
    draft.write("weights/layer-0.bin", bytes(9 << 20))
    draft.save_resume_point(1, lambda state: None)
    raise RuntimeError("the machine is lost")


def finishes(draft):
    draft.write("config.json", b"{}")
    draft.gather()


def test_gathering_puts_the_files_of_all_attempts_into_one_folder(store):
    with pytest.raises(RuntimeError, match="the machine is lost"):
        store.get_or_build(STAGE, dies)
    artifact = store.get_or_build(STAGE, finishes)
    assert store.read(artifact, "weights/layer-0.bin") == bytes(9 << 20)
    folder = store.location(artifact)
    names = ["config.json", "weights/layer-0.bin"]
    assert [store.location(artifact, name) for name in names] == [f"{folder}/{name}" for name in names]


def test_a_gathered_file_does_not_depend_on_the_first_attempt(store):
    with pytest.raises(RuntimeError, match="the machine is lost"):
        store.get_or_build(STAGE, dies)
    (first,) = [path for path in store.fs.find(store.root) if path.endswith("layer-0.bin")]
    artifact = store.get_or_build(STAGE, finishes)
    store.fs.rm_file(first)
    assert store.read(artifact, "weights/layer-0.bin") == bytes(9 << 20)
