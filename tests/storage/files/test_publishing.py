"""Publishing: files become visible completely or not at all; exclusive ones have exactly one creator."""

import contextlib
import errno
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
from botocore.exceptions import ClientError
from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem
from xxhash import xxh3_128_hexdigest

from layerwise.storage.files.errors import Unreachable
from layerwise.storage.files.filesystem import open_filesystem
from layerwise.storage.files.publishing import (
    copy_within,
    create_once,
    overwrite,
    publish,
    remove_quietly,
    require_exclusive_creation,
)
from tests.faults import error, ignore_condition, lose_answer

ALWAYS = float("inf")


@pytest.fixture
def hasty_threads():
    """Let threads take turns as often as possible."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_publish_returns_size_digest_and_date_by_the_storage(store):
    path = f"{store.root}/folder/file.bin"
    size, digest, date = publish(store.fs, path, [b"ab", b"", memoryview(b"c")])
    assert (size, digest) == (3, xxh3_128_hexdigest(b"abc"))
    assert date == pytest.approx(store.fs.modified(path).timestamp(), abs=0.001)
    assert store.fs.cat_file(path) == b"abc"


def test_a_published_file_can_be_replaced_completely(store):
    path = f"{store.root}/progress.json"
    overwrite(store.fs, path, b"a long first document")
    overwrite(store.fs, path, b"second")
    assert store.fs.cat_file(path) == b"second"


def test_a_failed_replacement_keeps_the_old_file(store):
    path = f"{store.root}/progress.json"
    overwrite(store.fs, path, b"old")
    with pytest.raises(ZeroDivisionError):
        publish(store.fs, path, (bytes(9 << 20) if index < 4 else 1 / 0 for index in range(5)))
    assert store.fs.cat_file(path) == b"old"
    assert len(store.fs.find(store.root)) == 1


def test_a_broken_upload_leaves_no_parts_on_the_server(s3_bucket):
    fs, path = open_filesystem(f"s3://{s3_bucket}/broken-upload")
    with pytest.raises(ZeroDivisionError):
        publish(fs, path, (bytes(9 << 20) if index < 4 else 1 / 0 for index in range(5)))
    assert fs.list_multipart_uploads(s3_bucket) == []


def test_of_eight_threads_exactly_one_creates_the_file(store, hasty_threads):
    deadline, attempt = time.monotonic() + 1, 0
    while time.monotonic() < deadline:  # hundreds of rounds on a fast backend, one on a slow one
        attempt += 1
        path, barrier = f"{store.root}/{attempt}/manifest.json", Barrier(8)

        def create(token, path=path, barrier=barrier):
            barrier.wait()
            return create_once(store.fs, path, token)

        tokens = [b"token %d" % index for index in range(8)]
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(create, tokens))
        assert sum(won) == 1
        assert store.fs.cat_file(path) == tokens[won.index(True)]
        assert len(store.fs.find(f"{store.root}/{attempt}")) == 1


class ForgetfulServer(AbstractFileSystem):
    """S3 after the answer to a conditional request was lost: the repeated request finds its own object."""

    protocol = "forgetful"
    cachable = False
    content = b""
    conflicts = 0

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        error = OSError(errno.EINVAL, None)  # as s3fs reports it
        status = 412
        if self.conflicts:
            self.conflicts, status = self.conflicts - 1, 409
        else:
            self.content = self.content or value
        error.__cause__ = ClientError({"ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject")
        raise error

    def cat_file(self, path, start=None, end=None, **kwargs):
        return self.content

    def info(self, path, **kwargs):
        return {"name": path, "size": len(self.content), "type": "file"}


def test_a_repeated_request_succeeds_after_its_first_answer_was_lost():
    fs = ForgetfulServer()
    assert create_once(fs, "manifest.json", b"ours") is True
    assert create_once(fs, "manifest.json", b"theirs") is False
    assert fs.content == b"ours"


def test_a_conflict_with_a_concurrent_request_is_retried():
    fs = ForgetfulServer()
    fs.conflicts = 1
    assert create_once(fs, "manifest.json", b"ours") is True


def test_an_empty_document_is_refused(store):
    with pytest.raises(ValueError, match="Put a unique token into it"):
        create_once(store.fs, f"{store.root}/manifest.json", b"")


def test_a_folder_removed_before_its_first_file_is_created_again(tmp_path):
    folder, removed, done = tmp_path / "store" / "stage", [], Event()

    def remove_three_times():
        while len(removed) < 3 and not done.is_set():
            with contextlib.suppress(OSError):
                folder.rmdir()
                removed.append(folder)

    with ThreadPoolExecutor(1) as others:
        others.submit(remove_three_times)
        try:
            for index in range(1000):
                publish(LocalFileSystem(), f"{folder}/{index}", [b"content"])
                if len(removed) == 3:
                    break
                remove_quietly(LocalFileSystem(), [f"{folder}/{index}"])
        finally:
            done.set()
    assert len(removed) == 3
    assert (folder / str(index)).read_bytes() == b"content"


def test_exclusive_creation_needs_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="no hard links .* Put the store on a local disk"):
        create_once(LocalFileSystem(), f"{tmp_path}/manifest.json", b"document")
    assert list(tmp_path.iterdir()) == []


def test_one_file_can_be_replaced_and_removed_concurrently(store):
    """Two processes that build one stage do this with its resume point."""
    path = f"{store.root}/progress.json"
    documents = [bytes([letter]) * (1000 + letter) for letter in b"abcd"]

    def work(document: bytes) -> None:
        for _ in range(10):
            overwrite(store.fs, path, document)
            if document[0] == ord("a"):
                remove_quietly(store.fs, [path])

    with ThreadPoolExecutor(len(documents)) as pool:
        list(pool.map(work, documents))
    overwrite(store.fs, path, documents[0])
    assert store.fs.cat_file(path) == documents[0]


def test_a_missing_file_cannot_be_copied(store):
    with pytest.raises(FileNotFoundError):
        copy_within(store.fs, f"{store.root}/nothing", f"{store.root}/something")


def test_the_check_of_exclusive_creation_passes_and_leaves_nothing(store):
    require_exclusive_creation(store.fs, store.root)
    assert not [path for path in store.fs.find(store.root) if "/probe-" in path]


def test_a_server_that_ignores_the_condition_is_refused(fault_proxy, s3_bucket):
    fs, root = open_filesystem(f"s3://{s3_bucket}/ignoring")
    fault_proxy.inject(ignore_condition, lambda request: request.conditional, times=ALWAYS)
    with pytest.raises(
        OSError, match=r"cannot be a store: .*\[True, True\].* SeaweedFS 4.48 and Ceph"
    ) as refusal:
        require_exclusive_creation(fs, root)
    assert f"{root} at {fault_proxy.url}" in str(refusal.value)
    assert not [path for path in fs.find(root) if "/probe-" in path]


def test_a_server_whose_answer_is_lost_is_accepted(fault_proxy, s3_bucket):
    fs, root = open_filesystem(f"s3://{s3_bucket}/probe-lost")
    fault_proxy.inject(lose_answer, lambda request: request.conditional)
    require_exclusive_creation(fs, root)
    assert len(fault_proxy.caught) == 1


def test_credentials_that_may_only_read_are_reported(fault_proxy, s3_bucket):
    fs, root = open_filesystem(f"s3://{s3_bucket}/probe-read-only")
    fault_proxy.inject(error(403), lambda request: request.writes, times=ALWAYS)
    with pytest.raises(PermissionError, match="was refused .* credentials that may read and write there"):
        require_exclusive_creation(fs, root)


def test_a_missing_server_is_unreachable(s3_bucket):
    once = {"retries": {"total_max_attempts": 1}}
    fs, root = open_filesystem("s3://bucket/run", endpoint_url="http://127.0.0.1:9", config_kwargs=once)
    with pytest.raises(Unreachable, match="bucket/run/probe-.* at http://127.0.0.1:9 cannot be reached"):
        require_exclusive_creation(fs, root)


def test_a_disk_without_hard_links_is_refused(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    fs, root = open_filesystem(str(tmp_path))
    with pytest.raises(OSError, match="no hard links"):
        require_exclusive_creation(fs, root)
    assert list(tmp_path.iterdir()) == []
