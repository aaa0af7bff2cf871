"""The watcher on a real Prefect server, with checkpoints that appear in a folder and in a bucket."""

import json
import shutil
import uuid

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import ArtifactFilter, DeploymentFilter, DeploymentFilterId
from prefect.deployments.runner import EntrypointType
from prefect.flow_engine import run_flow

from layerwise.flows.search import search
from layerwise.flows.watcher.watch import Watch, watch
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage_collection import collect, plan_collection
from layerwise.tasks.results.garbage import keys_of_results
from tests.leftovers import make_old

POOL = "pool-of-watcher"


@pytest.fixture
def client(prefect_backend):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def store_url(tmp_path) -> str:
    return str(tmp_path / "store")


@pytest.fixture
def deployment(client, store_url):
    """Id of the deployment search/search on a work pool without workers."""
    client.create_work_pool(WorkPoolCreate(name=POOL, type="process"))
    made = search.to_deployment(
        "search",
        work_pool_name=POOL,
        entrypoint_type=EntrypointType.MODULE_PATH,
        parameters={"runtime": {"store": store_url}},
    )
    deployment = made.apply()
    yield deployment
    client.delete_deployment(deployment)
    client.delete_work_pool(POOL)


@pytest.fixture(params=["local", "s3"])
def prefix(request, tmp_path) -> str:
    """URL of an empty prefix."""
    if request.param == "local":
        (tmp_path / "models").mkdir()
        return str(tmp_path / "models")
    return f"s3://{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


@pytest.fixture
def look(client, workshop, prefix, store_url):
    """Return a function that lets the watcher look once, and returns its table: states and details by name."""
    settings = Watch.model_validate(workshop.parameters(model=prefix))

    def look() -> dict[str, tuple[str, str]]:
        state = watch(settings, store_url, return_state=True)
        assert state.is_completed(), state.message
        ours = ArtifactFilter(flow_run_id={"any_": [state.state_details.flow_run_id]})
        [table] = client.read_artifacts(artifact_filter=ours)
        assert table.key == "watched-checkpoints"
        rows = {row["checkpoint"]: (row["state"], row["detail"]) for row in json.loads(table.data)}
        assert all(name.startswith(f"{prefix}/") for name in rows)
        return {name.removeprefix(f"{prefix}/"): row for name, row in rows.items()}

    return look


def test_each_new_checkpoint_is_searched_once_when_it_is_complete(
    client, workshop, deployment, prefix, store_url, look
):
    fs, root = open_filesystem(prefix)

    def runs():
        ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
        return client.read_flow_runs(deployment_filter=ours)

    assert look() == {}
    for name in ("model", "narrow"):
        fs.put(f"{workshop.folder / name}/", f"{root}/run/{name}/", recursive=True)
    weights = (workshop.folder / "narrow" / "model.safetensors").read_bytes()
    fs.pipe_file(f"{root}/run/narrow/model.safetensors", weights[:-1000])
    fs.put(f"{workshop.model}/", f"{root}/pruned/", recursive=True)
    fs.pipe_file(f"{root}/pruned/sparsity.json", b"{}")
    odd = "what?key=1"  # a search would take it for a secret
    fs.makedirs(f"{root}/{odd}", exist_ok=True)
    fs.pipe_file(f"{root}/{odd}/config.json", b"{}")
    fs.makedirs(f"{root}/notes", exist_ok=True)
    fs.pipe_file(f"{root}/notes/README.md", b"no checkpoint")

    first = look()
    assert first.pop(odd)[0] == "not searched"
    fs.rm(f"{root}/{odd}", recursive=True)
    assert {name: state for name, (state, _) in first.items()} == {
        "run/model": "new",
        "run/narrow": "not complete",
    }
    assert f"has {len(weights) - 1000} bytes" in first["run/narrow"][1]
    assert runs() == []

    assert look()["run/model"][0] == "Scheduled"
    [model] = runs()
    assert model.parameters["settings"] == workshop.parameters(model=f"{prefix}/run/model") | {
        name: value
        for name, value in model.parameters["settings"].items()
        if name not in workshop.parameters()
    }
    assert model.parameters["runtime"] == {"store": store_url}
    assert run_flow(search, flow_run=model, return_type="state").is_completed()

    fs.pipe_file(f"{root}/run/narrow/model.safetensors", weights)
    assert [state for state, _ in look().values()] == ["Completed", "new"]
    assert [state for state, _ in look().values()] == ["Completed", "Scheduled"]
    [narrow] = [run for run in runs() if run.id != model.id]
    assert run_flow(search, flow_run=narrow, return_type="state").is_failed()

    fs.put(f"{workshop.model}/", f"{root}/same/", recursive=True)
    for _ in range(2):
        failed = look()["run/narrow"]
        assert failed[0] == "Failed"
        assert "embedding has 50 rows" in failed[1]
    assert look()["same"][0] == "Completed"  # by the search of the other one
    assert {run.id for run in runs()} == {model.id, narrow.id}


def test_the_records_outlive_a_garbage_collection_and_the_flow_runs(
    client, workshop, deployment, tmp_path, store_url
):
    shutil.copytree(workshop.model, tmp_path / "models" / "model")
    settings = Watch.model_validate(workshop.parameters(model=str(tmp_path / "models" / "model")))
    for _ in range(2):
        watch(settings, store_url)
    ours = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    [run] = client.read_flow_runs(deployment_filter=ours)
    client.delete_flow_run(run.id)
    make_old(tmp_path / "store")
    store = ArtifactStore(store_url)
    collect(store, plan_collection(store, keys_of_results))
    assert [artifact.key.partition("/")[0] for artifact in store.artifacts()] == ["watch"]
    for _ in range(3):
        watch(settings, store_url)
    assert client.read_flow_runs(deployment_filter=ours) == []


def test_without_a_deployment_of_the_search_nothing_is_recorded(prefect_backend, workshop, tmp_path):
    settings = Watch.model_validate(workshop.parameters(model=str(workshop.folder)))
    state = watch(settings, str(tmp_path / "store"), return_state=True)
    assert state.is_failed()
    assert "no deployment search/search, which runs the searches. Deploy it" in state.message
    assert not (tmp_path / "store").exists()
