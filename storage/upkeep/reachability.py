"""Which files of a stage folder are in use: what its manifest names, or, before there is one, its resume point."""

from collections.abc import Iterable
from dataclasses import dataclass

from layerwise.storage.artifact import Artifact, StoredFile, files_from_json
from layerwise.storage.files.corrupt import Corrupt
from layerwise.storage.formats.document import read_sealed
from layerwise.storage.resume_points import Progress, read_progress
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.inventory import Entry


@dataclass(frozen=True)
class Documents:
    """What is committed in a stage folder.

    Args:
        artifact: None if there is no manifest.
        progress: None if there is no resume point, or one that cannot be used beside a manifest that can.
        problem: why it is not known what is in use; "" if it is.
    """

    artifact: Artifact | None = None
    progress: Progress | None = None
    problem: str = ""

    @property
    def files_of_progress(self) -> set[str]:
        """Paths of all files the resume point names."""
        return set() if self.progress is None else paths_of(self.progress.all_files)

    @property
    def in_use(self) -> set[str]:
        """Paths that must stay; those of the resume point are of no use once there is a manifest."""
        if self.artifact is not None:
            return paths_of(self.artifact.files.values())
        return self.files_of_progress


def read_documents(store: ArtifactStore, key: str) -> Documents:
    """The manifest and the resume point of a stage folder.

    Raises:
        OSError: if the storage cannot be reached.
    """
    # The resume point first: it is deleted after the manifest was created, so one of them is seen.
    progress, unusable = None, ""
    try:
        progress = read_progress(store.fs, store.root, key)
    except Corrupt as error:
        unusable = str(error)
    try:
        return Documents(store.get(key), progress)
    except KeyError:
        return Documents(None, progress, unusable)
    except Corrupt as error:
        return Documents(None, progress, str(error))


def files_set_aside(store: ArtifactStore, key: str, entries: Iterable[Entry]) -> set[str]:
    """Paths that manifests named which were set aside; those of a manifest that is itself damaged are not known."""
    named: set[str] = set()
    for entry in entries:
        try:
            content = read_sealed(store.fs, f"{store.root}/{entry.path}")
            named |= paths_of(files_from_json(content["files"], key).values())
        except (FileNotFoundError, Corrupt, ValueError, TypeError, KeyError, AttributeError):
            continue  # they are counted as files that nobody names
    return named


def paths_of(files: Iterable[StoredFile]) -> set[str]:
    """Where files lie, relative to the store's root."""
    return {file.path for file in files}
