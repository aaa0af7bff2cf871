"""Tracking of searches: a real MLflow server, Weights & Biases offline, and services that fail.

CI has neither package. To run these tests:

    pip install mlflow-skinny wandb; python -m venv /tmp/mlflow && /tmp/mlflow/bin/pip install mlflow
    MLFLOW_SERVER=/tmp/mlflow/bin/mlflow python -m pytest tests/flows/observers
"""

import json
import math
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from layerwise.flows.observers.search_tracker import require_tracking
from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tables import read_table

SERVER = os.environ.get("MLFLOW_SERVER") or shutil.which("mlflow")
START_LIMIT = 300  # seconds


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory):
    pytest.importorskip("mlflow")
    if SERVER is None:
        pytest.skip("there is no mlflow server")
    folder, url = tmp_path_factory.mktemp("mlflow"), f"http://127.0.0.1:{free_port()}"
    where = ["--backend-store-uri", f"sqlite:///{folder}/db", "--artifacts-destination", f"{folder}/files"]
    address = ["--host", "127.0.0.1", "--port", url.rpartition(":")[2], "--workers", "1"]
    # The server may be installed apart from the client, and needs no jobs in the background.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [SERVER, "server", *where, *address],
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + START_LIMIT
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                gave_up = server.poll() is not None or time.monotonic() > end
                assert not gave_up, (folder / "log").read_text()
                time.sleep(0.5)
        yield url
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def series(client, run, name: str) -> list[float]:
    history = {each.step: each.value for each in client.get_metric_history(run.info.run_id, name)}
    return [history[step] for step in sorted(history)]


def test_mlflow_gets_a_search_once_at_its_stages_and_at_its_end(
    mlflow_server, prefect_backend, workshop, tmp_path, monkeypatch, caplog
):
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    runtime = SearchRuntime(store=str(tmp_path / "store"), track="mlflow")
    stopping = workshop.settings(test="no such text.txt")
    with pytest.raises(FileNotFoundError):
        search(stopping, runtime)  # before any work: nothing is tracked
    result = search(workshop.settings(), runtime)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("layerwise").experiment_id
    (run,) = client.search_runs([experiment])
    assert run.info.status == "FINISHED"
    assert run.data.params.items() >= {"sparsity": "0.5", "pruner.method": "wanda", "seqlen": "16"}.items()
    tags = run.data.tags
    assert tags["layerwise.key"] == result.artifact.key
    assert tags["layerwise.model_hash"] == result.stages["checkpoint"].key.partition("/")[2]
    metrics = run.data.metrics
    for row in result.selection.rows:
        assert metrics[f"selection_perplexity/beta {row.beta:g}"] == pytest.approx(math.exp(row.loss))
    assert metrics["test_perplexity/best"] == pytest.approx(result.test.best)
    assert metrics["seconds/capture"] > 0
    store = ArtifactStore(runtime.store)
    best = result.stages[f"lane beta {result.selection.best_row.beta:g}"]
    table = read_table(store, best, "linears.parquet").to_pylist()
    share = [
        sum(row["zeros"] for row in table if row["layer"] == layer)
        / sum(row["weights"] for row in table if row["layer"] == layer)
        for layer in range(3)
    ]
    assert series(client, run, "layer_sparsity") == pytest.approx(share)
    assert len(series(client, run, "layer_error")) == 3
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert files == {"report.html", "result.json", "sparsity.json"}
    downloaded = Path(client.download_artifacts(run.info.run_id, "result.json", str(tmp_path)))
    assert json.loads(downloaded.read_text())["verdict"] == result.selection.verdict

    points = len(client.get_metric_history(run.info.run_id, "test_perplexity/best"))
    search(workshop.settings(), runtime)  # reuses the run, and adds nothing
    (again,) = client.search_runs([experiment])
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert len(client.get_metric_history(run.info.run_id, "test_perplexity/best")) == points == 1
    assert "did not accept" not in caplog.text


def test_a_failing_server_is_a_warning_with_the_reason(
    prefect_backend, workshop, finished, monkeypatch, caplog
):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://user:secret@127.0.0.1:{free_port()}")
    began = time.monotonic()
    result = search(workshop.settings(), finished[1].model_copy(update={"track": "mlflow"}))
    assert result.selection == finished[0].selection
    assert "mlflow did not accept a report (" in caplog.text
    assert "--track mlflow: everything is in the store" in caplog.text
    assert "secret" not in caplog.text
    assert time.monotonic() - began < 300


def test_wandb_writes_a_search_to_its_offline_folder(
    prefect_backend, workshop, finished, tmp_path, monkeypatch, caplog
):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    search(workshop.settings(), finished[1].model_copy(update={"track": "wandb"}))
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = log.read_bytes()
    for text in (
        b"test_perplexity/best",
        b"layer_sparsity",
        finished[0].artifact.key.encode(),
        b"pruner.method",
    ):
        assert text in content
    assert "did not accept" not in caplog.text


def test_a_missing_package_is_refused_before_any_work(monkeypatch, workshop, tmp_path):
    monkeypatch.setattr("layerwise.flows.observers.search_tracker.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'layerwise-pruning\[wandb\]'"):
        search.fn(workshop.settings(), SearchRuntime(store=str(tmp_path / "store"), track="wandb"))
    assert not (tmp_path / "store").exists()
    require_tracking("none")
