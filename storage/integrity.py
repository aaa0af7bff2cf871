"""Integrity of stored files: compare their sizes, and by reading them their digests, with what was written."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from fsspec import AbstractFileSystem
from xxhash import xxh3_128

from layerwise.storage.artifact import Artifact, Damaged, StoredFile
from layerwise.storage.files.errors import Corrupt, Missing, reaching
from layerwise.storage.files.reading import read_ahead
from layerwise.storage.location import StoreLocation

CONCURRENT_REQUESTS = 16


def require_sizes(store: StoreLocation, files: Iterable[StoredFile]) -> None:
    """Check that all ``files`` exist with the sizes they were written with.

    Raises:
        Corrupt: a file is missing or has another size; names it.
        Unreachable: the storage does not answer.
    """
    with ThreadPoolExecutor(CONCURRENT_REQUESTS) as pool:
        for _ in pool.map(lambda file: require_size(store, file), files):
            pass


def require_whole(store: StoreLocation, artifact: Artifact) -> None:
    """Check that all files of a committed artifact exist with their sizes, without reading them.

    Raises:
        Damaged: a file is missing or has another size.
        Unreachable: the storage does not answer.
    """
    try:
        require_sizes(store, artifact.files.values())
    except Corrupt as error:
        raise Damaged(f"{artifact.key} is damaged: {error}.", artifact.key, artifact.token) from error


def require_content(
    store: StoreLocation, file: StoredFile, count: Callable[[int], None] = lambda size: None
) -> None:
    """Read ``file`` in pieces, and compare its size and digest with those it was written with.

    Args:
        count: called with the size of every piece that was read, in bytes.

    Raises:
        Corrupt: the file is missing, or differs twice in a row; names it.
        Unreachable: the storage does not answer.
    """
    require_size(store, file)
    path = store.path(file.path)
    for _ in range(2):  # bits can also flip in transit
        found = _digest(store.fs, path, file.size, count)
        if found == file.digest:
            return
    raise Corrupt(f"{path} has digest {found}, but {file.digest} was recorded, twice in a row")


def require_size(store: StoreLocation, file: StoredFile) -> None:
    """Check that ``file`` exists with the size it was written with.

    Raises:
        Missing: the file does not exist.
        Corrupt: it has another size; names it.
        Unreachable: the storage does not answer.
    """
    path = store.path(file.path)
    try:
        with reaching(store.fs, path):
            size = store.fs.info(path)["size"]
    except FileNotFoundError as error:
        raise Missing(path) from error
    if size != file.size:
        raise Corrupt(f"{path} has {size} bytes, but {file.size} were written")


def _digest(fs: AbstractFileSystem, path: str, size: int, count: Callable[[int], None]) -> str:
    hasher = xxh3_128()
    for piece in read_ahead(fs, [(path, 0, size)]):
        hasher.update(piece)
        count(len(piece))
    return hasher.hexdigest()
