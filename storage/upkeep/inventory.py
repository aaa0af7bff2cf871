"""What lies in a store: one listing, every file with what its place says it is."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import reaching
from layerwise.storage.stage import STAGE_NAME

_ID = "[0-9a-f]{32}"
_DOCUMENT = r"(?:manifest|progress)\.json"
_TEMPORARY = re.compile(rf".*\.{_ID}\.tmp")
STAGE_FILE = re.compile(rf"(?P<key>{STAGE_NAME.pattern}/{_ID})/(?P<name>.+)")
ATTEMPT_FILE = re.compile(rf"(?P<attempt>{_ID})/.+")
_SET_ASIDE = re.compile(rf"{_DOCUMENT}\.damaged-[0-9a-f]+")
_DOCUMENT_TEMPORARY = re.compile(rf"{_DOCUMENT}(?:\.damaged-[0-9a-f]+)?\.{_ID}\.tmp")
RUNNING_FILE = re.compile(rf"running/{_ID}\.json")
_LOOSE_TEMPORARY = re.compile(rf"{_ID}\.clock|probe-{_ID}(?:\.{_ID}\.tmp)?|running/{_ID}\.json\.{_ID}\.tmp")
MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")  # by file system


@dataclass(frozen=True)
class Entry:
    """A file as the storage lists it.

    Args:
        path: relative to the store's root.
        size: in bytes.
        modified: by the storage's clock, in seconds since 1970.
    """

    path: str
    size: int
    modified: float

    @property
    def is_temporary(self) -> bool:
        """Whether it was being written when its writer died, or is so now."""
        return _TEMPORARY.fullmatch(self.path) is not None


@dataclass
class StageFolder:
    """Everything in ``<stage name>/<digest>``: an artifact, what remains of attempts at it, or both."""

    key: str
    manifest: Entry | None = None
    progress: Entry | None = None
    set_aside: list[Entry] = field(default_factory=list)
    temporary: list[Entry] = field(default_factory=list)  # beside the attempts; theirs are among their files
    attempts: dict[str, list[Entry]] = field(default_factory=dict)

    def entries(self) -> Iterable[Entry]:
        """All files."""
        yield from (entry for entry in (self.manifest, self.progress) if entry is not None)
        yield from self.set_aside
        yield from self.temporary
        for files in self.attempts.values():
            yield from files

    @property
    def newest(self) -> float:
        """When anything in it was modified last."""
        return max(entry.modified for entry in self.entries())


@dataclass
class Inventory:
    """All files of a store by their place.

    Attributes:
        folders: by key, whether or not an artifact was committed there.
        running: files of ``layerwise.storage.upkeep.signs_of_life``.
        temporary: files outside of the folders that are of use only while they are being written.
        not_ours: paths, relative to the root, that this program has never written.
    """

    folders: dict[str, StageFolder] = field(default_factory=dict)
    running: list[Entry] = field(default_factory=list)
    temporary: list[Entry] = field(default_factory=list)
    not_ours: list[str] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Put a file to those of its kind."""
        if RUNNING_FILE.fullmatch(entry.path):
            self.running.append(entry)
        elif is_temporary(entry.path):
            self.temporary.append(entry)
        elif not (
            (match := STAGE_FILE.fullmatch(entry.path)) and self._add_to_folder(entry, **match.groupdict())
        ):
            self.not_ours.append(entry.path)

    def _add_to_folder(self, entry: Entry, key: str, name: str) -> bool:
        folder = self.folders.get(key) or StageFolder(key)
        if name == "manifest.json":
            folder.manifest = entry
        elif name == "progress.json":
            folder.progress = entry
        elif _SET_ASIDE.fullmatch(name):
            folder.set_aside.append(entry)
        elif _DOCUMENT_TEMPORARY.fullmatch(name):
            folder.temporary.append(entry)
        elif match := ATTEMPT_FILE.fullmatch(name):
            folder.attempts.setdefault(match["attempt"], []).append(entry)
        else:
            return False
        self.folders[key] = folder
        return True


def is_temporary(path: str) -> bool:
    """Whether a file outside of the stages' folders is ours, and of use only while it is being written."""
    return _LOOSE_TEMPORARY.fullmatch(path) is not None


def take_inventory(fs: AbstractFileSystem, root: str) -> Inventory:
    """List a store, once and recursively; links and special files on a local disk are not ours.

    Raises:
        OSError: if the storage cannot be reached.
    """
    inventory = Inventory()
    with reaching(fs, root):
        rows = fs.find(root, detail=True)
    for name, row in rows.items():
        path = name[len(root) + 1 :]
        if row["type"] == "directory":
            continue  # an empty store on SeaweedFS
        if row["type"] == "file" and not row.get("islink"):
            inventory.add(Entry(path, int(row["size"]), modified(fs, row)))
        else:
            inventory.not_ours.append(path)
    return inventory


def modified(fs: AbstractFileSystem, row: dict[str, Any]) -> float:
    """When a listed file was modified, by the storage's clock, in seconds since 1970."""
    for name in MODIFIED:
        value = row.get(name)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, datetime):
            return value.timestamp()
    return fs.modified(row["name"]).timestamp()
