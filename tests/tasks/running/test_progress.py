"""Progress: plain lines without a terminal, a bar on a terminal, an artifact and log lines in Prefect."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
from uuid import UUID

import httpx
import pytest
from prefect import flow, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, LogFilter
from prefect.context import TaskRunContext
from prefect.logging.handlers import APILogHandler

from layerwise.storage.signs_of_life import announced, read_sign, running_processes, storage_clock
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.running import log_lines, progress
from layerwise.tasks.running.progress import RunTime, showing, with_run_clock

TIME = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"


@pytest.fixture
def every_step_reported(monkeypatch):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_REPORTS", 0.0)


def sign_of_a_new_process(store: ArtifactStore) -> str:
    """Announce this process, and return what its sign of life reports; further signs would take 15 s."""
    with announced(store, "a search", "a" * 32):
        return read_sign(store, "a" * 32).doing


def test_a_note_is_shown_behind_the_numbers(capsys):
    with showing("distill", total=1, unit="step") as step:
        step(1, "loss 0.5")
    assert capsys.readouterr().err.rstrip().endswith("GiB), loss 0.5")


def test_without_a_terminal_every_report_is_one_plain_line(capsys, every_step_reported):
    with showing("branch: 3 betas", total=2) as step:
        step(1)
        step(2)
    captured = capsys.readouterr()
    assert captured.out == ""
    first, last = captured.err.splitlines()
    memory = r"\d+\.\d GiB \(peak \d+\.\d GiB\)"
    assert re.fullmatch(rf"{TIME} branch: 3 betas: layer 1 of 2, \d+ s left, {memory}", first)
    assert re.fullmatch(rf"{TIME} branch: 3 betas: layer 2 of 2, 0 s left, {memory}", last)


@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING], ids=["a worker's", "the command line's"])
def test_a_line_appears_once_even_if_the_log_goes_to_the_terminal(capsys, caplog, monkeypatch, level):
    """In a worker, Prefect writes all log lines to standard error; on the command line, only warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(level)
    caplog.set_level(logging.INFO, logger="layerwise.tasks")
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    with showing("export", total=1) as step:
        step(1)
    assert capsys.readouterr().err.count("export: layer 1 of 1") == 1


def test_a_title_from_outside_is_escaped(capsys, every_step_reported):
    with showing("export: [/x] \x1b[2J\nforged", total=1) as step:
        step(1)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.partition(" ")[2].startswith(r"export: [/x] \x1b[2J\nforged: layer 1 of 1")


def test_lines_appear_at_most_every_thirty_seconds_but_the_last_always_does(capsys):
    with showing("export", total=50) as step:
        for layer in range(1, 51):
            step(layer)
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"layer \d+ of 50", line)[0] for line in lines] == ["layer 1 of 50", "layer 50 of 50"]


def test_the_time_left_is_estimated_from_the_layers_of_this_attempt(capsys, monkeypatch, every_step_reported):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with showing("capture", total=80, start=60) as step:
        clock[0] = 110.0
        step(61)
    assert "layer 61 of 80, 3.2 min left" in capsys.readouterr().err  # 19 layers of 10 s


def test_the_time_left_of_the_whole_run_is_shown_and_reported(capsys, tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))

    def clock(stage: float | None) -> RunTime:
        return RunTime(7200.0 if stage is None else 3600.0, at_least=stage is None)

    with with_run_clock(clock), showing("capture", total=2) as step, announced(store, "a search", "a" * 32):
        (process,) = running_processes(store, storage_clock(store))
        assert (process.seconds_left, process.name) == (7200.0, "a" * 32)
        step(1)
    assert "s left, all stages 60 min, " in capsys.readouterr().err
    assert str(clock(None)) == "all stages at least 2 h"


def test_json_lines_have_the_numbers_and_no_secrets(capsys, monkeypatch):
    monkeypatch.setattr(log_lines.formatter, "log_format", "json")
    with showing("capture: s3://id:secret@host/x", total=2) as step:
        step(1)
        log_lines.write_line(
            logging.makeLogRecord({"msg": "wrong: %s", "args": ("a\nb",), "levelname": "WARNING"})
        )
    progressed, warned = map(json.loads, capsys.readouterr().err.splitlines())
    assert re.fullmatch(TIME, progressed["time"])
    assert {name: progressed[name] for name in ("level", "layer", "layers", "stage")} == {
        "level": "INFO",
        "layer": 1,
        "layers": 2,
        "stage": "capture: s3://***@host/x",
    }
    assert progressed["message"].startswith("capture: s3://***@host/x: layer 1 of 2, ")
    assert progressed["peak_memory"] >= progressed["memory"] > 2**20
    assert progressed["seconds_left"] >= 0
    assert (warned["level"], warned["message"], warned["stage"]) == (
        "WARNING",
        "wrong: a\nb",
        progressed["stage"],
    )


def test_signs_of_life_report_the_progress_until_the_end(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))

    assert sign_of_a_new_process(store) == ""
    with showing("capture: dense model", total=80, start=60) as step:
        assert sign_of_a_new_process(store) == "capture: dense model: layer 60 of 80"
        step(61)
        assert sign_of_a_new_process(store) == "capture: dense model: layer 61 of 80"
    assert sign_of_a_new_process(store) == ""


def test_signs_of_life_report_nothing_after_a_failure(tmp_path):
    store = ArtifactStore(str(tmp_path / "store"))
    with pytest.raises(KeyError), showing("capture", total=2):
        raise KeyError("layer")
    assert sign_of_a_new_process(store) == ""


def test_an_error_in_the_block_is_raised():
    with pytest.raises(KeyError), showing("capture", total=2):
        raise KeyError("layer")


def test_a_terminal_shows_a_bar_with_layers_and_memory(pytestconfig):
    parent, child = pty.openpty()
    code = "from layerwise.tasks.running.progress import showing\nwith showing('capture', 2) as step:\n step(1)\n step(2)"
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, "-c", code], stderr=child, cwd=pytestconfig.rootpath, env=environment, check=False
    )
    os.close(child)
    shown = b""
    try:
        while piece := os.read(parent, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(parent)
    assert done.returncode == 0
    assert re.search(r"capture .*2/2.* layers .*left.* GiB", shown.decode())


def test_a_task_run_has_a_progress_artifact_and_log_lines_in_prefect(prefect_backend, every_step_reported):
    @task
    def half_done() -> UUID:
        with showing("capture: dense model", total=4) as step:
            step(1)
            step(2)
        return TaskRunContext.get().task_run.id

    @flow
    def one_task() -> UUID:
        return half_done()

    task_run = one_task()
    with get_client(sync_client=True) as client:
        (artifact,) = client.read_artifacts(artifact_filter=ArtifactFilter(task_run_id={"any_": [task_run]}))
        APILogHandler().flush()
        logs = client.read_logs(LogFilter(task_run_id={"any_": [task_run]}))
    assert (artifact.type, artifact.data, artifact.description) == ("progress", 50.0, "capture: dense model")
    lines = [log.message for log in logs if "capture: dense model" in log.message]
    assert [re.search(r"layer \d of 4", line)[0] for line in lines] == ["layer 1 of 4", "layer 2 of 4"]


def test_a_report_that_prefect_refuses_does_not_end_the_work(prefect_backend, every_step_reported, caplog):
    @task
    def outlives_its_artifact() -> str:
        with showing("branch", total=2) as step:
            step(1)
            with get_client(sync_client=True) as client:
                task_run = TaskRunContext.get().task_run.id
                (artifact,) = client.read_artifacts(
                    artifact_filter=ArtifactFilter(task_run_id={"any_": [task_run]})
                )
                client.delete_artifact(artifact.id)
            step(2)
        return "done"

    assert flow(lambda: outlives_its_artifact(), name="outlives")() == "done"
    assert caplog.text.count("the work continues") == 1


def test_an_unreachable_server_does_not_end_the_work(prefect_backend, monkeypatch, caplog):
    def refused(*_, **__):
        raise httpx.ConnectError("connection refused")

    @task
    def outlives_the_server() -> str:
        with showing("branch", total=2) as step:
            step(2)
        return "done"

    monkeypatch.setattr(progress, "create_progress_artifact", refused)
    assert flow(lambda: outlives_the_server(), name="outlives")() == "done"
    assert caplog.text.count("the work continues") == 1
