"""Dockerfile and compose file: the files that they name exist, and no file of the folder holds a secret."""

import fnmatch
import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "deployments"
WORKERS = ["control", "device", "device-gpu"]

SECRETS = re.compile(
    r"""AKIA[0-9A-Z]{16} | hf_[A-Za-z0-9]{20} | -----BEGIN | xox[a-z]-\d | hooks\.slack\.com/services/\w
    | ://[^/\s:@]+:(?!\$\{)[^/\s@]+@
    | (?:password|passwd|secret_?(?:access_?)?key|access_?key(?:_id)?|token|auth_string)["']?[ \t]*[:=][ \t]*
      ["']?(?![\s"'${<]|\{\{|(?:true|false)\b|$)[\w/+-]{4,}""",
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)


def compose():
    return yaml.safe_load((FOLDER / "compose.yaml").read_text())


def dockerfile():
    return (FOLDER / "Dockerfile").read_text()


def copied():
    """Sources of all COPY instructions."""
    instructions = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile(), re.MULTILINE)
    return [source for instruction in instructions for source in instruction.split()]


@pytest.mark.parametrize("source", copied())
def test_every_copied_file_exists_and_is_not_ignored(source):
    assert (ROOT / source).exists()
    let_through = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"]
    assert any(fnmatch.fnmatch(source, pattern) for pattern in let_through)


def test_the_dockerfile_copies_the_package_of_the_wheel_and_what_its_links_point_to():
    wheel = re.search(r"^packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    packages = re.findall(r'"(\w+)"', wheel[1])
    assert packages == ["layerwise"]
    linked = [path.resolve().name for path in (ROOT / "layerwise").iterdir() if path.is_symlink()]
    assert sorted(linked) == ["flows", "storage", "tasks"]
    assert {*packages, *linked} <= set(copied())


def test_the_dockerfile_copies_what_the_build_runs():
    """hatchling refuses to build without its hook."""
    assert "hooks.custom" in (ROOT / "pyproject.toml").read_text()
    assert "hatch_build.py" in copied()


def test_every_build_argument_is_used():
    arguments = re.findall(r"^ARG (\w+)", dockerfile(), re.MULTILINE)
    assert arguments
    assert [name for name in arguments if f"${{{name}}}" not in dockerfile()] == []


def test_only_the_first_stage_has_a_compiler_and_the_second_takes_over_what_it_built():
    _, first, second = re.split(r"^FROM ", dockerfile(), flags=re.MULTILINE)
    assert first.startswith("${BASE} AS build\n")
    assert second.startswith("${BASE}\n")
    assert "install --yes --no-install-recommends g++" in first
    assert "g++" not in second
    assert "COPY --from=build /opt/layerwise /opt/layerwise" in second
    assert "libgomp1" in second  # OpenMP, which the kernel is linked with


def test_the_image_runs_as_an_unprivileged_user_and_stops_gently():
    assert re.search(r"^USER layerwise$", dockerfile(), re.MULTILINE)
    assert 'ENTRYPOINT ["python", "/opt/layerwise/stop_gently.py"]' in dockerfile()


def test_the_compose_file_is_valid_by_the_specification():
    schema = json.loads((Path(__file__).parent / "schemas" / "compose-spec.json").read_text())
    Draft7Validator(schema).validate(compose())


def test_the_pool_computes_on_cpus_or_on_a_gpu_by_profile():
    services = compose()["services"]
    profiles = {name: service["profiles"] for name, service in services.items() if "profiles" in service}
    assert profiles == {"device": ["cpu"], "device-gpu": ["gpu"]}
    cpu, gpu = services["device"], services["device-gpu"]
    [reserved] = gpu["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == {"driver": "nvidia", "device_ids": ["0"], "capabilities": ["gpu"]}
    assert set(gpu["build"]["args"]) <= set(re.findall(r"^ARG (\w+)", dockerfile(), re.MULTILINE))
    own = ("profiles", "image", "build", "deploy")
    assert {k: v for k, v in cpu.items() if k not in own} == {k: v for k, v in gpu.items() if k not in own}


def test_services_wait_for_services_and_mount_volumes_that_exist():
    services, volumes = compose()["services"], compose()["volumes"]
    for service in services.values():
        for name, how in service.get("depends_on", {}).items():
            assert how["condition"] != "service_healthy" or "healthcheck" in services[name]
        for mount in service.get("volumes", []):
            source = mount.split(":")[0]
            assert source in volumes or (FOLDER / source).exists()


@pytest.mark.parametrize("name", WORKERS)
def test_a_worker_has_time_to_commit_and_a_limit(name):
    worker = compose()["services"][name]
    assert worker["stop_grace_period"] == "2m"
    assert worker["command"][worker["command"].index("--limit") + 1] == ("8" if name == "control" else "1")


def test_every_secret_of_the_compose_file_is_a_variable_and_required():
    text = (FOLDER / "compose.yaml").read_text()
    offered = re.findall(r"^(\w+)=$", (FOLDER / "compose.env.example").read_text(), re.MULTILINE)
    asked = dict(re.findall(r"(?<!\$)\$\{(\w+)(:[?-])", text))
    assert set(asked) == set(offered)
    assert {name for name, how in asked.items() if how == ":-"} == {"HF_TOKEN"}
    assert "compose.env" in (FOLDER / ".gitignore").read_text().splitlines()


def test_the_server_requires_the_string_that_its_clients_have():
    services = {name: service.get("environment", {}) for name, service in compose()["services"].items()}
    asked = services["server"]["PREFECT_SERVER_API_AUTH_STRING"]
    clients = [environment for environment in services.values() if "PREFECT_API_URL" in environment]
    assert len(clients) == 4
    assert {environment["PREFECT_API_AUTH_STRING"] for environment in clients} == {asked}


COMMANDS = ["docs/fan-out.md", "deployments/README.md"]


@pytest.mark.parametrize("path", COMMANDS)
def test_documented_servers_use_authentication(path):
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / path).read_text(), re.MULTILINE | re.DOTALL)
    starts = [block for block in blocks if "prefect server start" in block]
    assert starts
    for block in starts:
        for name in ("SERVER_API_AUTH_STRING", "UI_API_URL", "SERVER_ANALYTICS_ENABLED=false"):
            assert f"PREFECT_{name}" in block
        assert "--host 0.0.0.0" not in block


@pytest.mark.parametrize(
    "text",
    [
        "POSTGRES_PASSWORD: hunter2hunter2",
        '"aws_secret_access_key": "abcdEFGH/123"',
        "S3_ACCESS_KEY=admin",
        "HF_TOKEN: hf_abcdefghijklmnopqrstuv",
        "postgresql+asyncpg://prefect:hunter2@postgres/prefect",
        "AKIAIOSFODNN7EXAMPLE",
    ],
)
def test_a_secret_would_be_found(text):
    assert SECRETS.search(text)


@pytest.mark.parametrize(
    "path", sorted(path for path in FOLDER.rglob("*") if path.is_file()), ids=lambda path: path.name
)
def test_no_file_holds_a_secret(path):
    if path.name != "compose.env":  # not in git; holds secrets
        found = SECRETS.search(path.read_text())
        assert found is None, f"{path.name} seems to hold a secret: {found[0][:20]}..."
