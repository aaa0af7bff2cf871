"""Garbage: what lies in a store and is of no use to anybody any more."""

from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.inventory import Entry, StageFolder
from layerwise.storage.upkeep.reachability import Documents, files_set_aside

ATTEMPTS = "abandoned attempts"
BOUNDARIES = "old boundaries"
TEMPORARY = "temporary files"
UPLOADS = "open uploads"
SET_ASIDE = "set-aside manifests"
STALE = "stale running files"
ARTIFACTS = "artifacts"
KINDS = (ATTEMPTS, BOUNDARIES, TEMPORARY, UPLOADS, SET_ASIDE, STALE, ARTIFACTS)


@dataclass(frozen=True)
class Garbage:
    """One thing to delete.

    Args:
        kind: one of ``KINDS``.
        path: relative to the store's root.
        size: in bytes; 0 for an upload, whose size the server does not tell.
        key: of the stage folder it lies in; "" outside of them.
        upload: identifier of an open upload; "" for a file.
    """

    kind: str
    path: str
    size: int
    key: str = ""
    upload: str = ""

    @property
    def commits(self) -> bool:
        """Whether it makes an artifact or a resume point of other files: it is the first to go."""
        return self.kind == ARTIFACTS and self.path in (
            f"{self.key}/manifest.json",
            f"{self.key}/progress.json",
        )


def garbage_of(
    store: ArtifactStore, folder: StageFolder, documents: Documents, horizon: float
) -> Iterator[Garbage]:
    """What nobody can reach in a stage folder.

    Args:
        documents: read after ``folder`` was listed.
        horizon: whatever was modified since then stays, and attempts with such a file as a whole; by the
            storage's clock, in seconds since 1970.
    """
    if documents.problem:
        return
    if (folder.manifest and not documents.artifact) or (
        folder.progress and not (documents.artifact or documents.progress)
    ):
        return  # neither is what was listed there
    if documents.artifact is None and folder.newest >= horizon:
        return  # somebody is at work there, and may have taken over older files
    in_use = documents.in_use
    if folder.progress and folder.progress.modified >= horizon:
        # By a second builder that has not noticed the first one's commit.
        in_use |= documents.files_of_progress
    found = [(SET_ASIDE, each) for each in folder.set_aside] + [
        (TEMPORARY, each) for each in folder.temporary
    ]
    if folder.manifest and folder.progress:
        found.append((BOUNDARIES, folder.progress))
    named_before = files_set_aside(store, folder.key, folder.set_aside)
    for files in folder.attempts.values():
        if max(each.modified for each in files) < horizon:
            kind = _kind(files, folder, documents)
            for each in files:
                if each.path not in in_use:
                    found.append((_kind_of_file(each, documents, named_before) or kind, each))
    for kind, entry in found:
        if entry.modified < horizon:
            yield Garbage(kind, entry.path, entry.size, folder.key)


def _kind(files: Sequence[Entry], folder: StageFolder, documents: Documents) -> str:
    """What an attempt's files have been that nobody names."""
    if documents.artifact is None and folder.progress:
        unnamed = documents.in_use.isdisjoint(each.path for each in files)
        if unnamed and all(each.modified <= folder.progress.modified for each in files):
            return BOUNDARIES  # or an attempt that died before its first one; nothing tells them apart
    return ATTEMPTS


def _kind_of_file(entry: Entry, documents: Documents, named_before: AbstractSet[str]) -> str | None:
    """What a file has been that nobody names, if it differs from its attempt."""
    if entry.is_temporary:
        return TEMPORARY
    if entry.path in named_before:
        return SET_ASIDE
    return BOUNDARIES if entry.path in documents.files_of_progress else None
