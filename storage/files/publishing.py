"""Making files visible: whole or not at all, and, where it must be decided who was first, only once."""

import contextlib
import os
import threading
import time
from collections.abc import Iterable, Iterator

from fsspec import AbstractFileSystem
from fsspec.implementations.memory import MemoryFileSystem
from xxhash import xxh3_128

from layerwise.storage.files.corrupt import Corrupt, Removed
from layerwise.storage.files.errors import reaching, status_of
from layerwise.storage.files.local_disk import create_file, replace_file
from layerwise.storage.files.reading import is_local, read_exactly
from layerwise.storage.upkeep.inventory import modified

BLOCK = 16 << 20  # bytes of one part of an upload; S3 allows 10,000 parts, so 160 GB a file
SLICE = 8 << 20  # most bytes handed over at once: an upload copies what it is given
CONFLICTS = 6  # attempts of a conditional request: 3 seconds in all

memory_lock = threading.Lock()  # fsspec's memory file system looks first and writes later


def publish(
    fs: AbstractFileSystem, path: str, pieces: Iterable[bytes | memoryview]
) -> tuple[int, str, float]:
    """Write a file from its pieces; it becomes visible when complete, and not at all if anything fails.

    Args:
        pieces: consecutive parts of the content, of any length; consumed once.

    Returns:
        Size in bytes and xxh3_128 digest (32 hex digits) of the content, and the date of the file: seconds since
        1970, by the storage's clock.

    Raises:
        Removed: if another process deleted the file, or the unfinished upload of it, meanwhile.
        Corrupt: if the stored file has another size than what was written.
        OSError: if the disk is full or refuses; see ``reaching`` for those of other storages.
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
        _publish_remote(fs, path, counted())
    fs.invalidate_cache(fs._parent(path))
    with _noticing_removal(path), reaching(fs, path):
        row = fs.info(path)
    if row["size"] != size:
        raise Corrupt(
            f"{path}: {size} bytes were written, but {row['size']} are stored. Check the storage (full? another "
            "writer?) and run again."
        )
    return size, hasher.hexdigest(), modified(fs, row)


def overwrite(fs: AbstractFileSystem, path: str, document: bytes) -> None:
    """Replace a small file; readers see the old content or the new one, never a mixture.

    Other processes may replace or remove it at the same time: what is stored afterwards may be theirs, or nothing.

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
    """Create a small file unless it exists. Of any number of callers exactly one gets True.

    Args:
        document: content, with a token of the caller in it: a storage that lost its first answer says
            "exists" to the repeated request, and only the token tells that this caller was the one.

    Raises:
        ValueError: if ``document`` is empty; such a file is not created exclusively on S3.
        OSError: as for ``publish``, and if the disk has no hard links.
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


def remove_quietly(fs: AbstractFileSystem, paths: Iterable[str]) -> None:
    """Delete files nobody needs any more; what cannot be deleted stays as garbage."""
    for path in paths:
        with contextlib.suppress(Exception):  # whatever it is, the work that was committed before stands
            fs.rm_file(path)
            if is_local(fs):
                os.rmdir(os.path.dirname(fs._strip_protocol(path)))  # only succeeds on the last file


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
            time.sleep(0.1 * 2**attempt)  # AWS answers 409 while another conditional request is under way
    raise AssertionError("the last attempt returns or raises")


def _content(fs: AbstractFileSystem, path: str) -> bytearray:
    content = bytearray(fs.info(path)["size"])
    # In full: a short answer must not look like somebody else's document.
    read_exactly(fs, path, 0, memoryview(content))
    return content


def _publish_remote(fs: AbstractFileSystem, path: str, pieces: Iterator[memoryview]) -> None:
    start = bytearray()
    for piece in pieces:  # not inside reaching: they may come from another storage
        start += piece
        if len(start) > BLOCK:
            break
    else:
        with reaching(fs, path):
            fs.pipe_file(path, bytes(start))  # one request, atomic by itself
        return
    # Not a with-block: leaving one by an exception publishes what was written so far.
    with reaching(fs, path):
        file = fs.open(path, "wb", block_size=BLOCK, autocommit=False)
    try:
        with _noticing_removal(path), reaching(fs, path):
            file.write(start)
        del start
        for piece in pieces:
            with _noticing_removal(path), reaching(fs, path):
                file.write(piece)
        with _noticing_removal(path), reaching(fs, path):
            file.close()
            file.commit()
    except BaseException:
        with contextlib.suppress(Exception):  # the first error is the one to tell
            file.closed = True  # or its finaliser would upload the rest
            file.discard()
        raise


@contextlib.contextmanager
def _noticing_removal(path: str) -> Iterator[None]:
    """Put around requests about a file that this process is writing: it is missing only if somebody deleted it."""
    try:
        yield
    except FileNotFoundError as error:
        raise Removed(path) from error
