"""Garbage collection as a flow on a real Prefect server: the deleted files, and the report in Prefect."""

import json
import os
import shutil
import uuid

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, LogFilter
from prefect.deployments.runner import EntrypointType
from prefect.exceptions import ParameterTypeError
from prefect.logging.handlers import APILogHandler

from layerwise.flows.gc import gc
from layerwise.storage.files.publishing import overwrite
from layerwise.storage.signs_of_life import announced
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from tests.leftovers import files_in, make_old

STAGE = Stage("capture", 1)


def run(**parameters):
    """Run the flow, and return its state, name, tables and log from Prefect."""
    state = gc(**parameters, return_state=True)
    flow_run = state.state_details.flow_run_id
    APILogHandler().flush()
    with get_client(sync_client=True) as client:
        name = client.read_flow_run(flow_run).name
        ours = client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id={"any_": [flow_run]}))
        log = [line.message for line in client.read_logs(LogFilter(flow_run_id={"any_": [flow_run]}))]
    tables = [artifact for artifact in ours if artifact.type == "table"]  # a failure is an artifact as well
    return state, name, tables, log


@pytest.fixture
def store(tmp_path, prefect_backend) -> ArtifactStore:
    """A store with an artifact, an abandoned attempt of two files, a temporary file and a foreign file; all of them old."""
    store = ArtifactStore(str(tmp_path / "store"))
    store.get_or_build(STAGE, lambda draft: draft.write("weights.bin", b"wwww"))
    attempt = f"{store.root}/{STAGE.key}/{uuid.uuid4().hex}"
    overwrite(store.fs, f"{attempt}/weights.bin", bytes(2000))
    overwrite(store.fs, f"{attempt}/losses.bin", bytes(48))
    overwrite(store.fs, f"{store.root}/{uuid.uuid4().hex}.clock", b"now")
    overwrite(store.fs, f"{store.root}/notes.txt", b"precious")
    make_old(store.root)
    return store


@pytest.fixture
def undeletable(store, monkeypatch):
    """Make the storage refuse to delete a file, and return its name."""

    def remove(self, path):
        if path.endswith("losses.bin"):
            raise PermissionError("not yours")
        os.remove(path)

    monkeypatch.setattr(type(store.fs), "rm_file", remove)
    return "losses.bin"


GARBAGE = [
    {"kind": "abandoned attempts", "count": 2, "bytes": 2048},
    {"kind": "temporary files", "count": 1, "bytes": 3},
    {"kind": "all", "count": 3, "bytes": 2051},
]
NOTHING = [{"kind": "all", "count": 0, "bytes": 0}]


def rows_of_table(artifacts):
    """Return the rows of the only table."""
    (artifact,) = artifacts
    assert artifact.key == "store-garbage"
    return json.loads(artifact.data)


def test_without_apply_the_run_reports_and_deletes_nothing(store):
    before = files_in(store.root)
    state, name, tables, log = run(store=store.url)
    assert state.is_completed()
    assert name == f"gc of {store.url}"
    assert rows_of_table(tables) == GARBAGE
    assert tables[0].description == f"To be deleted in {store.url}"
    assert "not part of the store, kept: notes.txt" in log
    assert "nothing was deleted; set apply to delete" in log
    assert any("abandoned attempts: 2, 2.05 kB; temporary files: 1, 3 B" in line for line in log)
    assert files_in(store.root) == before


def test_with_apply_unreferenced_files_are_deleted_and_the_next_run_finds_none(store):
    state, _, tables, log = run(store=store.url, apply=True)
    assert state.is_completed()
    assert rows_of_table(tables) == GARBAGE
    assert tables[0].description == f"Deleted in {store.url}"
    assert "3 deleted, 2.05 kB" in log
    assert store.read(store.get(STAGE.key), "weights.bin") == b"wwww"
    assert {path.name for path in files_in(store.root)} == {"manifest.json", "weights.bin", "notes.txt"}

    state, _, tables, log = run(store=store.url, apply=True)
    assert state.is_completed()
    assert rows_of_table(tables) == NOTHING
    assert "0 deleted, 0 B" in log


def test_a_run_that_cannot_delete_a_file_fails_and_reports_the_deleted_ones(store, undeletable):
    state, _, tables, log = run(store=store.url, apply=True)
    assert state.is_failed()
    assert "1 of 3 items" in state.message
    assert f"{undeletable}: not yours. Remove the cause" in state.message
    assert rows_of_table(tables)[-1] == {"kind": "all", "count": 2, "bytes": 2003}
    assert any(line.endswith(f"{undeletable}: not yours") for line in log)
    assert {path.name for path in files_in(store.root)} >= {undeletable}


def test_with_results_only_just_the_results_stay(finished, tmp_path):
    result, runtime = finished
    shutil.copytree(runtime.store, tmp_path / "copy")
    make_old(tmp_path / "copy")
    copy = ArtifactStore(str(tmp_path / "copy"))
    state, _, tables, _ = run(store=copy.url, apply=True, results_only=True)
    assert state.is_completed()
    assert [row["kind"] for row in rows_of_table(tables)][-2:] == ["artifacts", "all"]
    left = {artifact.key for artifact in copy.artifacts()}
    assert {key.partition("/")[0] for key in left} == {"search", "select", "export", "evaluate", "report"}
    assert {result.stages[role].key for role in ("select", "export", "evaluate")} <= left


def test_results_only_is_refused_while_a_search_runs(store):
    before = files_in(store.root)
    with announced(store, "search demo at 0.5"):
        state, _, tables, _ = run(store=store.url, apply=True, results_only=True)
    assert state.is_failed()
    assert f"is in use by 'search demo at 0.5', process {os.getpid()}" in state.message
    assert tables == []
    assert files_in(store.root) == before


def test_a_path_without_a_store_fails_and_is_not_created(prefect_backend, tmp_path):
    state, _, _, _ = run(store=str(tmp_path / "missing"))
    assert state.is_failed()
    assert "missing is not a store: nothing is there" in state.message
    assert not (tmp_path / "missing").exists()


def test_a_url_with_credentials_is_refused(prefect_backend):
    with pytest.raises(ParameterTypeError, match="holds credentials") as refusal:
        gc(store="s3://name:topsecret@bucket/prefix")
    assert "topsecret" not in str(refusal.value)


def test_the_form_describes_each_parameter_and_only_the_store_is_required(prefect_backend):
    deployment = gc.to_deployment("test", entrypoint_type=EntrypointType.MODULE_PATH).apply()
    with get_client(sync_client=True) as client:
        schema = client.read_deployment(deployment).parameter_openapi_schema
    assert schema["required"] == ["store"]
    assert {name: field["default"] for name, field in schema["properties"].items() if name != "store"} == {
        "apply": False,
        "results_only": False,
    }
    assert all(field["description"].endswith(".") for field in schema["properties"].values())
