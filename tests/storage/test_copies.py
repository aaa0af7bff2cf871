"""A copy has all files in one folder, and only good ones."""

import pytest

from storage.copies import copy_files
from storage.files import Corrupt
from storage.stage import Stage


def build(draft):
    draft.write("config.json", b"{}")
    draft.write("weights/layer-0.bin", bytes(9 << 20))


def test_all_files_arrive_under_their_names(store, tmp_path):
    copy_files(store, store.get_or_build(Stage("export", 1), build), str(tmp_path / "model"))
    assert (tmp_path / "model/config.json").read_bytes() == b"{}"
    assert (tmp_path / "model/weights/layer-0.bin").read_bytes() == bytes(9 << 20)


def test_a_damaged_file_is_not_copied(store, tmp_path):
    artifact = store.get_or_build(Stage("export", 1), build)
    path = f"{store.root}/{artifact.files['weights/layer-0.bin'].path}"
    store.fs.pipe_file(path, b"1" + bytes((9 << 20) - 1))
    with pytest.raises(Corrupt, match=r"'weights/layer-0\.bin'"):
        copy_files(store, artifact, str(tmp_path / "model"))
    assert [file.name for file in (tmp_path / "model").rglob("*") if file.is_file()] == ["config.json"]
