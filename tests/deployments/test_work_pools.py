"""Work-pool templates: complete, accepted by the server, and valid for the infrastructure once filled in."""

import json
from pathlib import Path

import botocore.session
import pytest
from botocore.validate import ParamValidator
from docker.types import HostConfig
from jsonschema import Draft202012Validator
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.utilities.templating import apply_values, find_placeholders

FOLDER = Path(__file__).parents[2] / "deployments" / "work-pools"
KINDS = ["process", "docker", "kubernetes", "kubernetes-cpu", "ecs"]
ON_FARGATE = {
    "launch_type": "FARGATE_SPOT",
    "requires_compatibilities": ["FARGATE"],
    "resource_requirements": [],
    "capacity_provider_strategy": [],
}


def template(kind):
    return json.loads((FOLDER / f"{kind}.json").read_text())


def defaults(kind):
    variables = template(kind)["variables"]["properties"]
    return {
        name: schema["default"] for name, schema in variables.items() if schema.get("default") is not None
    }


def filled_in(kind, **values):
    """Fill in a template as a worker does, before it adds the names and variables of a run."""
    return apply_values(template(kind)["job_configuration"], defaults(kind) | values)


def test_there_is_a_template_for_each_kind_of_pool():
    assert sorted(path.stem for path in FOLDER.glob("*.json")) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_placeholder_has_a_variable_and_every_variable_is_used(kind):
    used = {placeholder.name for placeholder in find_placeholders(template(kind)["job_configuration"])}
    assert used == set(template(kind)["variables"]["properties"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_have_the_types_of_the_form(kind):
    schema = template(kind)["variables"]
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(defaults(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_accepts_the_template(kind, prefect_backend):
    pool = WorkPoolCreate(
        name=f"template-{kind}", type=kind.removesuffix("-cpu"), base_job_template=template(kind)
    )
    with get_client(sync_client=True) as client:
        created = client.create_work_pool(pool)
        client.delete_work_pool(pool.name)
    assert created.base_job_template == template(kind)


@pytest.mark.parametrize("kind", ["kubernetes", "kubernetes-cpu"])
def test_a_pod_has_two_minutes_to_commit(kind):
    job = filled_in(kind)["job_manifest"]["spec"]
    assert job["template"]["spec"]["terminationGracePeriodSeconds"] == 120


def test_only_the_parent_restarts_the_run_of_an_evicted_pod():
    assert filled_in("kubernetes")["job_manifest"]["spec"]["backoffLimit"] == 0
    assert defaults("kubernetes")["env"] == {"PREFECT_FLOW_RUN_EXECUTE_SIGTERM_BEHAVIOR": "crash"}


def test_a_pod_gets_its_secrets_from_the_cluster():
    container = filled_in("kubernetes", secret_name="ours")["job_manifest"]["spec"]["template"]["spec"][
        "containers"
    ][0]
    assert container["envFrom"] == [{"secretRef": {"name": "ours", "optional": True}}]


@pytest.mark.parametrize("values", [{}, ON_FARGATE], ids=["gpu on ec2", "fargate"])
def test_the_task_definition_is_valid_for_aws(values):
    secret = {"name": "HF_TOKEN", "valueFrom": "arn:aws:secretsmanager:eu-west-1:123456789012:secret:hub"}
    task = filled_in("ecs", secrets=[secret], execution_role_arn="arn:aws:iam::123456789012:role/x", **values)
    definition = task["task_definition"] | {"family": "layerwise"}
    definition |= {name: str(definition[name]) for name in ("cpu", "memory")}  # as the worker does
    register = (
        botocore.session.get_session().get_service_model("ecs").operation_model("RegisterTaskDefinition")
    )
    report = ParamValidator().validate(definition, register.input_shape)
    assert not report.has_errors(), report.generate_report()

    container = definition["containerDefinitions"][0]
    assert container["stopTimeout"] == 120
    assert container["secrets"] == [secret]
    assert container["resourceRequirements"] == values.get(
        "resource_requirements", [{"type": "GPU", "value": "1"}]
    )


def test_a_container_of_the_docker_pool_has_one_gpu():
    options = filled_in("docker")["container_create_kwargs"]
    assert HostConfig(version="1.45", **options)["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 1, "DeviceIDs": [], "Capabilities": [["gpu"]], "Options": {}}
    ]
