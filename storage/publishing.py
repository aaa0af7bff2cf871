"""Making files visible: whole or not at all, and, where it must be decided who was first, only once."""

import contextlib
import errno
import os
import threading
import time
import uuid
from collections.abc import Iterable, Iterator

from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from xxhash import xxh3_128

from storage.files import Corrupt, is_local

BLOCK = 16 << 20  # bytes of one part of an upload; S3 allows 10,000 parts, so 160 GB a file
SLICE = 8 << 20  # most bytes handed over at once: an upload copies what it is given
CONFLICTS = 6  # attempts of a conditional request: 3 seconds in all
NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)

memory_lock = threading.Lock()  # fsspec's memory file system looks first and writes later


def publish(fs: AbstractFileSystem, path: str, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write a file from its pieces; it becomes visible when complete, and not at all if anything fails.

    Args:
        pieces: consecutive parts of the content, of any length; consumed once.

    Returns:
        Size in bytes and xxh3_128 digest (32 hex digits) of the content.

    Raises:
        Corrupt: if the stored file has another size than what was written.
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
        _publish_local(fs._strip_protocol(path), counted())
    elif isinstance(fs, MemoryFileSystem):
        fs.pipe_file(path, b"".join(counted()))
    else:
        _publish_remote(fs, path, counted())
    fs.invalidate_cache(fs._parent(path))
    stored = fs.info(path)["size"]
    if stored != size:
        raise Corrupt(
            f"{path}: {size} bytes were written, but {stored} are stored. Check the storage (full? another "
            "writer?) and run again."
        )
    return size, hasher.hexdigest()


def overwrite(fs: AbstractFileSystem, path: str, document: bytes) -> None:
    """Replace a small file; readers see the old content or the new one, never a mixture."""
    publish(fs, path, [document])


def create_once(fs: AbstractFileSystem, path: str, document: bytes) -> bool:
    """Create a small file unless it exists. Of any number of callers exactly one gets True.

    Args:
        document: content, with a token of the caller in it: a storage that lost its first answer says
            "exists" to the repeated request, and only the token tells that this caller was the one.

    Raises:
        ValueError: if ``document`` is empty; such a file is not created exclusively on S3.
    """
    if not document:
        raise ValueError(f"{path}: an empty file cannot be created exclusively. Put a unique token into it.")
    if is_local(fs):
        return _create_local(fs._strip_protocol(path), document)
    if isinstance(fs, MemoryFileSystem):
        with memory_lock:
            if fs.exists(path):
                return False
            fs.pipe_file(path, document)
            return True
    for attempt in range(CONFLICTS):
        try:
            fs.pipe_file(path, document, mode="create")
            return True
        except OSError as error:
            if _already_exists(error):
                return bytes(fs.cat_file(path)) == document
            if _status(error) != 409 or attempt == CONFLICTS - 1:
                raise
            time.sleep(0.1 * 2**attempt)  # AWS answers 409 while another conditional request is under way
    raise AssertionError("the last attempt returns or raises")


def remove_quietly(fs: AbstractFileSystem, paths: Iterable[str]) -> None:
    """Delete files nobody needs any more; what cannot be deleted stays as garbage."""
    for path in paths:
        with contextlib.suppress(Exception):  # whatever it is, the work that was committed before stands
            fs.rm_file(path)
            if is_local(fs):
                os.rmdir(os.path.dirname(fs._strip_protocol(path)))  # only succeeds on the last file


def _publish_local(path: str, pieces: Iterable[memoryview]) -> None:
    temporary = _write_beside(path, pieces)
    try:
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _sync_directory(os.path.dirname(path))


def _create_local(path: str, document: bytes) -> bool:
    temporary = _write_beside(path, [memoryview(document)])
    try:
        os.link(temporary, path)  # fails if path exists; a rename would replace it
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_HARD_LINKS:
            raise
        raise OSError(
            error.errno,
            f"{path} cannot be created exclusively: this file system has no hard links ({error.strerror}). "
            "Put the store on a local disk, a network disk with hard links, or object storage.",
        ) from error
    finally:
        os.unlink(temporary)
    _sync_directory(os.path.dirname(path))
    return True


def _write_beside(path: str, pieces: Iterable[memoryview]) -> str:
    """Write a temporary file to disk in the folder of ``path``: only there is a rename atomic."""
    _make_directory(os.path.dirname(path))
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    return temporary


def _make_directory(path: str) -> None:
    """Create a folder and its parents so that they survive a loss of power."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    _make_directory(parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    _sync_directory(parent)


def _sync_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish_remote(fs: AbstractFileSystem, path: str, pieces: Iterator[memoryview]) -> None:
    start = bytearray()
    for piece in pieces:
        start += piece
        if len(start) > BLOCK:
            break
    else:
        fs.pipe_file(path, bytes(start))  # one request, atomic by itself
        return
    # Not a with-block: leaving one by an exception publishes what was written so far.
    file = fs.open(path, "wb", block_size=BLOCK, autocommit=False)
    try:
        file.write(start)
        del start
        for piece in pieces:
            file.write(piece)
        file.close()
        file.commit()
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            file.closed = True  # or its finaliser would upload the rest
            file.discard()
        raise


def _already_exists(error: OSError) -> bool:
    # s3fs turns "412 precondition failed" into an OSError(EINVAL), on Ceph without a text.
    return isinstance(error, FileExistsError) or _status(error) == 412


def _status(error: OSError) -> int | None:
    """The HTTP status behind an error of s3fs."""
    response = getattr(error.__cause__, "response", None) or {}
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
