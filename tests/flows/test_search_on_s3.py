"""Searches on a real S3 server behind a proxy: the requests that they send, and faults of the network."""

import random
import uuid

import pytest
from safetensors.torch import load_file

from layerwise.flows.runtime import SearchRuntime
from layerwise.flows.search import search
from layerwise.storage.files.filesystem import open_filesystem
from tests.fault_proxy import FaultProxy, Request
from tests.faults import cut_body, duplicate, error, flip_bit, lose_answer, stall_in_body, truncate

FAULTS = [cut_body, duplicate, error(500), error(503), flip_bit, lose_answer, stall_in_body(1), truncate]


@pytest.fixture
def url(s3_bucket) -> str:
    return f"s3://{s3_bucket}/{uuid.uuid4().hex}"


def content_of(result):
    return {role: artifact.content for role, artifact in result.stages.items() if role != "checkpoint"}


def is_listing(request: Request) -> bool:
    of_the_bucket = request.method == "GET" and request.path.count("/") < 2
    return of_the_bucket or bool({"list-type", "prefix", "delimiter"} & set(request.query))


def test_a_search_sends_no_listing_requests(run_search, fault_proxy: FaultProxy, url):
    assert run_search(url).built
    first, fault_proxy.requests = fault_proxy.requests, []
    assert run_search(url).built == ()
    again = fault_proxy.requests
    assert len(first) > len(again) > 10
    assert [request for request in first + again if is_listing(request)] == []


def test_a_search_over_a_bad_network_ends_with_the_right_result(
    finished, run_search, fault_proxy: FaultProxy, url
):
    """One in ten requests meets a fault; all kinds of faults occur."""
    chance = random.Random(0)
    for number, fault in enumerate(FAULTS):
        left = len(FAULTS) - number  # so that each kind gets the same share of the requests
        fault_proxy.inject(fault, lambda _, left=left: chance.random() < 0.1 / left, times=float("inf"))
    result = run_search(url)
    assert len(fault_proxy.caught) > 20
    assert content_of(result) == content_of(finished[0])
    fault_proxy.heal()
    assert run_search(url).selection == finished[0].selection


def test_remote_weights_are_read_four_times_and_with_a_layer_cache_once(
    finished, workshop, run_search, fault_proxy: FaultProxy, url, tmp_path
):
    fs, root = open_filesystem(f"{url}/model")
    fs.put(f"{workshop.model}/", root, recursive=True)
    size = sum(weight.nbytes for weight in load_file(workshop.model / "model.safetensors").values())

    def weights_read() -> int:
        ranges = [
            request.headers["range"].removeprefix("bytes=").split("-")
            for request in fault_proxy.requests
            if request.method == "GET" and request.path.endswith("/model.safetensors")
        ]
        fault_proxy.requests = []
        return sum(int(end) + 1 - int(begin) for begin, end in ranges)

    header = 1 << 20
    search(workshop.settings(model=f"{url}/model"), SearchRuntime(store=f"{url}/uncached"))
    assert (
        4 * size <= weights_read() < 4 * (size + header)
    )  # import, capture, lanes, export together with the test
    cached = SearchRuntime(store=f"{url}/store", layer_cache=tmp_path / "cache")
    result = search(workshop.settings(model=f"{url}/model"), cached)
    assert size <= weights_read() < size + header
    assert content_of(result) == content_of(finished[0])
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"damaged")
    again = search(workshop.settings(model=f"{url}/model", betas=[0.2]), cached)
    assert size <= weights_read() < size + header
    assert again.selection == run_search(betas=[0.2]).selection
