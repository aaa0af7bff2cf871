"""Pickles are never opened, neither next to the weights nor in the store."""

import os
import pickle
import shutil
from pathlib import Path

import pytest

from layerwise.flows.runtime import Runtime
from layerwise.flows.search import search
from layerwise.storage.artifact import Damaged
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensors


class Bomb:
    """Creates a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def mark(tmp_path) -> Path:
    """Folder that the bomb creates."""
    return tmp_path / "it went off"


@pytest.fixture
def bomb(mark) -> bytes:
    content = pickle.dumps(Bomb(mark))
    pickle.loads(content)
    assert mark.exists(), "the bomb must work"
    mark.rmdir()
    return content


def test_pickles_next_to_the_weights_are_neither_opened_nor_copied(
    workshop, prefect_backend, tmp_path, bomb, mark
):
    model = shutil.copytree(workshop.model, tmp_path / "model")
    planted = ["pytorch_model.bin", "vocab.pkl", "tokenizer.pt", "tokenizer.joblib", "training_args.bin"]
    for name in planted:
        (model / name).write_bytes(bomb)
    runtime = Runtime(store=str(tmp_path / "store"))
    result = search(workshop.settings(model=str(model)), runtime)
    assert not mark.exists()
    assert not set(planted) & {path.name for path in Path(runtime.store).rglob("*")}
    assert result.test.best > 0


def test_a_checkpoint_of_pickles_is_refused_without_opening_it(
    workshop, prefect_backend, tmp_path, bomb, mark
):
    model = shutil.copytree(workshop.model, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickle files .* are not read\. Convert them"):
        search(workshop.settings(model=str(model)), Runtime(store=str(tmp_path / "store")))
    assert not mark.exists()


def test_pickles_in_place_of_files_of_the_store_are_damage(finished, tmp_path, bomb, mark):
    result = finished[0]
    store = ArtifactStore(str(shutil.copytree(finished[1].store, tmp_path / "store")))
    calibration, capture, lane = (result.stages[role] for role in ("calibration", "capture", "lane beta 0.1"))
    Path(store.location(calibration, "tokens.safetensors")).write_bytes(bomb)
    Path(store.location(lane, "losses.parquet")).write_bytes(bomb)
    Path(store.root, capture.key, "manifest.json").write_bytes(bomb)
    with pytest.raises(Corrupt, match=r"tokens\.safetensors"):
        read_tensors(store, calibration, "tokens.safetensors")
    with pytest.raises(Damaged, match=r"losses\.parquet"):
        store.read(lane, "losses.parquet")
    with pytest.raises(Damaged, match=r"manifest\.json"):
        store.get(capture.key)
    assert not mark.exists()


@pytest.mark.parametrize("role", ["calibration", "lane beta 0.25"])
def test_a_search_replaces_a_planted_pickle_by_the_right_file(
    finished, run_search, tmp_path, bomb, mark, role
):
    result = finished[0]
    store = ArtifactStore(str(shutil.copytree(finished[1].store, tmp_path / "store")))
    for name in result.stages[role].files:
        Path(store.location(result.stages[role], name)).write_bytes(bomb)
    if role == "calibration":  # the windows are read again only for a capture
        Path(store.root, result.stages["capture"].key, "manifest.json").write_bytes(bomb)
    again = run_search(store.url)
    assert again.stages[role].content == result.stages[role].content
    assert again.selection == result.selection
    assert not mark.exists()
