"""Location of a store: a file system, and the root folder on it."""

from typing import Any

from layerwise.storage.files.filesystem import is_local, open_filesystem


class StoreLocation:
    """File system and root folder of a store. Code that works on files below the root takes this.

    Args:
        url: a folder or any fsspec URL, such as ``s3://bucket/runs``; credentials come from the environment.
        options: for fsspec, such as ``endpoint_url``.

    Attributes:
        fs: file system of the store.
        root: path of the store on it, without a slash at the end.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.fs, root = open_filesystem(url, **options)
        self.root = root.rstrip("/")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"  # without the options: they may hold a secret

    @property
    def is_local(self) -> bool:
        """Whether the store is on a disk of this machine."""
        return is_local(self.fs)

    def path(self, relative: str) -> str:
        """Return the path on the file system of a path relative to the root."""
        return f"{self.root}/{relative}"

    def relative(self, path: str) -> str:
        """Return a path below the root, as the file system lists it, relative to the root."""
        return path[len(self.root) + 1 :]
