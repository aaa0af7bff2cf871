"""Uploads to S3: many parts at once, in bounded memory; after an error nothing is left on the server."""

import asyncio
import random
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest

from layerwise.storage.files import s3_upload
from layerwise.storage.files.errors import Removed, Unreachable
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.files.publishing import publish
from layerwise.storage.files.s3_upload import part_size
from tests.faults import error, stall_before_head

ALWAYS = float("inf")
LONG = 600  # seconds; the end of the test ends it
DEADLINE = 60  # seconds of waiting for another thread
MIB = 1 << 20
CONTENT = random.Random(0).randbytes(20 * MIB) + b"the end"  # four parts of 5 MB, and the rest


@pytest.fixture
def target(fault_proxy, s3_bucket):
    """Client and path of a file on S3 that does not exist yet; its parts have 5 MB, S3's minimum."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_upload, "PART", 5 * MIB)
        yield open_filesystem(f"s3://{s3_bucket}/{uuid.uuid4().hex}/file.bin")


def sends_part(request, number=None):
    wanted = [str(number)] if number else request.query.get("partNumber")
    return request.method == "PUT" and "partNumber" in request.query and request.query["partNumber"] == wanted


def assert_nothing_is_left(fs, path):
    assert not fs.exists(path)
    bucket, _, key = path.partition("/")
    assert key not in [upload["Key"] for upload in fs.list_multipart_uploads(bucket)]


def test_all_parts_of_a_small_file_are_under_way_at_once(fault_proxy, target):
    fs, path = target
    together = Barrier(5, timeout=DEADLINE)

    def answer_when_all_have_arrived(exchange):
        together.wait()
        exchange.send(exchange.forward())

    fault_proxy.inject(answer_when_all_have_arrived, sends_part, times=ALWAYS)
    size, _, _ = publish(fs, path, [CONTENT], len(CONTENT))
    assert size == len(CONTENT)
    assert fs.cat_file(path, start=0, end=size) == CONTENT


def test_parts_that_arrive_in_another_order_are_joined_in_theirs(fault_proxy, target):
    fs, path = target
    fault_proxy.inject(stall_before_head(1), lambda request: sends_part(request, 1))
    fault_proxy.inject(stall_before_head(0.5), lambda request: sends_part(request, 2))
    publish(fs, path, [CONTENT[:7], CONTENT[7 : 12 * MIB], CONTENT[12 * MIB :]])
    assert fs.cat_file(path, start=0, end=len(CONTENT)) == CONTENT


def test_no_more_parts_are_made_than_may_be_under_way(fault_proxy, target, monkeypatch):
    fs, path = target
    monkeypatch.setattr(s3_upload, "AT_ONCE", 2)
    made, arrived, answers = [], [], Event()

    def pieces():
        for begin in range(0, len(CONTENT), MIB):
            made.append(begin)
            yield CONTENT[begin : begin + MIB]

    def answer_later(exchange):
        arrived.append(exchange.request)
        answers.wait(DEADLINE)
        exchange.send(exchange.forward())

    fault_proxy.inject(answer_later, sends_part, times=ALWAYS)
    with ThreadPoolExecutor(1) as pool:
        publishing = pool.submit(publish, fs, path, pieces())
        deadline = time.monotonic() + DEADLINE
        while len(made) < 15 or len(arrived) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)  # an error would show in this time
        assert (len(made), len(arrived)) == (15, 2)  # two parts under way, and the next one is complete
        answers.set()
        assert publishing.result(DEADLINE)[0] == len(CONTENT)


def test_an_error_in_one_part_cancels_the_others_and_is_reported(fault_proxy, target):
    fs, path = target
    fault_proxy.inject(error(403), lambda request: sends_part(request, 3), times=ALWAYS)
    fault_proxy.inject(stall_before_head(LONG), sends_part, times=ALWAYS)
    with pytest.raises(PermissionError, match=r"file\.bin at http.* was refused"):
        publish(fs, path, [CONTENT])
    deadline = time.monotonic() + DEADLINE
    while asyncio.all_tasks(fs.loop):  # the other parts would wait for their answers
        assert time.monotonic() < deadline
        time.sleep(0.01)
    fault_proxy.heal()
    assert_nothing_is_left(fs, path)


def test_a_part_that_fails_for_ever_ends_the_upload(fault_proxy, s3_bucket, monkeypatch):
    monkeypatch.setattr(s3_upload, "PART", 5 * MIB)
    once = {"retries": {"total_max_attempts": 1}}
    url = f"s3://{s3_bucket}/{uuid.uuid4().hex}/file.bin"
    fs, path = open_filesystem(url, config_kwargs=once, skip_instance_cache=True)
    fs.retries = 1
    fault_proxy.inject(error(500), lambda request: sends_part(request, 5), times=ALWAYS)
    with pytest.raises(Unreachable, match=r"file\.bin at http"):
        publish(fs, path, [CONTENT])
    fault_proxy.heal()
    assert_nothing_is_left(fs, path)


def test_an_upload_that_another_process_aborts_is_removed(fault_proxy, target, s3_bucket):
    fs, path = target

    def pieces():
        yield CONTENT
        fs.clear_multipart_uploads(s3_bucket)

    with pytest.raises(Removed, match=r"file\.bin was deleted"):
        publish(fs, path, pieces())


def test_an_interrupted_upload_leaves_nothing(fault_proxy, target):
    fs, path = target

    def pieces():
        yield CONTENT
        raise KeyboardInterrupt

    fault_proxy.inject(stall_before_head(LONG), lambda request: sends_part(request, 2), times=ALWAYS)
    with pytest.raises(KeyboardInterrupt):
        publish(fs, path, pieces())
    fault_proxy.heal()
    assert_nothing_is_left(fs, path)


@pytest.mark.parametrize("size", [8 * MIB, 100 * MIB, 405_000_000, 80 << 30, 1 << 40, 5 << 40])
def test_files_of_every_size_have_parts_that_s3_accepts(size):
    part = part_size(size)
    assert 5 * MIB <= part <= 5 << 30
    assert -(-size // part) <= 10_000


def test_parts_that_are_under_way_need_256_mb():
    assert part_size(0) == 8 * MIB  # of a file of unknown size
    assert part_size(405_000_000) == 6_328_125  # twice 32 equal parts
    assert part_size(1 << 40) == 109_951_163  # two of them
