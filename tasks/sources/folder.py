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
    """The files directly inside one folder, and in the sub-folders that were asked for.

    Attributes:
        name: name for messages; never contains credentials.
        files: by name; those of sub-folders as ``subfolder/file``.
        pinned: the files cannot change, such as those of one commit of a repository.
        broken: links without a target, by name.
    """

    fs: AbstractFileSystem
    root: str
    name: str
    files: Mapping[str, FileState]
    pinned: bool = False
    broken: Mapping[str, BrokenLink] = field(default_factory=dict)

    def path(self, name: str) -> str:
        """Return the path of a file on ``fs``.

        Raises:
            FileNotFoundError: the folder has no such file. Names such as ``../x`` are never found.
            BrokenLink: the file is a link without a target.
        """
        if name in self.broken:
            raise self.broken[name]
        if name not in self.files:
            raise FileNotFoundError(
                f"{self.name} has no file {name!r}. Restore it, or run again with the folder that has it."
            )
        return f"{self.root}/{name}"

    def require_unchanged(self, name: str, bytes_are_checked: bool = False) -> None:
        """Check that a file has not changed since the folder was listed.

        Args:
            bytes_are_checked: set this if the bytes are compared with digests when they are read.

        Raises:
            SourceChanged: the file has another size, ETag or time of change, or no longer exists.
        """
        if not self.pinned:
            require_unchanged(self.fs, self.path(name), self.files[name], bytes_are_checked)

    def read(self, name: str) -> bytes:
        """Return all bytes of a small file.

        Raises:
            SourceChanged: see ``require_unchanged``.
        """
        content = bytearray(self.files[name].size)
        read_exactly(self.fs, self.path(name), 0, memoryview(content))
        self.require_unchanged(name)
        return bytes(content)


def list_folder(
    fs: AbstractFileSystem, root: str, name: str, pinned: bool = False, subfolders: Sequence[str] = ()
) -> Folder:
    """List the folder ``root``. Links are followed.

    Args:
        name: name of the folder for messages.
        pinned: the files cannot change.
        subfolders: names of sub-folders whose files are listed too, as ``subfolder/file``.

    Raises:
        FileNotFoundError: there is no such folder, or it is empty.
        BrokenLink: the folder itself is a link without a target.
    """
    root = root.rstrip("/")
    require_target(fs, root)
    fs.invalidate_cache(root)  # a cached listing would hide a changed file
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
            f"{name} is not a folder, or it is empty. Give a folder with config.json "
            "and *.safetensors, a hub id such as HuggingFaceTB/SmolLM2-135M, a .gguf file, or demo."
        )
    return Folder(fs, root, name, files, pinned, broken)
