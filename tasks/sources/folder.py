"""A folder of files on any fsspec file system, listed once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import reaching
from layerwise.storage.files.reading import read_exactly
from layerwise.tasks.sources.file_identity import (
    BrokenLink,
    FileState,
    require_target,
    require_unchanged,
    resolve_link,
    state_of_entry,
)


@dataclass(frozen=True)
class Folder:
    """The files directly inside one folder, and in those of its sub-folders that matter."""

    fs: AbstractFileSystem
    root: str
    name: str  # for people: never holds credentials
    files: Mapping[str, FileState]
    pinned: bool = False  # one commit of a repository: its files cannot change
    broken: Mapping[str, BrokenLink] = field(default_factory=dict)  # links that lead to nothing

    def path(self, name: str) -> str:
        """Path of a file on ``fs``.

        Raises:
            FileNotFoundError: the folder has no such file; a name with a path in it is none.
            BrokenLink: it is a link that leads to nothing.
        """
        if name in self.broken:
            raise self.broken[name]
        if name not in self.files:
            raise FileNotFoundError(
                f"{self.name} has no file {name!r}. Put it back, or run again with the place where it is."
            )
        return f"{self.root}/{name}"

    def require_unchanged(self, name: str, bytes_are_checked: bool = False) -> None:
        """Look whether a file is still the one that was listed.

        Args:
            bytes_are_checked: whether what is read of it is compared with digests.

        Raises:
            SourceChanged: it has another size, ETag or time of change, or is gone.
        """
        if not self.pinned:
            require_unchanged(self.fs, self.path(name), self.files[name], bytes_are_checked)

    def read(self, name: str) -> bytes:
        """All bytes of a small file.

        Raises:
            SourceChanged: as ``require_unchanged``.
        """
        content = bytearray(self.files[name].size)
        read_exactly(self.fs, self.path(name), 0, memoryview(content))
        self.require_unchanged(name)
        return bytes(content)


def list_folder(
    fs: AbstractFileSystem, root: str, name: str, pinned: bool = False, subfolders: Sequence[str] = ()
) -> Folder:
    """List ``root``; ``name`` is what errors call it. Links are followed.

    Args:
        pinned: its files cannot change.
        subfolders: names of folders in it whose files are listed, too, as ``subfolder/file``.

    Raises:
        FileNotFoundError: if there is no such folder, or nothing in it.
        BrokenLink: if the folder itself is a link that leads to nothing.
    """
    root = root.rstrip("/")
    require_target(fs, root)
    fs.invalidate_cache(root)  # a listing that is remembered would hide a changed file
    files: dict[str, FileState] = {}
    broken: dict[str, BrokenLink] = {}
    todo = [""]
    while todo:
        below = todo.pop(0)
        with reaching(fs, root):
            entries = fs.ls(f"{root}/{below}".rstrip("/"), detail=True) if below or fs.isdir(root) else []
        for listed in entries:
            file = below + listed["name"].rsplit("/", 1)[-1]
            try:
                entry = resolve_link(fs, listed)
                if entry["type"] == "file":
                    files[file] = state_of_entry(fs, entry)
                elif entry["type"] == "directory" and file in subfolders:
                    todo.append(f"{file}/")
            except BrokenLink as error:
                broken[file] = error
    if not files and not broken:
        raise FileNotFoundError(
            f"{name} is not a folder with files in it, so it holds no model. Give a folder with config.json "
            "and *.safetensors, a hub id such as HuggingFaceTB/SmolLM2-135M, a .gguf file, or demo."
        )
    return Folder(fs, root, name, files, pinned, broken)
