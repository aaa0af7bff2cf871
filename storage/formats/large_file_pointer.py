"""Git LFS pointers: a few lines of text in place of a large file."""

from collections.abc import Mapping

from fsspec import AbstractFileSystem

from layerwise.storage.files.reading import read_blocks

BEGINNING = b"version https://git-lfs.github.com/spec/"
MAX_BYTES = 1024  # the specification requires pointers to be shorter


def refuse_pointer(start: bytes | bytearray, name: str) -> None:
    """Refuse a file that is a Git LFS pointer: its content is still on a server.

    Args:
        start: the first bytes of the file.
        name: of the file, for the error message.

    Raises:
        ValueError: the file is a pointer.
    """
    if start.startswith(BEGINNING):
        raise ValueError(
            f"{name} is a Git LFS pointer, not the file itself: the repository was cloned without its large "
            "files. Run `git lfs install` and `git lfs pull` in it, or download a repository of the Hugging "
            "Face Hub with `hf download OWNER/NAME --local-dir FOLDER`."
        )


def refuse_pointers(fs: AbstractFileSystem, sizes: Mapping[str, int], names: Mapping[str, str]) -> None:
    """Refuse files that are Git LFS pointers. Reads only the files that are small enough to be one.

    Args:
        sizes: of the files in bytes, by path.
        names: of the files for the error message, by path.

    Raises:
        ValueError: for the first pointer, sorted by name.
    """
    small = {path: bytearray(size) for path, size in sizes.items() if len(BEGINNING) < size < MAX_BYTES}
    read_blocks(fs, {path: [(0, memoryview(content))] for path, content in small.items()})
    for path in sorted(small, key=names.__getitem__):
        refuse_pointer(small[path], names[path])
