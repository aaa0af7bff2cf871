"""Faults between the client and S3: the correct content, or an error that names the object."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from layerwise.storage.artifact import Artifact
from layerwise.storage.draft import Draft
from layerwise.storage.files.errors import Corrupt, Unreachable
from layerwise.storage.files.publishing import publish
from layerwise.storage.stage import Stage
from layerwise.storage.store import ArtifactStore
from layerwise.storage.tensors import read_tensor_into, read_tensors, write_tensors
from tests.fault_proxy import FaultProxy, Request
from tests.faults import (
    cut_body,
    duplicate,
    error,
    flip_bit,
    lose_answer,
    stall_before_head,
    stall_in_body,
    truncate,
)

ALWAYS = float("inf")
LONG = 600  # seconds; the client or the end of the test ends it
STAGE = Stage("capture", 1)
WEIGHT = torch.arange(5000, dtype=torch.int32).reshape(50, 100)
STATE = torch.arange(3000, dtype=torch.float64)
NOTES = bytes(range(256)) * 20
DATA = ("layer.safetensors", "notes.bin", "state.safetensors")

FAULTS_OF_ANSWERS = {
    "connection cut": cut_body,
    "status 500": error(500),
    "status 503": error(503),
    "stall before the head": stall_before_head(LONG),
    "stall in the body": stall_in_body(LONG),
    "truncated": truncate,
    "bit flipped": flip_bit,
}
FAULTS_OF_WRITES = {
    "answer lost": lose_answer,
    "status 500": error(500),
    "status 503": error(503),
    "stall before the head": stall_before_head(LONG),
}


def reads_data(request: Request) -> bool:
    return request.method == "GET" and request.path.endswith(DATA)


class FirstTime:
    """Match each request the first time it is made."""

    def __init__(self, matches) -> None:
        self.matches, self.seen = matches, set()

    def __call__(self, request: Request) -> bool:
        what = (request.method, request.target.split("uploadId")[0], request.headers.get("range"))
        if not self.matches(request) or what in self.seen:
            return False
        self.seen.add(what)
        return True


class Killed(Exception):
    pass


def build_in_two_attempts(store: ArtifactStore) -> Artifact:
    def save_state(state: Draft) -> None:
        write_tensors(state, "state.safetensors", {"state": STATE})

    def killed_after_a_resume_point(draft: Draft) -> None:
        write_tensors(draft, "layer.safetensors", {"weight": WEIGHT})
        draft.save_resume_point(1, save_state)
        raise Killed

    def resumed(draft: Draft) -> None:
        assert draft.resumed is not None
        state = read_tensors(store, draft.resumed.state, "state.safetensors")["state"]
        assert state.equal(STATE)
        draft.write("notes.bin", NOTES)

    with pytest.raises(Killed):
        store.get_or_build(STAGE, killed_after_a_resume_point)
    return store.get_or_build(STAGE, resumed)


def read_all(store: ArtifactStore, artifact: Artifact) -> None:
    """Check that every way of reading returns what was written."""
    assert store.read(artifact, "notes.bin") == NOTES
    assert read_tensors(store, artifact, "layer.safetensors")["weight"].equal(WEIGHT)
    weight = torch.empty_like(WEIGHT)
    read_tensor_into(store, artifact, "layer.safetensors", "weight", weight)
    assert weight.equal(WEIGHT)


def open_store(s3_bucket: str, name: str, attempts: int, read_timeout: float) -> ArtifactStore:
    settings = {"retries": {"mode": "standard", "total_max_attempts": attempts}, "read_timeout": read_timeout}
    store = ArtifactStore(
        f"s3://{s3_bucket}/{name.replace(' ', '-')}", config_kwargs=settings, skip_instance_cache=True
    )
    store.fs.retries = attempts
    return store


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("name", FAULTS_OF_ANSWERS)
def test_reading_survives_one_fault_of_each_answer(fault_proxy: FaultProxy, s3_bucket, name):
    store = open_store(s3_bucket, f"read once {name}", attempts=3, read_timeout=1)
    artifact = build_in_two_attempts(store)
    fault_proxy.inject(FAULTS_OF_ANSWERS[name], FirstTime(reads_data), times=ALWAYS)
    read_all(store, artifact)
    assert len(fault_proxy.caught) == 2  # one request for each file


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("name", FAULTS_OF_WRITES)
def test_building_and_resuming_survive_one_fault_of_each_write(fault_proxy: FaultProxy, s3_bucket, name):
    store = open_store(s3_bucket, f"write once {name}", attempts=3, read_timeout=0.5)
    fault_proxy.inject(FAULTS_OF_WRITES[name], FirstTime(lambda request: request.writes), times=ALWAYS)
    artifact = build_in_two_attempts(store)
    # At least layer, state, resume point, notes, manifest.
    assert len([request for request in fault_proxy.caught if request.method == "PUT"]) >= 5
    fault_proxy.heal()
    read_all(store, artifact)


@pytest.mark.parametrize("name", [*FAULTS_OF_WRITES, "duplicated"])
def test_an_upload_in_parts_survives_one_fault_of_each_step(fault_proxy: FaultProxy, s3_bucket, name):
    store = open_store(s3_bucket, f"parts once {name}", attempts=3, read_timeout=2)
    fault = {**FAULTS_OF_WRITES, "duplicated": duplicate}[name]
    fault_proxy.inject(fault, FirstTime(lambda request: request.writes), times=ALWAYS)
    path = f"{store.root}/large.bin"
    content = bytes(range(256)) * (70 << 10)  # 17.5 MB: three parts
    publish(store.fs, path, [content])
    assert len(fault_proxy.caught) == 5  # create, three parts, complete
    fault_proxy.heal()
    assert store.fs.cat_file(path, start=0, end=len(content)) == content


def test_requests_that_arrive_twice_change_nothing(fault_proxy: FaultProxy, s3_bucket):
    store = open_store(s3_bucket, "all duplicated", attempts=3, read_timeout=60)
    fault_proxy.inject(duplicate, times=ALWAYS)
    artifact = build_in_two_attempts(store)
    read_all(store, artifact)
    assert store.find(STAGE) == artifact


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("name", FAULTS_OF_ANSWERS)
def test_a_lasting_fault_ends_reading_with_an_error_that_names_the_object(
    fault_proxy: FaultProxy, s3_bucket, name
):
    artifact = build_in_two_attempts(open_store(s3_bucket, f"read {name}", attempts=3, read_timeout=60))
    store = open_store(s3_bucket, f"read {name}", attempts=1, read_timeout=0.3)
    fault_proxy.inject(FAULTS_OF_ANSWERS[name], reads_data, times=ALWAYS)
    expected = Corrupt if name == "bit flipped" else Unreachable
    with pytest.raises(expected, match=r"read-.*/notes\.bin"):
        store.read(artifact, "notes.bin")
    with pytest.raises(expected, match=r"read-.*/layer\.safetensors"):
        read_tensors(store, artifact, "layer.safetensors")
    with pytest.raises(expected, match=r"read-.*/layer\.safetensors"):
        read_tensor_into(store, artifact, "layer.safetensors", "weight", torch.empty_like(WEIGHT))


@pytest.mark.parametrize(
    "name, file",
    [
        ("answer lost", "manifest.json"),
        ("status 403", "layer.safetensors"),
        ("status 500", "state.safetensors"),
        ("status 503", "notes.bin"),
        ("stall before the head", "progress.json"),
    ],
)
def test_a_lasting_fault_ends_writing_with_an_error_that_names_the_object(
    fault_proxy: FaultProxy, s3_bucket, name, file
):
    store = open_store(s3_bucket, f"write {file} {name}", attempts=1, read_timeout=0.5)
    fault = {**FAULTS_OF_WRITES, "status 403": error(403)}[name]
    fault_proxy.inject(fault, lambda request: request.writes and request.path.endswith(file), times=ALWAYS)
    with pytest.raises(PermissionError if "403" in name else Unreachable, match=rf"write-.*/{file} at http"):
        build_in_two_attempts(store)
    fault_proxy.heal()
    healed = open_store(s3_bucket, f"write {file} {name}", attempts=3, read_timeout=60)
    read_all(healed, build_in_two_attempts(healed) if healed.find(STAGE) is None else healed.find(STAGE))


def test_the_default_settings_survive_stalls_of_30_seconds(fault_proxy: FaultProxy, s3_bucket):
    """In real time; all readers and the writer wait concurrently."""
    store = ArtifactStore(f"s3://{s3_bucket}/stalled", skip_instance_cache=True)
    artifact = build_in_two_attempts(store)
    fault_proxy.inject(stall_before_head(30), lambda request: reads_data(request) and "notes" in request.path)
    fault_proxy.inject(stall_in_body(30), lambda request: reads_data(request) and "layer" in request.path)
    fault_proxy.inject(stall_before_head(30), lambda request: request.writes)
    with ThreadPoolExecutor(3) as pool:
        notes = pool.submit(store.read, artifact, "notes.bin")
        weight = pool.submit(read_tensors, store, artifact, "layer.safetensors")
        written = pool.submit(publish, store.fs, f"{store.root}/new.bin", [NOTES])
        assert notes.result() == NOTES
        assert weight.result()["weight"].equal(WEIGHT)
        assert written.result()[0] == len(NOTES)
    assert len(fault_proxy.caught) == 3
