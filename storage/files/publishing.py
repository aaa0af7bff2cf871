"""Publishing: files become visible completely or not at all; exclusive ones are created only once."""

import contextlib
import errno
import io
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from itertools import chain

from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from xxhash import xxh3_128

from layerwise.storage.files.errors import Corrupt, Removed, endpoint_of, reaching, status_of
from layerwise.storage.files.filesystem import is_local, modified
from layerwise.storage.files.local_disk import create_file, link_file, replace_file
from layerwise.storage.files.reading import read_exactly
from layerwise.storage.files.s3_upload import equal_parts, is_s3, part_size, upload_in_parts

BLOCK = 16 << 20  # bytes of one part of an upload to a storage other than S3
SLICE = 8 << 20  # maximum bytes passed on at once: an upload copies its input
CONFLICTS = 6  # attempts of a conditional request: 3 seconds in all

memory_lock = threading.Lock()  # fsspec's memory file system checks first and writes later


def publish(
    fs: AbstractFileSystem, path: str, pieces: Iterable[bytes | memoryview], expected_size: int = 0
) -> tuple[int, str, float]:
    """Write a file from its pieces. It becomes visible when it is complete; after an error nothing is visible.

    S3 gets up to 32 parts of 5 to 8 MB at once (see ``upload_in_parts``), other remote storages one part of 16 MB at a time.

    Args:
        pieces: consecutive parts of the content, of any length; consumed once.
        expected_size: bytes of all pieces, if they are known. S3 accepts files of more than 84 GB only in larger parts.

    Returns:
        Size in bytes and xxh3_128 digest (32 hex digits) of the content, and the modification time of the file in
        seconds since 1970, by the storage's clock.

    Raises:
        Removed: another process deleted the file, or its unfinished upload, in the meantime.
        Corrupt: the size of the stored file differs from the number of bytes written.
        OSError: the disk is full or refuses; see ``reaching`` for the errors of other storages.
    """
    hasher, size = xxh3_128(), 0

    def counted() -> Iterator[memoryview]:
        nonlocal size
        for piece in pieces:
            if not memoryview(piece).nbytes:
                continue  # an empty view cannot be cast
            whole = memoryview(piece).cast("B")
            for start in range(0, len(whole), SLICE):
                part = whole[start : start + SLICE]
                hasher.update(part)
                size += len(part)
                yield part

    if is_local(fs):
        replace_file(fs._strip_protocol(path), counted())
    elif isinstance(fs, MemoryFileSystem):
        fs.pipe_file(path, b"".join(counted()))
    else:
        _publish_remote(fs, path, counted(), part_size(expected_size))
    fs.invalidate_cache(fs._parent(path))
    with _detecting_removal(path), reaching(fs, path):
        row = fs.info(path)
    if row["size"] != size:
        raise Corrupt(
            f"{path}: {size} bytes were written, but {row['size']} are stored. Check the storage (full? another "
            "writer?) and run again."
        )
    return size, hasher.hexdigest(), modified(fs, row)


def overwrite(fs: AbstractFileSystem, path: str, document: bytes) -> None:
    """Replace a small file. Readers see the old content or the new one, never a mixture.

    Other processes may replace or remove the file at the same time, so their content, or nothing, may be stored
    afterwards.

    Raises:
        OSError: as for ``publish``.
    """
    if is_local(fs):
        replace_file(fs._strip_protocol(path), [memoryview(document)])
    else:
        with reaching(fs, path):
            fs.pipe_file(path, document)
    fs.invalidate_cache(fs._parent(path))


def create_once(fs: AbstractFileSystem, path: str, document: bytes) -> bool:
    """Create a small file unless it exists. Exactly one of several callers gets True.

    Args:
        document: content, including a unique token of the caller. If the first answer of the storage is lost, it answers
            "exists" to the repeated request; only the token shows that this caller created the file.

    Raises:
        ValueError: ``document`` is empty; S3 does not create empty files exclusively.
        OSError: as for ``publish``, or the disk has no hard links.
    """
    if not document:
        raise ValueError(f"{path}: an empty file cannot be created exclusively. Put a unique token into it.")
    if is_local(fs):
        return create_file(fs._strip_protocol(path), document)
    if isinstance(fs, MemoryFileSystem):
        with memory_lock:
            if fs.exists(path):
                return False
            fs.pipe_file(path, document)
            return True
    with reaching(fs, path):
        return _create_remote(fs, path, document)


def require_exclusive_creation(fs: AbstractFileSystem, folder: str) -> None:
    """Check that the second of two attempts to create the same file in ``folder`` is refused. The store relies on this.

    Leaves nothing behind, unless the process is killed in the meantime: then one small file ``probe-<32 hex>``.

    Raises:
        OSError: the second creation succeeded, or the storage cannot be written.
        Unreachable: the storage does not answer.
    """
    path = f"{folder}/probe-{uuid.uuid4().hex}"
    first, second = (f"{number} {uuid.uuid4().hex}".encode() for number in ("first", "second"))
    try:
        created = [create_once(fs, path, document) for document in (first, second)]
        content = bytearray(len(first))
        read_exactly(fs, path, 0, memoryview(content))
    finally:
        with contextlib.suppress(Exception):  # an earlier error is more important than a small file
            fs.rm_file(path)
    if created != [True, False] or content != first:
        raise OSError(
            errno.ENOTSUP,
            f"{folder} at {endpoint_of(fs)} cannot be a store: two exclusive creations of {path} were answered "
            f"with {created} instead of [True, False], and the file held {bytes(content)!r}, so two workers "
            "could overwrite each other's results. Use a server that supports 'If-None-Match: *' on PUT (AWS S3 "
            "documents it; it works on SeaweedFS 4.48 and Ceph RGW 16.2), or put the store on a local disk.",
        )


def copy_within(fs: AbstractFileSystem, source: str, target: str) -> None:
    """Make the file ``source`` available as ``target`` as well, without transferring its bytes to this machine.

    On a local disk this is a hard link, which takes neither time nor space; files never change, so both names stay
    equal. Elsewhere the storage makes the copy.

    Raises:
        FileNotFoundError: ``source`` does not exist.
        FileExistsError: ``target`` exists already, on a local disk.
        OSError: the storage refuses, or cannot be reached.
    """
    if is_local(fs):
        link_file(fs._strip_protocol(source), fs._strip_protocol(target))
    else:
        with reaching(fs, target):
            fs.cp_file(source, target)


def remove_quietly(fs: AbstractFileSystem, paths: Iterable[str]) -> None:
    """Delete files that are no longer needed. Files that cannot be deleted stay as garbage."""
    for path in paths:
        # Clients raise more than OSErrors; the committed work is complete all the same.
        with contextlib.suppress(Exception):
            fs.rm_file(path)
            if is_local(fs):
                os.rmdir(os.path.dirname(fs._strip_protocol(path)))  # succeeds only when the folder is empty


def _create_remote(fs: AbstractFileSystem, path: str, document: bytes) -> bool:
    for attempt in range(CONFLICTS):
        try:
            fs.pipe_file(path, document, mode="create")
            return True
        except OSError as error:
            if isinstance(error, FileExistsError) or status_of(error) == 412:
                return _content(fs, path) == document
            if status_of(error) != 409 or attempt == CONFLICTS - 1:
                raise
            time.sleep(0.1 * 2**attempt)  # AWS answers 409 while another conditional request is in progress
    raise AssertionError("the last attempt returns or raises")


def _content(fs: AbstractFileSystem, path: str) -> bytearray:
    content = bytearray(fs.info(path)["size"])
    # Read completely: a short answer must not look like the document of another process.
    read_exactly(fs, path, 0, memoryview(content))
    return content


def _publish_remote(fs: AbstractFileSystem, path: str, pieces: Iterator[memoryview], size: int) -> None:
    """Write a file in parts of ``size`` bytes."""

    @contextlib.contextmanager
    def requesting() -> Iterator[None]:
        with _detecting_removal(path), reaching(fs, path):
            yield

    parts = equal_parts(pieces, size)
    start = next(parts, io.BytesIO())  # outside of requesting: the pieces may come from another storage
    if start.getbuffer().nbytes < size:
        with reaching(fs, path):
            fs.pipe_file(path, start.getvalue())  # a single request is atomic
    elif is_s3(fs):
        upload_in_parts(fs, path, chain([start], parts), size, requesting)
    else:
        _write_through(fs, path, chain([start], parts), requesting)


def _write_through(
    fs: AbstractFileSystem,
    path: str,
    parts: Iterable[io.BytesIO],
    requesting: Callable[[], AbstractContextManager[None]],
) -> None:
    """Write a file through a file object of its client, which sends one part at a time."""
    # Not a with-block: an exception that leaves it would publish the bytes written so far.
    with reaching(fs, path):
        file = fs.open(path, "wb", block_size=BLOCK, autocommit=False)
    try:
        for part in parts:
            with requesting():
                file.write(part.getvalue())
        with requesting():
            file.close()
            file.commit()
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to report
            file.closed = True  # otherwise its finaliser would upload the rest
            file.discard()
        raise


@contextlib.contextmanager
def _detecting_removal(path: str) -> Iterator[None]:
    """Raise ``Removed`` if a file that this process is writing is missing: another process deleted it."""
    try:
        yield
    except FileNotFoundError as error:
        raise Removed(path) from error
