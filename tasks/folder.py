"""A folder of files on any fsspec file system, listed once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from fsspec import AbstractFileSystem

from storage.files import is_local, read_exactly
from storage.unreachable import reaching

# What changes when a file's bytes do, under the names that file systems use for it; the surest first.
VERSION_FIELDS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "modified", "created")


class SourceChanged(OSError):
    """A file that a run reads is not the one that the run began with."""


@dataclass(frozen=True)
class FileState:
    """Size in bytes of a file, and what changes with its content: an ETag, blob id or modification time."""

    size: int
    version: str | int


@dataclass(frozen=True)
class Folder:
    """The files directly inside one folder."""

    fs: AbstractFileSystem
    root: str
    name: str  # for people: never holds credentials
    files: Mapping[str, FileState]
    pinned: bool = False  # one commit of a repository: its files cannot change

    def path(self, name: str) -> str:
        """Path of a file on ``fs``.

        Raises:
            FileNotFoundError: the folder has no such file; a name with a path in it is none.
        """
        if name not in self.files:
            raise FileNotFoundError(
                f"{self.name} has no file {name!r}. Put it back, or run again with the place where it is."
            )
        return f"{self.root}/{name}"

    def require_unchanged(self, name: str) -> None:
        """Look whether a file is still the one that was listed.

        Raises:
            SourceChanged: it has another size, ETag or modification time, or is gone.
        """
        if not self.pinned:
            require_unchanged(self.fs, self.path(name), self.files[name])

    def read(self, name: str) -> bytes:
        """All bytes of a small file.

        Raises:
            SourceChanged: as ``require_unchanged``.
        """
        content = bytearray(self.files[name].size)
        read_exactly(self.fs, self.path(name), 0, memoryview(content))
        self.require_unchanged(name)
        return bytes(content)


def require_unchanged(fs: AbstractFileSystem, path: str, listed: FileState) -> None:
    """Look whether the file at ``path`` is still the one that was ``listed``.

    Raises:
        SourceChanged: it has another size, ETag or modification time, or is gone.
    """
    fs.invalidate_cache(fs._parent(path))
    try:
        with reaching(fs, path):
            entry = fs.info(path)
    except FileNotFoundError as error:
        raise SourceChanged(
            f"{path} is gone since this run began. Put it back and run again, or name the place where it is now."
        ) from error
    found = FileState(entry["size"], file_version(fs, entry))
    if found != listed:
        raise SourceChanged(
            f"{path} has changed since this run began: {listed.size} bytes, version {listed.version}, became "
            f"{found.size} bytes, version {found.version}. Put the original back, or run again: the changed "
            "checkpoint is imported anew, and a run never mixes the two."
        )


def list_folder(fs: AbstractFileSystem, root: str, name: str, pinned: bool = False) -> Folder:
    """List ``root``; ``name`` is what errors call it.

    Args:
        pinned: its files cannot change.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it.
    """
    root = root.rstrip("/")
    fs.invalidate_cache(root)  # a listing that is remembered would hide a changed file
    with reaching(fs, root):
        entries = fs.ls(root, detail=True) if fs.isdir(root) else []
    files = {
        entry["name"].rsplit("/", 1)[-1]: FileState(entry["size"], file_version(fs, entry))
        for entry in entries
        if entry["type"] == "file"
    }
    if not files:
        raise FileNotFoundError(
            f"{name} is not a folder with files in it, so it holds no model. Give a folder with config.json "
            "and *.safetensors, a hub id such as HuggingFaceTB/SmolLM2-135M, a .gguf file, or demo."
        )
    return Folder(fs, root, name, files, pinned)


def file_version(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> str | int:
    """What identifies the content of a listed file, without reading it.

    Raises:
        ValueError: if the file system tells nothing that changes with the content.
    """
    if is_local(fs):
        return os.stat(entry["name"]).st_mtime_ns
    for field in VERSION_FIELDS:
        if (version := entry.get(field)) is not None:
            return str(version.timestamp() if isinstance(version, datetime) else version)
    raise ValueError(
        f"{type(fs).__name__} tells neither an ETag nor a modification time for "
        f"{entry['name'].rsplit('/', 1)[-1]}, so a changed file could not be told from the one that was "
        "imported. Copy the model to a local folder or S3."
    )
