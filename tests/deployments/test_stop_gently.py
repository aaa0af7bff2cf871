"""First process of a container: the processes that compute get SIGTERM, and end before the command gets it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefect.client.orchestration import get_client
from prefect.deployments.runner import EntrypointType

ROOT = Path(__file__).parents[2]
STOP_GENTLY = ROOT / "deployments" / "stop_gently.py"

# Needs half a second to end, like a layer and its commit.
COMPUTING = """
import pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def end(*_):
    time.sleep(0.5)
    (folder / "committed").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
(folder / "computing").touch()
while True:
    time.sleep(0.05)
"""
# Reacts like Prefect's commands: on SIGTERM it kills its child at once.
WATCHING = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[3], sys.argv[1]], start_new_session=True)
def end(*_):
    child.kill()
    sys.exit(5)
signal.signal(signal.SIGTERM, end)
child.wait()
if sys.argv[2] == "stays":
    signal.pause()
sys.exit(3)
"""
FLOW = """
import pathlib, time
from prefect import flow
from layerwise.tasks.running.stopping import stop, stop_deferred, stopping_on_sigterm

@flow(name="layers", persist_result=False)
def layers(folder: str) -> None:
    with stopping_on_sigterm(), stop_deferred() as asked_to_stop:
        pathlib.Path(folder, "computing").touch()
        while not asked_to_stop():
            time.sleep(0.05)
        time.sleep(0.5)
        pathlib.Path(folder, "committed").touch()
        stop()
"""


# Time limit. Two processes import Prefect one after the other, on cores that other tests use: a minute was too short.
SECONDS = 300


def wait_for(happened):
    deadline = time.monotonic() + SECONDS
    while not happened():
        assert time.monotonic() < deadline, f"it did not happen within {SECONDS} s"
        time.sleep(0.05)


@pytest.fixture
def start():
    """Start a command as the first process of a container; kill it and its processes after the test."""
    started = []

    def start(*command: str, **options: object) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, str(STOP_GENTLY), *command], start_new_session=True, **options
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_the_exit_code_is_that_of_the_command(start):
    assert start(sys.executable, "-c", "raise SystemExit(7)").wait(20) == 7


def test_a_command_killed_by_a_signal_gives_the_exit_code_of_shells(start):
    command = "import os; os.kill(os.getpid(), 9)"
    assert start(sys.executable, "-c", command).wait(20) == 128 + 9


def test_a_command_without_children_gets_sigterm_itself(start, tmp_path):
    process = start(sys.executable, "-c", COMPUTING, str(tmp_path))
    wait_for((tmp_path / "computing").exists)
    process.terminate()
    assert process.wait(20) == 143
    assert (tmp_path / "committed").exists()


@pytest.mark.parametrize("command, code", [("ends", 3), ("stays", 5)])
def test_a_child_commits_before_the_command_gets_sigterm(start, tmp_path, command, code):
    process = start(sys.executable, "-c", WATCHING, str(tmp_path), command, COMPUTING)
    wait_for((tmp_path / "computing").exists)
    process.terminate()
    assert process.wait(20) == code
    assert (tmp_path / "committed").exists()


def test_a_flow_that_prefect_executes_commits_and_is_marked_as_crashed(
    start, tmp_path, prefect_backend, monkeypatch
):
    (tmp_path / "flow_of_layers.py").write_text(FLOW)
    monkeypatch.syspath_prepend(tmp_path)
    from flow_of_layers import layers

    deployment = layers.to_deployment("layers", entrypoint_type=EntrypointType.MODULE_PATH)
    with get_client(sync_client=True) as client:
        run = client.create_flow_run_from_deployment(
            deployment.apply(), parameters={"folder": str(tmp_path)}
        ).id
        environment = {
            **os.environ,
            "PREFECT_API_URL": prefect_backend,
            "PREFECT__FLOW_RUN_ID": str(run),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]),
        }
        process = start(sys.executable, "-m", "prefect", "flow-run", "execute", env=environment)
        wait_for((tmp_path / "computing").exists)
        process.terminate()
        process.wait(SECONDS)
        assert (tmp_path / "committed").exists()
        assert client.read_flow_run(run).state.name == "Crashed"
