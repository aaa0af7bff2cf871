"""Reading from a remote storage: many requests at once, in bounded memory, in order where that is asked for."""

import asyncio
import random
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
from fsspec.asyn import AsyncFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from layerwise.storage.files import reading
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.files.reading import read_ahead, read_scattered

CONTENT = random.Random(0).randbytes(200_000)
DEADLINE = 60  # seconds of waiting for another thread


class Remote(AsyncFileSystem):
    """A storage with one file, whose answers wait until ``gate`` says so, and then arrive in random order.

    Attributes:
        started: first bytes of the requests so far, in order.
        under_way: number of requests that have no answer yet; ``most`` is its maximum.
        gate: number of requests that must have started before the first answer.
        refused: first byte of a request that is refused; requests for later bytes get no answer.
    """

    protocol = "remote"
    cachable = False

    def __init__(self, gate=0, refused=None):
        super().__init__()
        self.started, self.under_way, self.most = [], 0, 0
        self.gate, self.refused = gate, refused

    async def _cat_file(self, path, start=None, end=None, **kwargs):
        self.started.append(start)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            while len(self.started) < self.gate:
                await asyncio.sleep(0.001)
            if start == self.refused:
                raise PermissionError(13, "no")
            while self.refused is not None and start > self.refused:
                await asyncio.sleep(0.001)
            await asyncio.sleep(random.uniform(0, 0.01))
            return CONTENT[start:end]
        finally:
            self.under_way -= 1


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    for name in ("PIECE", "SMALLEST", "ORDERED_PIECE"):
        monkeypatch.setattr(reading, name, 1000)


def wait_until(condition):
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_32_requests_are_under_way_at_once():
    fs, buffer = Remote(gate=32), bytearray(len(CONTENT))
    read_scattered(fs, "/file", [(0, memoryview(buffer))])
    assert buffer == CONTENT
    assert fs.most == 32


def test_a_request_that_takes_long_does_not_delay_the_others():
    class SlowStart(Remote):
        async def _cat_file(self, path, start=None, end=None, **kwargs):
            while start == 0 and len(self.started) < 199:
                await asyncio.sleep(0.001)
            return await super()._cat_file(path, start, end, **kwargs)

    fs, buffer = SlowStart(), bytearray(len(CONTENT))
    read_scattered(fs, "/file", [(0, memoryview(buffer))])
    assert buffer == CONTENT
    assert fs.started[-1] == 0


def test_a_read_of_medium_size_is_split_into_equal_requests_that_all_run_at_once(monkeypatch):
    monkeypatch.setattr(reading, "PIECE", 8000)
    fs, buffer = Remote(gate=32), bytearray(64_000)
    read_scattered(fs, "/file", [(100, memoryview(buffer))])
    assert buffer == CONTENT[100:64_100]
    assert sorted(fs.started) == [100 + 2000 * index for index in range(32)]


@pytest.mark.parametrize("local", [False, True])
def test_ranges_are_delivered_in_order_in_pieces_of_one_range(tmp_path, local):
    (tmp_path / "file").write_bytes(CONTENT)
    fs, path = (LocalFileSystem(), f"{tmp_path}/file") if local else (Remote(), "/file")
    ranges = [(5, 100), (150_000, 50_000), (300, 0), (20, 90_123)]
    pieces = [bytes(piece) for piece in read_ahead(fs, [(path, *each) for each in ranges])]
    assert [len(piece) for piece in pieces] == [100, *[1000] * 50, *[1000] * 90, 123]
    assert b"".join(pieces) == b"".join(CONTENT[offset : offset + size] for offset, size in ranges)


def test_reading_in_order_continues_while_the_caller_works_but_only_so_far():
    fs = Remote()
    content = read_ahead(fs, [("/file", 0, len(CONTENT))])
    for consumed in range(1, 101):
        next(content)
        # Those that the caller got, and those that wait for it or are under way.
        assert len(fs.started) <= consumed + reading.ORDERED_HELD
    wait_until(lambda: fs.under_way == 0)
    assert len(fs.started) > 100 + reading.ORDERED_HELD // 2
    assert fs.most <= 32
    content.close()


def test_an_error_in_the_middle_ends_the_read_and_cancels_the_other_requests():
    fs = Remote(refused=50_000)
    with pytest.raises(PermissionError, match="/file at remote:// was refused"):
        read_scattered(fs, "/file", [(0, memoryview(bytearray(len(CONTENT))))])
    assert len(fs.started) < 200
    wait_until(lambda: fs.under_way == 0)


def test_closing_a_reader_cancels_its_requests():
    fs = Remote()
    content = read_ahead(fs, [("/file", 0, len(CONTENT))])
    next(content)
    fs.gate = 1000  # no more answers
    next(content)
    content.close()
    wait_until(lambda: fs.under_way == 0)
    assert len(fs.started) < 200


def test_several_threads_can_read_at_once():
    fs = Remote()

    def read(offset: int) -> bytes:
        buffer = bytearray(30_000)
        read_scattered(fs, "/file", [(offset, memoryview(buffer))])
        return bytes(buffer)

    with ThreadPoolExecutor(4) as pool:
        offsets = range(0, 160_000, 20_000)
        assert list(pool.map(read, offsets)) == [CONTENT[each : each + 30_000] for each in offsets]


def test_a_client_that_makes_one_request_at_a_time_gets_larger_ones(monkeypatch):
    class Single(MemoryFileSystem):
        cachable = False
        sizes: list[int]

        def cat_file(self, path, start=None, end=None, **kwargs):
            self.sizes.append(end - start)
            return super().cat_file(path, start, end, **kwargs)

    monkeypatch.setattr(reading, "LONE_PIECE", 80_000)
    fs, buffer = Single(global_store=False), bytearray(len(CONTENT))
    fs.sizes = []
    fs.pipe_file("/file", CONTENT)
    read_scattered(fs, "/file", [(0, memoryview(buffer))])
    assert buffer == CONTENT
    assert fs.sizes == [80_000, 80_000, 40_000]


def test_a_read_from_s3_uses_32_connections(fault_proxy, s3_bucket):
    """The client's own limit, 10 by default, must not be lower."""
    fs, path = open_filesystem(f"s3://{s3_bucket}/concurrent")
    fs.pipe_file(path, CONTENT[:32_000])
    together = Barrier(32, timeout=DEADLINE)

    def answer_when_all_have_asked(exchange):
        together.wait()
        exchange.send(exchange.forward())

    fault_proxy.inject(
        answer_when_all_have_asked, lambda request: request.method == "GET", times=float("inf")
    )
    buffer = bytearray(32_000)
    read_scattered(fs, path, [(0, memoryview(buffer))])
    assert buffer == CONTENT[:32_000]
