"""``prefect deploy`` with our file on a real server: the deployments, and runs that are created from them."""

import asyncio
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from prefect import Flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.deployments.steps.utility import run_shell_script
from prefect.exceptions import PrefectHTTPStatusError

ROOT = Path(__file__).parents[2]
PREFECT_YAML = ROOT / "deployments" / "prefect.yaml"
ENVIRONMENT = {
    "LAYERWISE_STORE": "s3://bucket/prefix",
    "LAYERWISE_WORK_POOL": "devices-of-test",
    "LAYERWISE_CONTROL_POOL": "control-of-test",
}
RUNTIME = {"store": "s3://bucket/prefix"}
FAN_OUT = RUNTIME | {"fan_out": "pool:devices-of-test"}
SEARCH = {"model": "demo", "sparsity": 0.5}
# What a run needs beyond the deployment's own parameters.
PARAMETERS = {
    "search": {"settings": SEARCH},
    "capture": {"settings": SEARCH, "runtime": RUNTIME},
    "branch": {"settings": SEARCH, "runtime": RUNTIME, "points": [[0.01, 0.0], [0.02, 0.0]]},
    "evaluate": {"settings": SEARCH, "runtime": RUNTIME},
    "compare": {"settings": {"search": SEARCH, "sparsities": [0.5, 0.6]}},
    "zero-shot": {"settings": {"tasks": ["arc_easy"], "documents": 100}},
    "compress": {"settings": {}},
    "distill": {"settings": {}},
    "generate-calibration": {"settings": {"model": "demo", "prompts": "chat.jsonl"}},
    "theory": {"settings": {"search": SEARCH}},
    "gc": {},
    "watch": {"settings": SEARCH | {"model": "s3://bucket/checkpoints"}},
}


@pytest.fixture(scope="module")
def client(prefect_backend):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def deployed(client, prefect_backend):
    """Deployments by name, after ``prefect deploy`` from another folder."""
    for name in ("devices-of-test", "control-of-test"):
        client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    command = ["-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(PREFECT_YAML)]
    process = subprocess.run(
        [sys.executable, *command],
        env={**os.environ, **ENVIRONMENT, "PREFECT_API_URL": prefect_backend, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return {name: client.read_deployment_by_name(f"{name}/{name}") for name in PARAMETERS}


def flow_of(deployment) -> Flow:
    module, _, name = deployment.entrypoint.rpartition(".")
    return getattr(import_module(module), name)


@pytest.mark.parametrize("name", PARAMETERS)
def test_an_entrypoint_is_a_flow_of_the_installed_package_and_no_code_is_pulled(deployed, name):
    deployment = deployed[name]
    assert flow_of(deployment).name == name
    assert deployment.pull_steps == []
    assert deployment.path is None or not Path(deployment.path).is_absolute()


def test_a_run_that_waits_is_not_in_the_pool_that_computes(deployed):
    pools = {name: deployment.work_pool_name for name, deployment in deployed.items()}
    assert pools == {
        **dict.fromkeys(["search", "compare", "gc", "watch"], "control-of-test"),
        **dict.fromkeys(["capture", "branch", "evaluate"], "devices-of-test"),
        **dict.fromkeys(
            ["zero-shot", "compress", "distill", "generate-calibration", "theory"], "devices-of-test"
        ),
    }


def test_store_and_pools_come_from_the_environment(deployed):
    assert deployed["search"].parameters == {"runtime": FAN_OUT}
    assert deployed["compare"].parameters == {"runtime": FAN_OUT}
    for name in ("zero-shot", "compress", "distill", "generate-calibration", "theory"):
        assert deployed[name].parameters == {"runtime": {"store": "s3://bucket/prefix"}}
    assert deployed["gc"].parameters == {"store": "s3://bucket/prefix"}
    assert deployed["watch"].parameters == {"store": "s3://bucket/prefix"}


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_run_with_valid_parameters_is_created(client, deployed, name):
    deployment = deployed[name]
    run = client.create_flow_run_from_deployment(deployment.id, parameters=PARAMETERS[name])
    client.delete_flow_run(run.id)
    assert run.parameters == deployment.parameters | PARAMETERS[name]
    flow_of(deployment).validate_parameters(run.parameters)


@pytest.mark.parametrize("name", ["search", "capture", "branch", "evaluate"])
def test_a_run_with_an_invalid_sparsity_is_refused_before_it_starts(client, deployed, name):
    parameters = PARAMETERS[name] | {"settings": SEARCH | {"sparsity": 2}}
    with pytest.raises(PrefectHTTPStatusError, match="409"):
        client.create_flow_run_from_deployment(deployed[name].id, parameters=parameters)


def test_all_schedules_are_off(deployed):
    schedules = {name: deployment.schedules for name, deployment in deployed.items() if deployment.schedules}
    assert {name: len(found) for name, found in schedules.items()} == {"watch": 2, "gc": 1}
    assert not any(schedule.active for found in schedules.values() for schedule in found)


@pytest.mark.parametrize("name", ["watch", "gc"])
def test_an_active_schedule_creates_runs_with_all_parameters(client, deployed, name):
    """A schedule's parameters replace those of the deployment by name; the others stay."""
    deployment = deployed[name]
    for schedule in deployment.schedules:
        # The server would empty parameters that are not given (Prefect 3.8.8).
        given = {"parameters": schedule.parameters}
        client.update_deployment_schedule(deployment.id, schedule.id, active=True, **given)
        response = client.request("POST", "/deployments/{id}/schedule", path_params={"id": deployment.id})
        response.raise_for_status()
        runs = client.read_flow_runs(
            deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
        )
        assert runs
        wanted = flow_of(deployment).validate_parameters(deployment.parameters | schedule.parameters)
        for run in runs:
            assert flow_of(deployment).validate_parameters(run.parameters) == wanted
        client.update_deployment_schedule(deployment.id, schedule.id, active=False)  # deletes its runs


@pytest.mark.parametrize("name", ENVIRONMENT)
def test_a_missing_variable_stops_the_deployment(name, monkeypatch):
    """Prefect alone would silently use an empty string."""
    [step] = yaml.safe_load(PREFECT_YAML.read_text())["build"]
    check = step["prefect.deployments.steps.run_shell_script"]
    for each, value in ENVIRONMENT.items():
        monkeypatch.setenv(each, value)
    asyncio.run(run_shell_script(**check))
    monkeypatch.delenv(name)
    with pytest.raises(RuntimeError, match=f"{name}: set it"):
        asyncio.run(run_shell_script(**check))
