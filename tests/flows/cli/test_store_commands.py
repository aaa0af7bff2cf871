"""House-keeping from the command line: what it says, what it deletes, what it leaves to `show`."""

import os
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from layerwise.flows.cli.show import show_key
from layerwise.flows.cli.store_commands import collect_garbage, keys_of_results, verify_store
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import StoreInUse
from tests.leftovers import files_in, make_old

STAGE = Stage("capture", 1)


@pytest.fixture
def store(tmp_path) -> ArtifactStore:
    """An artifact, an attempt of 2000 bytes that was abandoned, and a file of somebody else; all of them old."""
    store = ArtifactStore(str(tmp_path / "store"))
    store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", b"wwww"))
    overwrite(store.fs, f"{store.root}/{STAGE.key}/{uuid.uuid4().hex}/weights.bin", bytes(2000))
    overwrite(store.fs, f"{store.root}/notes [red].txt", b"precious")
    make_old(store.root)
    return store


@pytest.fixture
def finished_copy(finished, tmp_path) -> ArtifactStore:
    """The store of a finished search, all of it old."""
    shutil.copytree(finished[1].store, tmp_path / "copy")
    make_old(tmp_path / "copy")
    return ArtifactStore(str(tmp_path / "copy"))


def test_a_dry_run_shows_what_would_go_and_changes_nothing(store, capsys):
    before = files_in(store.root)
    assert collect_garbage(store.url, apply=False, results_only=False) == 0
    out = capsys.readouterr().out
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "what count size",
        "abandoned attempts 1 2 kB",
        "all 1 2 kB",
        "not ours: left alone: notes [red].txt",
        "nothing was deleted; add --apply",
    ]
    assert files_in(store.root) == before


def test_what_was_shown_goes_on_request(store, capsys):
    assert collect_garbage(store.url, apply=True, results_only=False) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "1 deleted, 2 kB"
    assert collect_garbage(store.url, apply=True, results_only=False) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "nothing to delete"
    assert store.read(store.get(STAGE.key), "weights.bin") == b"wwww"
    assert (Path(store.root) / "notes [red].txt").read_bytes() == b"precious"


def test_what_cannot_be_deleted_is_told_by_the_exit_code(store, capsys, monkeypatch):
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
    searches = [
        artifact for key, artifact in left.items() if key.startswith("search/")
    ]  # other tests add some
    kept = {search.recipe["inputs"][role] for search in searches for role in roles}
    assert {key for key in left if not key.startswith(("search/", "report/"))} == kept
    page = result.report.removeprefix(finished[1].store)
    assert (Path(finished_copy.root) / page.lstrip("/")).read_text().startswith("<!doctype html>")
    assert {result.stages[role].key for role in roles} <= kept
    show_key(finished_copy.url, None)
    assert capsys.readouterr().out == shown
    assert verify_store(finished_copy.url) == 0
    assert result.pruned.rpartition("/store/")[2] in str(files_in(finished_copy.root).keys())


def test_results_are_found_by_the_recipe_of_searches(finished_copy, finished):
    result, _ = finished
    keys = keys_of_results(list(finished_copy.artifacts()))
    assert result.stages["export"].key in keys
    assert result.stages["capture"].key not in keys
    assert keys_of_results([result.stages["capture"]]) == set()


def test_artifacts_stay_while_a_search_runs(store):
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


def test_damage_is_told_in_a_line_each_and_by_the_exit_code(store, capsys):
    path = store.location(store.get(STAGE.key), "weights.bin")
    Path(path).write_bytes(b"wwwv")
    assert verify_store(store.url) == 1
    finding, closing = capsys.readouterr().out.splitlines()
    assert finding.startswith(f"damaged: {STAGE.key} weights.bin: {path} has digest")
    assert "1 files are damaged; a search builds anew what it reads of them" in closing


def test_what_is_damaged_can_be_set_aside(store, capsys):
    path = store.location(store.get(STAGE.key), "weights.bin")
    Path(path).write_bytes(b"wwwv")
    assert verify_store(store.url, put_aside=True) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "1 artifacts were set aside"
    assert store.find(STAGE) is None
    assert verify_store(store.url) == 0


@pytest.mark.parametrize("arguments", [["gc"], ["verify"]])
def test_a_wrong_path_is_told_and_not_made(tmp_path, pytestconfig, arguments):
    """By the commands themselves, which must not import what they do not need."""
    missing = str(tmp_path / "missing")
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['prefect', 'transformers'])); "
        "from layerwise.flows.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments, missing],
        cwd=pytestconfig.rootpath,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr == f"layerwise: {missing} is not a store: nothing is there. Check the path or URL.\n"
    assert not Path(missing).exists()


def test_the_commands_do_what_their_options_say(store, pytestconfig):
    def run(*arguments):
        command = [sys.executable, "-m", "layerwise.flows.cli.main", *arguments]
        return subprocess.run(
            command, cwd=pytestconfig.rootpath, capture_output=True, text=True, check=True
        ).stdout

    before = files_in(store.root)
    assert "nothing was deleted; add --apply" in run("gc", store.url)
    assert files_in(store.root) == before
    assert "1 deleted" in run("gc", store.url, "--apply")
    assert "nothing is damaged" in run("verify", store.url)
