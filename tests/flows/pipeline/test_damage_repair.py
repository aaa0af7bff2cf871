"""Damage repair: a search rebuilds damaged artifacts and ends with the result of an undisturbed search."""

import logging
import shutil
import time
from pathlib import Path

import pytest

from layerwise.flows.pipeline.damage_repair import rebuild_damaged
from layerwise.storage.artifact import Damaged
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import collect, plan_collection


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished search's store, which a test may damage."""
    return Path(shutil.copytree(finished[1].store, tmp_path / "store"))


def content_of(result):
    return {role: artifact.content for role, artifact in result.stages.items()}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("role", "name", "damage"),
    [
        ("checkpoint", "checkpoint.json", flip),
        ("calibration", "manifest.json", Path.unlink),
        ("capture", "manifest.json", truncate),
        ("lane beta 0.1", "losses.parquet", flip),
        ("lane beta 0.25", "linears.parquet", Path.unlink),
        ("select", "selection.json", truncate),
        ("export", "manifest.json", flip),
        ("evaluate", "test.json", truncate),
    ],
)
def test_a_damaged_artifact_is_named_and_rebuilt(finished, run_search, copied, caplog, role, name, damage):
    result = finished[0]
    artifact = result.stages[role]
    path = copied / (f"{artifact.key}/{name}" if name == "manifest.json" else artifact.files[name].path)
    damage(path)
    with caplog.at_level(logging.WARNING):
        again = run_search(str(copied))
    assert again.built == (role,)
    assert content_of(again) == content_of(result)
    # Without a manifest the artifact does not exist.
    if not (name == "manifest.json" and damage is Path.unlink):
        (line,) = [
            record.getMessage()
            for record in caplog.records
            if record.name == "layerwise.flows.pipeline.damage_repair"
        ]
        assert str(path) in line
        assert "set aside and rebuilt" in line


def test_damaged_statistics_are_captured_again_for_a_new_beta(finished, run_search, copied, tmp_path):
    capture = finished[0].stages["capture"]
    flip(copied / capture.files["statistics/layer-00001.parquet"].path)
    result = run_search(str(copied), betas=[0.1, 0.2, 0.25])
    undamaged = run_search(str(tmp_path / "other"), betas=[0.1, 0.2, 0.25])
    assert {"capture", "lane beta 0.2"} <= set(result.built)
    assert content_of(result) == content_of(undamaged)


def test_an_artifact_that_is_damaged_again_after_its_rebuild_stops_the_run(tmp_path):
    store = ArtifactStore(str(tmp_path))
    calls = []

    def run():
        calls.append("again")
        raise Damaged("its file 'x' is damaged", "capture/0123")

    with pytest.raises(Damaged, match="its file 'x' is damaged"):
        rebuild_damaged(store, run)
    assert len(calls) == 2


def test_an_artifact_deleted_during_the_run_is_rebuilt_with_a_warning(tmp_path, caplog):
    store, stage = ArtifactStore(str(tmp_path / "store")), Stage("capture", 1)
    found = []

    def run():
        artifact = store.get_or_build(stage, lambda draft: draft.write("weights.bin", b"w"))
        found.append(artifact)
        if len(found) == 1:
            collect(store, plan_collection(store, lambda artifacts: set(), now=time.time() + 86400))
        return store.read(artifact, "weights.bin")

    with caplog.at_level(logging.WARNING):
        assert rebuild_damaged(store, run) == b"w"
    assert len(found) == 2
    (record,) = caplog.records
    assert f"{stage.key} was deleted from the store during this run." in record.getMessage()
    assert record.getMessage().endswith("It is rebuilt.")
