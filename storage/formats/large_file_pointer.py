"""Pointers that Git LFS leaves in place of large files: a few lines of text that stand for the content."""

from collections.abc import Mapping

from fsspec import AbstractFileSystem

from layerwise.storage.files.reading import read_blocks

BEGINNING = b"version https://git-lfs.github.com/spec/"
LONGEST = 1024  # bytes: by its specification a pointer is shorter


def refuse_pointer(start: bytes | bytearray, name: str) -> None:
    """Refuse a file whose content is still on a Git LFS server.

    Args:
        start: the first bytes of the file.
        name: what the error calls it.

    Raises:
        ValueError: if it is a pointer.
    """
    if start.startswith(BEGINNING):
        raise ValueError(
            f"{name} is a Git LFS pointer, not the file itself: the repository was cloned without its large "
            "files. Run `git lfs install` and `git lfs pull` in it, or download a repository of the Hugging "
            "Face Hub with `hf download OWNER/NAME --local-dir FOLDER`."
        )


def refuse_pointers(fs: AbstractFileSystem, sizes: Mapping[str, int], names: Mapping[str, str]) -> None:
    """Refuse files that are Git LFS pointers; only those small enough to be one are read.

    Args:
        sizes: by path.
        names: what errors call them, by path.

    Raises:
        ValueError: for the first pointer, by name.
    """
    small = {path: bytearray(size) for path, size in sizes.items() if len(BEGINNING) < size < LONGEST}
    read_blocks(fs, {path: [(0, memoryview(content))] for path, content in small.items()})
    for path in sorted(small, key=names.__getitem__):
        refuse_pointer(small[path], names[path])
