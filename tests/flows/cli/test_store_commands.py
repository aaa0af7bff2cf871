"""`layerwise gc` and `layerwise verify`: their output, the files that they delete and those that they keep."""

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from layerwise.flows.cli.show import show_key
from layerwise.flows.cli.store_commands import collect_garbage, verify_store
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import StoreInUse
from layerwise.tasks.results.garbage import keys_of_results
from tests.leftovers import files_in, make_old

STAGE = Stage("capture", 1)


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    """A store with an artifact, an abandoned attempt of 2000 bytes, and a file of another program; all old."""
    store = ArtifactStore(str(tmp_path / "store"))
    store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", b"wwww"))
    overwrite(store.fs, f"{store.root}/{STAGE.key}/{uuid.uuid4().hex}/weights.bin", bytes(2000))
    overwrite(store.fs, f"{store.root}/notes [red].txt", b"precious")
    make_old(store.root)
    return store


@pytest.fixture
def finished_copy(finished, tmp_path) -> ArtifactStore:
    """A copy of the store of a finished search, with old files only."""
    shutil.copytree(finished[1].store, tmp_path / "copy")
    make_old(tmp_path / "copy")
    return ArtifactStore(str(tmp_path / "copy"))


def test_without_apply_the_garbage_is_shown_and_nothing_changes(store, capsys):
    before = files_in(store.root)
    assert collect_garbage(store.url, apply=False, results_only=False) == 0
    out = capsys.readouterr().out
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "what count size",
        "abandoned attempts 1 2 kB",
        "all 1 2 kB",
        "not part of the store, kept: notes [red].txt",
        "Nothing was deleted. Add --apply to delete these files.",
    ]
    assert files_in(store.root) == before


def test_apply_deletes_the_garbage_and_nothing_else(store, capsys):
    assert collect_garbage(store.url, apply=True, results_only=False) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 deleted, 2 kB"
    assert collect_garbage(store.url, apply=True, results_only=False) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "There is nothing to delete."
    assert store.read(store.get(STAGE.key), "weights.bin") == b"wwww"
    assert (Path(store.root) / "notes [red].txt").read_bytes() == b"precious"


def test_the_exit_code_says_that_a_file_could_not_be_deleted(store, capsys, monkeypatch):
    def remove(self, path):
        if path.endswith("weights.bin"):
            raise PermissionError("not yours")
        os.remove(path)

    monkeypatch.setattr(type(store.fs), "rm_file", remove)
    assert collect_garbage(store.url, apply=True, results_only=False) == 1
    out = capsys.readouterr().out
    assert "weights.bin: not yours" in out
    assert out.splitlines()[-1] == "0 deleted, 0 B; 1 could not be deleted"


def test_a_store_of_results_only_still_shows_its_search(finished, finished_copy, capsys):
    result, _ = finished
    show_key(finished_copy.url, None)
    shown = capsys.readouterr().out
    assert collect_garbage(finished_copy.url, apply=True, results_only=True) == 0
    capsys.readouterr()
    left = {artifact.key: artifact for artifact in finished_copy.artifacts()}
    roles = ("select", "export", "evaluate")
    # Other tests add some.
    searches = [artifact for key, artifact in left.items() if key.startswith("search/")]
    kept = {
        search.recipe["inputs"][role]
        for search in searches
        for role in roles
        if role in search.recipe["inputs"]
    }
    assert {key for key in left if not key.startswith(("search/", "report/"))} == kept
    page = result.report.removeprefix(finished[1].store)
    assert (Path(finished_copy.root) / page.lstrip("/")).read_text().startswith("<!doctype html>")
    assert {result.stages[role].key for role in roles} <= kept
    show_key(finished_copy.url, None)
    assert capsys.readouterr().out == shown
    assert verify_store(finished_copy.url) == 0
    assert result.pruned.rpartition("/store/")[2] in str(files_in(finished_copy.root).keys())


def test_the_artifacts_of_results_are_those_in_the_recipes_of_searches(finished_copy, finished):
    result, _ = finished
    keys = keys_of_results(list(finished_copy.artifacts()))
    assert result.stages["export"].key in keys
    assert result.stages["capture"].key not in keys
    assert keys_of_results([result.stages["capture"]]) == set()


def test_results_only_is_refused_while_a_search_runs(store):
    before = files_in(store.root)
    refused = pytest.raises(StoreInUse, match=f"'search demo at 0.5', process {os.getpid()} on")
    with announced(store, "search demo at 0.5"), refused:
        collect_garbage(store.url, apply=True, results_only=True)
    assert files_in(store.root) == before


def test_a_whole_store_is_verified(store, capsys):
    assert verify_store(store.url) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("1 artifacts and 0 resume points with 1 files, 4 B, read in ")
    assert line.endswith(" s: nothing is damaged")


def test_each_damaged_file_gets_a_line_and_the_exit_code_is_1(store, capsys):
    path = store.location(store.get(STAGE.key), "weights.bin")
    Path(path).write_bytes(b"wwwv")
    assert verify_store(store.url) == 1
    finding, closing = capsys.readouterr().out.splitlines()
    assert finding.startswith(f"damaged: {STAGE.key} weights.bin: {path} has digest")
    assert "1 files are damaged; a search rebuilds those that it reads" in closing


def test_a_damaged_artifact_can_be_set_aside(store, capsys):
    path = store.location(store.get(STAGE.key), "weights.bin")
    Path(path).write_bytes(b"wwwv")
    assert verify_store(store.url, put_aside=True) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 artifacts were set aside"
    assert store.find(STAGE) is None
    assert verify_store(store.url) == 0


@pytest.mark.parametrize("arguments", [["gc"], ["verify"]])
def test_a_path_without_a_store_is_refused_and_not_created(tmp_path, pytestconfig, arguments):
    missing = str(tmp_path / "missing")
    done = subprocess.run(
        [sys.executable, "-m", "layerwise", *arguments, missing],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"layerwise: {missing} is not a store: nothing is there. Check the path or URL.\n"
    assert not Path(missing).exists()


def test_the_commands_do_what_their_options_say(store, pytestconfig):
    def run(*arguments):
        command = [sys.executable, "-m", "layerwise", *arguments]
        return subprocess.run(
            command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True
        ).stdout

    before = files_in(store.root)
    assert "Nothing was deleted. Add --apply" in run("gc", store.url)
    assert files_in(store.root) == before
    assert "1 deleted" in run("gc", store.url, "--apply")
    assert "nothing is damaged" in run("verify", store.url)
