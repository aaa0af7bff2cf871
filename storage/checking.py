"""Whether stored files are what was written: their sizes, and, by reading them through, their digests."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from fsspec import AbstractFileSystem
from xxhash import xxh3_128

from layerwise.storage.artifact import Artifact, StoredFile
from layerwise.storage.damage import Damaged
from layerwise.storage.files.corrupt import Corrupt, Missing
from layerwise.storage.files.errors import reaching
from layerwise.storage.files.reading import PIECE, WINDOW, read_exactly

BUFFER = PIECE * WINDOW  # bytes in memory: as much as is asked for at once
LOOKS_AT_ONCE = 16


def require_sizes(fs: AbstractFileSystem, root: str, files: Iterable[StoredFile]) -> None:
    """Look whether all ``files`` are there with the sizes they were written with.

    Raises:
        Corrupt: if one is not; names it.
        Unreachable: if the storage does not answer.
    """
    with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
        for _ in pool.map(lambda file: require_size(fs, root, file), files):
            pass


def require_whole(fs: AbstractFileSystem, root: str, artifact: Artifact) -> None:
    """Look whether all files of a committed artifact are there with their sizes, without reading them.

    Raises:
        Damaged: if one is not.
        Unreachable: if the storage does not answer.
    """
    try:
        require_sizes(fs, root, artifact.files.values())
    except Corrupt as error:
        raise Damaged(f"{artifact.key} is damaged: {error}.", artifact.key, artifact.token) from error


def require_content(
    fs: AbstractFileSystem, root: str, file: StoredFile, count: Callable[[int], None] = lambda size: None
) -> None:
    """Read ``file`` through, in pieces, and compare its size and digest with those it was written with.

    Args:
        count: called with the size of every piece that was read.

    Raises:
        Corrupt: if it is missing or another, twice in a row; names it.
        Unreachable: if the storage does not answer.
    """
    require_size(fs, root, file)
    path = f"{root}/{file.path}"
    for _ in range(2):  # bits flip on the way, too
        found = _digest(fs, path, file.size, count)
        if found == file.digest:
            return
    raise Corrupt(f"{path} has digest {found}, but {file.digest} was recorded, twice in a row")


def require_size(fs: AbstractFileSystem, root: str, file: StoredFile) -> None:
    """Look whether ``file`` is there with the size it was written with.

    Raises:
        Missing: if it is not there.
        Corrupt: if it has another size; names it.
        Unreachable: if the storage does not answer.
    """
    path = f"{root}/{file.path}"
    try:
        with reaching(fs, path):
            size = fs.info(path)["size"]
    except FileNotFoundError as error:
        raise Missing(path) from error
    if size != file.size:
        raise Corrupt(f"{path} has {size} bytes, but {file.size} were written")


def _digest(fs: AbstractFileSystem, path: str, size: int, count: Callable[[int], None]) -> str:
    hasher, buffer = xxh3_128(), memoryview(bytearray(min(size, BUFFER)))
    for start in range(0, size, BUFFER):
        piece = buffer[: min(BUFFER, size - start)]
        read_exactly(fs, path, start, piece)
        hasher.update(piece)
        count(len(piece))
    return hasher.hexdigest()
