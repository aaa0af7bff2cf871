"""Check of a storage: exclusive creation, and the rates of writing and reading, with a temporary file."""

import contextlib
import os
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.files.filesystem import is_local
from layerwise.storage.files.local_disk import drop_from_cache
from layerwise.storage.files.publishing import publish, require_exclusive_creation
from layerwise.storage.files.reading import read_exactly

PROBED = 32 << 20  # bytes of the file: several parts of an upload


@dataclass(frozen=True)
class StorageRates:
    """Bytes per second, including the requests that begin and end a transfer."""

    written: float
    read: float


def measure_storage(fs: AbstractFileSystem, folder: str) -> StorageRates:
    """Check that ``folder`` can be a store, and measure its rates.

    The file, and the folders that did not exist, are removed, also after an error. Ctrl-C takes effect after that. If the
    process is killed, one file ``probe-<32 hex>`` stays, which garbage collection removes.

    Raises:
        Corrupt: other bytes were read than were written.
        OSError: the storage cannot be written or read, or does not create files exclusively.
    """
    # Ctrl-C reaches the main thread only. There it would end the wait for a request but not the request, which could
    # create the file after its deletion.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_measure, fs, folder).result()


def _measure(fs: AbstractFileSystem, folder: str) -> StorageRates:
    missing = _missing_folders(fs, folder)
    try:
        require_exclusive_creation(fs, folder)
        return _rates(fs, f"{folder}/probe-{uuid.uuid4().hex}")
    finally:
        for each in missing:
            with contextlib.suppress(OSError):  # another process uses it in the meantime
                os.rmdir(each)


def _rates(fs: AbstractFileSystem, path: str) -> StorageRates:
    content, received = os.urandom(PROBED), bytearray(PROBED)  # a disk may compress other content
    try:
        began = time.perf_counter()
        publish(fs, path, [content], PROBED)
        written = time.perf_counter() - began
        if is_local(fs):
            drop_from_cache(path, 0, PROBED)
        began = time.perf_counter()
        read_exactly(fs, path, 0, memoryview(received))
        read = time.perf_counter() - began
    finally:
        with contextlib.suppress(Exception):  # an earlier error is more important than the file
            fs.rm_file(path)
    if received != content:
        raise Corrupt(
            f"{path} was read with other bytes than were written. Check the storage and the network."
        )
    return StorageRates(PROBED / written, PROBED / read)


def _missing_folders(fs: AbstractFileSystem, folder: str) -> list[str]:
    """Return the folder and its parents that do not exist, innermost first; none on a storage without folders."""
    missing = []
    while is_local(fs) and not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    return missing
