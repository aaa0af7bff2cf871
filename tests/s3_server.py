"""A real S3 server for tests and benchmarks: SeaweedFS on ports of this machine, with an empty bucket."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from layerwise.storage.files.filesystem import open_filesystem

BUCKET = "layerwise-tests"
START_LIMIT = 60  # seconds; it takes 1 to 4 on an idle machine


def weed_command() -> str | None:
    """Return the path of the server's program; None if it is not installed."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


@contextmanager
def s3_server(folder: Path) -> Iterator[str]:
    """Run the server while the block runs, with its files in ``folder``, which is deleted at the end.

    Its address and credentials are in the environment.

    Yields:
        The name of an empty bucket.
    """
    weed = weed_command()
    assert weed is not None, "callers check whether the server is installed"
    ports = _free_ports(8)
    with pytest.MonkeyPatch.context() as environment, (folder / "log").open("wb") as log:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            environment.delenv(name)  # tests must never access a real bucket
        environment.setenv("AWS_ACCESS_KEY_ID", "testkey")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "testsecretkey1234")
        environment.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{ports[0]}")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        server = subprocess.Popen(_weed_options(weed, folder, ports), stdout=log, stderr=log, cwd=folder)
        try:
            _wait_until_ready(server, folder / "log")
            yield BUCKET
        finally:
            server.send_signal(signal.SIGKILL)  # it can ignore SIGTERM
            server.wait()
            shutil.rmtree(folder, ignore_errors=True)  # pytest would keep these hundreds of MB
            for socket_file in [f for port in ports for f in Path("/tmp").glob(f"seaweedfs-*-{port}.sock")]:
                socket_file.unlink(missing_ok=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:  # all are open at the same time, so that they differ
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _weed_options(weed: str, folder: Path, ports: list[int]) -> list[str]:
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
