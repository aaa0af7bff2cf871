"""Reachability: the files of a stage folder that its manifest names or, without a manifest, its resume point."""

from collections.abc import Iterable
from dataclasses import dataclass

from layerwise.storage.artifact import Artifact, StoredFile, files_from_json
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.formats.document import read_sealed
from layerwise.storage.inventory import Entry
from layerwise.storage.resume_points import ResumePoint, read_resume_point
from layerwise.storage.store import ArtifactStore


@dataclass(frozen=True)
class Documents:
    """Manifest and resume point of a stage folder.

    Attributes:
        artifact: None if there is no manifest.
        resume_point: None if there is none, or if it is damaged next to an intact manifest.
        problem: why the files in use are unknown; "" if they are known.
    """

    artifact: Artifact | None = None
    resume_point: ResumePoint | None = None
    problem: str = ""

    @property
    def files_of_resume_point(self) -> set[str]:
        """Paths of all files that the resume point names."""
        return set() if self.resume_point is None else paths_of(self.resume_point.all_files)

    @property
    def in_use(self) -> set[str]:
        """Paths of files that must stay. Once there is a manifest, those of the resume point are not needed."""
        if self.artifact is not None:
            return paths_of(self.artifact.files.values())
        return self.files_of_resume_point


def read_documents(store: ArtifactStore, key: str) -> Documents:
    """Read the manifest and the resume point of a stage folder.

    Raises:
        OSError: the storage cannot be reached.
    """
    # The resume point first: it is deleted after the manifest is created, so at least one of them is seen.
    resume_point, damage = None, ""
    try:
        resume_point = read_resume_point(store, key)
    except Corrupt as error:
        damage = str(error)
    try:
        return Documents(store.get(key), resume_point)
    except KeyError:
        return Documents(None, resume_point, damage)
    except Corrupt as error:
        return Documents(None, resume_point, str(error))


def files_set_aside(store: ArtifactStore, key: str, entries: Iterable[Entry]) -> set[str]:
    """Return the paths that set-aside manifests named. Manifests that are themselves damaged are left out.

    Args:
        key: of the stage folder.
        entries: the manifests that were set aside.
    """
    named: set[str] = set()
    for entry in entries:
        try:
            content = read_sealed(store.fs, store.path(entry.path))
            named |= paths_of(files_from_json(content["files"], key).values())
        except (FileNotFoundError, Corrupt, ValueError, TypeError, KeyError, AttributeError):
            continue  # their files are counted as those of abandoned attempts
    return named


def paths_of(files: Iterable[StoredFile]) -> set[str]:
    """Return the paths of files, relative to the store's root."""
    return {file.path for file in files}
