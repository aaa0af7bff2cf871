"""Files become visible whole or not at all; an exclusive one has exactly one creator."""

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

from layerwise.storage.files.publishing import create_once, overwrite, publish, remove_quietly
from layerwise.storage.files.reading import open_filesystem


@pytest.fixture
def hasty_threads():
    """Let threads take turns as often as possible."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def test_publish_tells_size_digest_and_the_storages_date(store):
    path = f"{store.root}/folder/file.bin"
    size, digest, date = publish(store.fs, path, [b"ab", b"", memoryview(b"c")])
    assert (size, digest) == (3, xxh3_128_hexdigest(b"abc"))
    assert date == pytest.approx(store.fs.modified(path).timestamp(), abs=0.001)
    assert store.fs.cat_file(path) == b"abc"


def test_a_published_file_can_be_replaced_whole(store):
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
    """S3 after the answer to a first conditional request was lost: the repeated one meets its own object."""

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


def test_a_repeated_request_whose_first_answer_was_lost_still_wins():
    fs = ForgetfulServer()
    assert create_once(fs, "manifest.json", b"ours") is True
    assert create_once(fs, "manifest.json", b"theirs") is False
    assert fs.content == b"ours"


def test_a_conflict_with_another_request_under_way_is_tried_again():
    fs = ForgetfulServer()
    fs.conflicts = 1
    assert create_once(fs, "manifest.json", b"ours") is True


def test_an_empty_document_is_refused(store):
    with pytest.raises(ValueError, match="Put a unique token into it"):
        create_once(store.fs, f"{store.root}/manifest.json", b"")


def test_a_folder_that_others_remove_before_the_file_is_in_it_is_made_again(tmp_path):
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


def test_a_disk_without_hard_links_is_refused_with_what_to_do(tmp_path, monkeypatch):
    def link(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="no hard links .* Put the store on a local disk"):
        create_once(LocalFileSystem(), f"{tmp_path}/manifest.json", b"document")
    assert list(tmp_path.iterdir()) == []


def test_processes_that_replace_and_remove_one_file_at_the_same_time_do_not_disturb_each_other(store):
    """As two that work on one stage do with its resume point."""
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
