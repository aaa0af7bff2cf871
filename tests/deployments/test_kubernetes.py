"""Kubernetes: pods, service account and the values of Prefect's chart, checked by the published schemas."""

import json
import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft7Validator, Draft202012Validator, ValidationError
from prefect.utilities.templating import apply_values

ROOT = Path(__file__).parents[2]
SCHEMAS = Path(__file__).parent / "schemas"
FOLDER = ROOT / "deployments" / "kubernetes"
POOLS = {"devices": "kubernetes", "control": "kubernetes-cpu"}
SPOT_LABELS = {
    "karpenter.sh/capacity-type",
    "eks.amazonaws.com/capacityType",
    "cloud.google.com/gke-spot",
    "kubernetes.azure.com/scalesetpriority",
}


def validate(kind, document):
    """Check a document by the schemas of Kubernetes, which allow no unknown fields."""
    schema = json.loads((SCHEMAS / "kubernetes-1.35.json").read_text())
    Draft202012Validator(schema | {"$ref": f"#/definitions/{kind}"}).validate(document)


def template(name):
    return json.loads((ROOT / "deployments" / "work-pools" / f"{name}.json").read_text())


def job(name, **values):
    """Return the job of a flow run: the template filled in as by prefect-kubernetes, which leaves out what has no value."""
    properties = template(name)["variables"]["properties"]
    defaults = {key: each["default"] for key, each in properties.items() if each.get("default") is not None}
    given = {"name": "run", "labels": {"prefect.io/flow-run-id": "1"}, "command": "prefect flow-run execute"}
    filled = apply_values(template(name)["job_configuration"], defaults | given | values)
    manifest = json.loads(json.dumps(filled))["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    for needless in (
        "completions",
        "parallelism",
    ):  # asked for here by prefect-kubernetes, ignored by Kubernetes
        assert pod.pop(needless) == 1
    container = pod["containers"][0]
    container["args"] = container["args"].split()
    container["env"] = [{"name": key, "value": value} for key, value in container["env"].items()]
    return manifest


def bytes_of(quantity):
    return int(quantity.removesuffix("Gi")) * 2**30


@pytest.mark.parametrize("pool", POOLS)
def test_the_job_of_a_flow_run_is_valid_for_kubernetes(pool):
    manifest = job(POOLS[pool])
    validate("io.k8s.api.batch.v1.Job", manifest)
    labels = {"node_selector": {"nvidia.com/gpu.product": "NVIDIA-L4"}, "scratch_size": "200Gi"}
    validate("io.k8s.api.batch.v1.Job", job(POOLS[pool], **labels))
    misspelt = manifest["spec"]["template"]["spec"] | {"nodeSelektor": {}}
    with pytest.raises(ValidationError, match="nodeSelektor"):
        validate("io.k8s.api.core.v1.PodSpec", misspelt)


def test_the_pod_of_the_gpu_pool_fits_any_provider_and_prefers_spot_nodes():
    pod = job("kubernetes")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["nodeSelector"] == {}  # the request for a GPU selects the node
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    [rule] = pod["affinity"]["nodeAffinity"]
    assert rule == "preferredDuringSchedulingIgnoredDuringExecution"
    preferred = [term["preference"]["matchExpressions"] for term in pod["affinity"]["nodeAffinity"][rule]]
    assert {expression["key"] for [expression] in preferred} == SPOT_LABELS
    tolerated = {each["key"] for each in pod["tolerations"]}
    assert tolerated == {
        "nvidia.com/gpu",
        "cloud.google.com/gke-spot",
        "kubernetes.azure.com/scalesetpriority",
    }


def test_the_pod_of_the_cpu_pool_stays_off_gpu_nodes():
    pod = job("kubernetes-cpu")["spec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in json.dumps(pod)
    assert pod["tolerations"] == []
    assert pod["affinity"] == {}


def test_the_two_templates_differ_only_in_the_gpu_and_in_defaults():
    gpu, cpu = template("kubernetes"), template("kubernetes-cpu")
    resources = gpu["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]["containers"][0][
        "resources"
    ]
    assert resources["limits"].pop("nvidia.com/gpu") == "{{ gpus }}"
    del gpu["variables"]["properties"]["gpus"]
    for each in (gpu, cpu):
        for variable in each["variables"]["properties"].values():
            variable.pop("default", None)
            variable.pop("description", None)
    assert gpu == cpu


@pytest.mark.parametrize("pool", POOLS)
def test_memory_is_requested_as_it_is_limited(pool):
    resources = job(POOLS[pool])["spec"]["template"]["spec"]["containers"][0]["resources"]
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_the_requested_memory_is_that_of_the_first_model_page():
    """docs/kubernetes.md gives a request for every model size; docs/first-model.md states the memory, in GB."""
    stated = re.findall(
        r"^\| (\d+B) \| [\d.]+; ([\d.]+) \|.* [\d.]+; (\d+) \|$",
        (ROOT / "docs" / "first-model.md").read_text(),
        re.M,
    )
    given = dict(
        (size, (memory, scratch))
        for size, memory, scratch in re.findall(
            r"^\| (\d+B) \| `(\d+Gi)` \| `(\d+Gi)` \|", (ROOT / "docs" / "kubernetes.md").read_text(), re.M
        )
    )
    assert len(given) == 4
    for size, memory, scratch in stated:
        assert 1.1 * float(memory) * 1e9 <= bytes_of(given[size][0]) <= 2.5 * float(memory) * 1e9
        assert float(scratch) * 1e9 <= bytes_of(given[size][1])
    defaults = template("kubernetes")["variables"]["properties"]
    assert defaults["memory_request"]["default"] == given["7B"][0]


def test_the_service_account_is_valid_and_that_of_the_pods():
    account = yaml.safe_load((FOLDER / "service-account.yaml").read_text())
    validate("io.k8s.api.core.v1.ServiceAccount", account)
    for name in POOLS.values():
        manifest = job(name)
        assert manifest["metadata"]["namespace"] == account["metadata"]["namespace"]
        pod = manifest["spec"]["template"]["spec"]
        assert pod["serviceAccountName"] == account["metadata"]["name"]
        assert pod["automountServiceAccountToken"] is False


def merged(low, high):
    """Merge values as helm does: mappings by key, everything else is replaced."""
    if isinstance(low, dict) and isinstance(high, dict):
        return low | {key: merged(low.get(key), value) for key, value in high.items()}
    return high


def values_of(pool):
    files = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text()) for name in ("worker", pool)]
    return merged(*files)


@pytest.mark.parametrize("pool", POOLS)
def test_the_values_are_valid_for_the_chart(pool):
    schema = json.loads((SCHEMAS / "prefect-worker-chart.json").read_text())
    configuration = {"configuration": json.dumps(template(POOLS[pool]))}  # as --set-file gives it
    given = {"worker": {"config": {"baseJobTemplate": configuration}}}
    values = merged(values_of(pool), given)
    Draft7Validator(schema).validate(values)
    assert values["worker"]["config"]["workPool"] == pool
    assert f"deployments/work-pools/{POOLS[pool]}.json" in (FOLDER / f"{pool}.yaml").read_text()
    misspelt = merged(values, {"worker": {"config": {"workPol": pool}}})
    with pytest.raises(ValidationError, match="workPol"):
        Draft7Validator(schema).validate(misspelt)


def test_the_server_has_the_service_and_the_password_that_the_workers_expect():
    values = yaml.safe_load((FOLDER / "server.yaml").read_text())
    schema = json.loads((SCHEMAS / "prefect-server-chart.json").read_text())
    Draft7Validator(schema).validate(values)
    with pytest.raises(ValidationError, match="basicAut"):
        Draft7Validator(schema).validate(merged(values, {"server": {"basicAut": {}}}))
    worker = values_of("devices")["worker"]["selfHostedServerApiConfig"]
    assert worker["apiUrl"].startswith(f"http://{values['fullnameOverride']}.layerwise.svc")
    for key in ("enabled", "existingSecret"):
        assert worker["basicAuth"][key] == values["server"]["basicAuth"][key]


def test_the_two_releases_share_no_name():
    names = [
        (values["fullnameOverride"], values["worker"]["config"]["baseJobTemplate"]["name"])
        for values in map(values_of, POOLS)
    ]
    assert len({name for pair in names for name in pair}) == 4  # fmt: skip


def test_workers_and_server_have_the_version_that_is_tested():
    prefect = re.search(r"^prefect==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert values_of("devices")["worker"]["image"]["prefectTag"] == f"{prefect[1]}-python3.11-kubernetes"
    server = yaml.safe_load((FOLDER / "server.yaml").read_text())
    assert server["global"]["prefect"]["image"]["prefectTag"] == f"{prefect[1]}-python3.11"
