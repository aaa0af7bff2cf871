"""Copies of an artifact outside the store: one folder, for programs that know no manifest."""

from collections.abc import Iterator

from xxhash import xxh3_128

from storage.artifact import Artifact
from storage.files import Corrupt, open_filesystem, read_exactly
from storage.publishing import SLICE, publish
from storage.store import ArtifactStore


def copy_files(store: ArtifactStore, artifact: Artifact, destination: str) -> None:
    """Copy every file of ``artifact`` to a folder; each is checked before it becomes visible there.

    Files that are already there are replaced, other files stay. Memory is 8 MB whatever the size.

    Args:
        destination: a folder or any fsspec URL.

    Raises:
        Corrupt: if a file is missing or not what was written; files copied before it remain.
    """
    fs, root = open_filesystem(destination)
    for name in sorted(artifact.files):
        with store.naming_missing_files(artifact, name):
            publish(fs, f"{root}/{name}", _checked_pieces(store, artifact, name))


def _checked_pieces(store: ArtifactStore, artifact: Artifact, name: str) -> Iterator[memoryview]:
    file, hasher = store.file(artifact, name), xxh3_128()
    for start in range(0, file.size, SLICE):
        piece = memoryview(bytearray(min(SLICE, file.size - start)))
        read_exactly(store.fs, f"{store.root}/{file.path}", start, piece)
        hasher.update(piece)
        yield piece
    if hasher.hexdigest() != file.digest:  # raised inside publish, which then publishes nothing
        raise Corrupt(
            f"{artifact.key}: {name!r} ({store.root}/{file.path}) has digest {hasher.hexdigest()}, but "
            f"{file.digest} was recorded: it was damaged or replaced. Delete the manifest and run again."
        )
