"""Inventory of a store: one listing, with every file classified by its path."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from layerwise.storage.artifact import MANIFEST
from layerwise.storage.files.errors import reaching
from layerwise.storage.files.filesystem import modified
from layerwise.storage.location import StoreLocation
from layerwise.storage.resume_points import RESUME_POINT_FILE
from layerwise.storage.stage import STAGE_NAME

_ID = "[0-9a-f]{32}"
_DOCUMENT = rf"(?:{re.escape(MANIFEST)}|{re.escape(RESUME_POINT_FILE)})"
_TEMPORARY = re.compile(rf".*\.{_ID}\.tmp")
STAGE_FILE = re.compile(rf"(?P<key>{STAGE_NAME.pattern}/{_ID})/(?P<name>.+)")
ATTEMPT_FILE = re.compile(rf"(?P<attempt>{_ID})/.+")
_SET_ASIDE = re.compile(rf"{_DOCUMENT}\.damaged-[0-9a-f]+")
_DOCUMENT_TEMPORARY = re.compile(rf"{_DOCUMENT}(?:\.damaged-[0-9a-f]+)?\.{_ID}\.tmp")
RUNNING_FILE = re.compile(rf"running/{_ID}\.json")
# Parts of searches for workers, see ``layerwise.flows.fan_out.published_parts``.
PART_FILE = re.compile(rf"parts/(?P<part>{_ID})(?:\.(?P<news>claim|end))?\.json")
_LOOSE_TEMPORARY = re.compile(
    rf"{_ID}\.clock|probe-{_ID}(?:\.{_ID}\.tmp)?|(?:running|parts)/{_ID}(?:\.\w+)?\.json\.{_ID}\.tmp"
)


@dataclass(frozen=True)
class Entry:
    """A file as the storage lists it.

    Attributes:
        path: relative to the store's root.
        size: in bytes.
        modified: by the storage's clock, in seconds since 1970.
    """

    path: str
    size: int
    modified: float

    @property
    def is_temporary(self) -> bool:
        """Whether the file is being written, or was when its writer died."""
        return _TEMPORARY.fullmatch(self.path) is not None


@dataclass
class StageFolder:
    """All files in ``<stage name>/<digest>``: an artifact, remains of attempts at it, or both.

    Attributes:
        set_aside: manifests that were set aside.
        temporary: temporary files of the documents; those of an attempt are among its files.
        attempts: files of each attempt, by its folder's name.
    """

    key: str
    manifest: Entry | None = None
    resume_point: Entry | None = None
    set_aside: list[Entry] = field(default_factory=list)
    temporary: list[Entry] = field(default_factory=list)
    attempts: dict[str, list[Entry]] = field(default_factory=dict)

    def entries(self) -> Iterable[Entry]:
        """Yield all files."""
        yield from (entry for entry in (self.manifest, self.resume_point) if entry is not None)
        yield from self.set_aside
        yield from self.temporary
        for files in self.attempts.values():
            yield from files

    @property
    def newest(self) -> float:
        """Time of the latest modification of any file."""
        return max(entry.modified for entry in self.entries())


@dataclass
class Inventory:
    """All files of a store, classified by their paths.

    Attributes:
        folders: stage folders by key, with or without a committed artifact.
        running: files of ``layerwise.storage.signs_of_life``.
        parts: files of each part of a search that was published for workers, by the part's name.
        temporary: files outside of the stage folders that are needed only while they are being written.
        not_ours: paths, relative to the root, that this program has never written.
    """

    folders: dict[str, StageFolder] = field(default_factory=dict)
    running: list[Entry] = field(default_factory=list)
    parts: dict[str, list[Entry]] = field(default_factory=dict)
    temporary: list[Entry] = field(default_factory=list)
    not_ours: list[str] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Add a file to its class."""
        if RUNNING_FILE.fullmatch(entry.path):
            self.running.append(entry)
        elif part := PART_FILE.fullmatch(entry.path):
            self.parts.setdefault(part["part"], []).append(entry)
        elif is_temporary(entry.path):
            self.temporary.append(entry)
        elif not (
            (match := STAGE_FILE.fullmatch(entry.path)) and self._add_to_folder(entry, **match.groupdict())
        ):
            self.not_ours.append(entry.path)

    def _add_to_folder(self, entry: Entry, key: str, name: str) -> bool:
        folder = self.folders.get(key) or StageFolder(key)
        if name == MANIFEST:
            folder.manifest = entry
        elif name == RESUME_POINT_FILE:
            folder.resume_point = entry
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
    """Return whether a file outside of the stage folders is one of ours that is needed only while it is written."""
    return _LOOSE_TEMPORARY.fullmatch(path) is not None


def take_inventory(store: StoreLocation) -> Inventory:
    """List a store once, recursively. Links and special files on a local disk are not ours.

    Raises:
        OSError: the storage cannot be reached.
    """
    inventory = Inventory()
    with reaching(store.fs, store.root):
        rows = store.fs.find(store.root, detail=True)
    for name, row in rows.items():
        path = store.relative(name)
        if row["type"] == "directory":
            continue  # an empty store on SeaweedFS
        if row["type"] == "file" and not row.get("islink"):
            inventory.add(Entry(path, int(row["size"]), modified(store.fs, row)))
        else:
            inventory.not_ours.append(path)
    return inventory
