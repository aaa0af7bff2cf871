"""Garbage collection: files that nothing refers to any more are found, shown, and deleted on request."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from math import floor

from layerwise.storage.artifact import MANIFEST, Artifact
from layerwise.storage.inventory import Entry, Inventory, StageFolder, take_inventory
from layerwise.storage.resume_points import RESUME_POINT_FILE
from layerwise.storage.signs_of_life import STALE_AFTER, RunningProcess, running_processes, storage_clock
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.reachability import Documents, files_set_aside, read_documents
from layerwise.storage.upkeep.unfinished_uploads import abort_upload, open_uploads

ATTEMPTS = "abandoned attempts"
RESUME_POINTS = "old resume points"
TEMPORARY = "temporary files"
UPLOADS = "open uploads"
SET_ASIDE = "set-aside manifests"
STALE = "stale running files"
ARTIFACTS = "artifacts"
KINDS = (ATTEMPTS, RESUME_POINTS, TEMPORARY, UPLOADS, SET_ASIDE, STALE, ARTIFACTS)
CONCURRENT_REQUESTS = 16  # to a remote storage
GRACE_SECONDS = 3600.0  # files modified during this time stay


class StoreInUse(OSError):
    """Other processes work in the store, and the requested deletion could remove artifacts that they read."""


@dataclass(frozen=True)
class Garbage:
    """One file or upload to delete.

    Attributes:
        kind: one of ``KINDS``.
        path: relative to the store's root.
        size: in bytes; 0 for an upload, whose size the server does not report.
        key: of the stage folder that contains it; "" outside of stage folders.
        upload: identifier of an open upload; "" for a file.
    """

    kind: str
    path: str
    size: int
    key: str = ""
    upload: str = ""

    @property
    def commits(self) -> bool:
        """Return whether the file commits an artifact or a resume point; such a document is deleted before its files."""
        documents = (f"{self.key}/{MANIFEST}", f"{self.key}/{RESUME_POINT_FILE}")
        return self.kind == ARTIFACTS and self.path in documents


@dataclass(frozen=True)
class Failure:
    """A file that could not be deleted, or a folder that could not be examined.

    Attributes:
        path: relative to the store's root.
        problem: the reason.
    """

    path: str
    problem: str


@dataclass(frozen=True)
class Collection:
    """Plan of a garbage collection: what would be deleted, and what would stay.

    Attributes:
        garbage: grouped by key.
        damaged: keys whose documents cannot be read, with the reason. All their files stay.
        not_ours: paths that this program has not written. They stay.
        running: processes that work in the store.
        horizon: files modified since then stay; by the storage's clock, in seconds since 1970.
        results_only: whether artifacts are among the garbage.
    """

    garbage: tuple[Garbage, ...]
    damaged: Mapping[str, str]
    not_ours: tuple[str, ...]
    running: tuple[RunningProcess, ...]
    horizon: float
    results_only: bool = False


@dataclass(frozen=True)
class Collected:
    """Result of a garbage collection.

    Attributes:
        garbage: what was deleted.
        failures: what could not be deleted, with the reasons.
    """

    garbage: tuple[Garbage, ...]
    failures: tuple[Failure, ...]


def plan_collection(
    store: ArtifactStore,
    keys_to_keep: Callable[[Sequence[Artifact]], AbstractSet[str]] | None = None,
    now: float | None = None,
) -> Collection:
    """Find the garbage of a store. Deletes nothing. Lists the store once, and reads every manifest.

    Args:
        keys_to_keep: given all artifacts, returns the keys of those to keep; None to keep all of them.
        now: in seconds since 1970; None for the storage's clock.

    Raises:
        StoreInUse: artifacts would be deleted, and a process works in the store.
        ValueError: artifacts would be deleted, and some are damaged: these may name artifacts to keep.
        OSError: the storage cannot be reached, or cannot be written.
    """
    now = storage_clock(store) if now is None else now
    running = running_processes(store, now)
    if keys_to_keep is not None:
        _require_unused(store, running)
    # Some listings round to whole seconds.
    horizon = floor(min([now - GRACE_SECONDS, *(process.since.timestamp() for process in running)]))
    inventory = take_inventory(store)
    documents = _read_all(store, inventory.folders.values())
    damaged = {key: each.problem for key, each in documents.items() if each.problem}
    kept = None
    if keys_to_keep is not None:
        _require_undamaged(damaged)
        kept = keys_to_keep([each.artifact for each in documents.values() if each.artifact is not None])
    garbage = [*_garbage_outside_folders(store, inventory, horizon, now - STALE_AFTER)]
    for key, folder in sorted(inventory.folders.items()):
        committed = folder.manifest or folder.resume_point
        if kept is not None and key not in kept and committed and folder.newest < horizon:
            garbage += [Garbage(ARTIFACTS, each.path, each.size, key) for each in folder.entries()]
        else:
            garbage += _garbage_in(store, folder, documents[key], horizon)
    not_ours = tuple(sorted(inventory.not_ours))
    return Collection(tuple(garbage), damaged, not_ours, tuple(running), horizon, kept is not None)


def collect(store: ArtifactStore, collection: Collection) -> Collected:
    """Delete the planned garbage, except what has come into use since. Continues after files that cannot be deleted.

    Raises:
        StoreInUse: as for ``plan_collection``.
        OSError: the storage cannot be reached.
    """
    if collection.results_only:
        _require_unused(store, running_processes(store, storage_clock(store)))
    by_key = [list(group) for _, group in groupby(collection.garbage, key=lambda each: each.key)]
    with ThreadPoolExecutor(1 if store.is_local else CONCURRENT_REQUESTS) as pool:
        failures: list[Failure] = []
        unused: list[Garbage] = []
        gone: list[Garbage] = []
        for deleted, still_unused, failed in pool.map(lambda group: _uncommit(store, group), by_key):
            gone += deleted
            unused += still_unused
            failures += failed
        for each, failure in zip(unused, pool.map(lambda each: _delete(store, each), unused), strict=True):
            if failure is None:
                gone.append(each)
            else:
                failures.append(failure)
    if store.is_local:
        _remove_empty_folders(store.root, [each.path for each in gone])
    return Collected(tuple(gone), tuple(failures))


def _read_all(store: ArtifactStore, folders: Iterable[StageFolder]) -> dict[str, Documents]:
    committed = [folder.key for folder in folders if folder.manifest or folder.resume_point]
    documents = dict.fromkeys((folder.key for folder in folders), Documents())
    with ThreadPoolExecutor(1 if store.is_local else CONCURRENT_REQUESTS) as pool:
        documents.update(
            zip(committed, pool.map(lambda key: read_documents(store, key), committed), strict=True)
        )
    return documents


def _require_unused(store: ArtifactStore, running: Sequence[RunningProcess]) -> None:
    if running:
        raise StoreInUse(
            f"{store.url} is in use by {'; '.join(map(str, running))}. It may need the artifacts that would be "
            "deleted: wait until it ends (or, if it was killed, ten minutes), or leave out --results-only."
        )


def _require_undamaged(damaged: Mapping[str, str]) -> None:
    if damaged:
        raise ValueError(
            f"{len(damaged)} artifacts are damaged, so that their inputs are unknown: "
            f"{'; '.join(f'{key} ({problem})' for key, problem in damaged.items())}. Restore them or delete their "
            "folders, or leave out --results-only."
        )


def _garbage_outside_folders(
    store: ArtifactStore, inventory: Inventory, horizon: float, stale: float
) -> Iterator[Garbage]:
    for entry in inventory.running:
        if entry.modified < min(horizon, stale):
            yield Garbage(STALE, entry.path, entry.size)
    for files in inventory.parts.values():
        # The claim of a part that is still running may be newer than the part.
        if max(entry.modified for entry in files) < min(horizon, stale):
            for entry in files:
                yield Garbage(STALE, entry.path, entry.size)
    for entry in inventory.temporary:
        if entry.modified < horizon:
            yield Garbage(TEMPORARY, entry.path, entry.size)
    for upload in open_uploads(store, {key.partition("/")[0] for key in inventory.folders}):
        if upload.began < horizon:
            yield Garbage(UPLOADS, upload.path, 0, upload=upload.identifier)


def _garbage_in(
    store: ArtifactStore, folder: StageFolder, documents: Documents, horizon: float
) -> Iterator[Garbage]:
    """Yield the unreferenced files of a stage folder.

    Args:
        documents: read after ``folder`` was listed.
        horizon: files modified since then stay, and so do all files of an attempt with such a file; by the storage's
            clock, in seconds since 1970.
    """
    if documents.problem:
        return
    if (folder.manifest and not documents.artifact) or (
        folder.resume_point and not (documents.artifact or documents.resume_point)
    ):
        return  # the listed document was deleted since
    if documents.artifact is None and folder.newest >= horizon:
        return  # a process is at work there, and may have inherited older files
    in_use = documents.in_use
    if folder.resume_point and folder.resume_point.modified >= horizon:
        # A second builder saved it and has not noticed the commit of the first one.
        in_use |= documents.files_of_resume_point
    found = [(SET_ASIDE, each) for each in folder.set_aside] + [
        (TEMPORARY, each) for each in folder.temporary
    ]
    if folder.manifest and folder.resume_point:
        found.append((RESUME_POINTS, folder.resume_point))
    named_before = files_set_aside(store, folder.key, folder.set_aside)
    for files in folder.attempts.values():
        if max(each.modified for each in files) < horizon:
            kind = _kind_of_attempt(files, folder, documents)
            for each in files:
                if each.path not in in_use:
                    found.append((_kind_of_file(each, documents, named_before) or kind, each))
    for kind, entry in found:
        if entry.modified < horizon:
            yield Garbage(kind, entry.path, entry.size, folder.key)


def _kind_of_attempt(files: Sequence[Entry], folder: StageFolder, documents: Documents) -> str:
    """Return the kind of the unreferenced files of an attempt."""
    if documents.artifact is None and folder.resume_point:
        unnamed = documents.in_use.isdisjoint(each.path for each in files)
        if unnamed and all(each.modified <= folder.resume_point.modified for each in files):
            return RESUME_POINTS  # or of an attempt that died before its first one; they cannot be told apart
    return ATTEMPTS


def _kind_of_file(entry: Entry, documents: Documents, named_before: AbstractSet[str]) -> str | None:
    """Return the kind of an unreferenced file; None if it is that of its attempt."""
    if entry.is_temporary:
        return TEMPORARY
    if entry.path in named_before:
        return SET_ASIDE
    return RESUME_POINTS if entry.path in documents.files_of_resume_point else None


def _uncommit(
    store: ArtifactStore, group: Sequence[Garbage]
) -> tuple[list[Garbage], list[Garbage], list[Failure]]:
    """Delete the documents of an artifact that is garbage; for another folder, check again which files are in use.

    Args:
        group: garbage of one folder.

    Returns:
        The deleted garbage, the garbage that can be deleted now, and the failures.
    """
    first = [each for each in group if each.commits]
    rest = [each for each in group if not each.commits]
    if not first and not group[0].key:
        return [], rest, []
    failures = [failure for each in first if (failure := _delete(store, each))]
    if first:
        return ([], [], failures) if failures else (first, rest, [])
    try:
        documents = read_documents(store, group[0].key)
    # Clients raise more than OSErrors; the other folders are processed all the same.
    except Exception as error:
        return [], [], [Failure(group[0].key, str(error))]
    if documents.problem:
        return [], [], [Failure(group[0].key, documents.problem)]
    if documents.artifact is None and any(each.path.endswith(f"/{RESUME_POINT_FILE}") for each in rest):
        return [], [], []  # the manifest was set aside since, and a process is rebuilding the artifact
    named = documents.in_use
    return [], [each for each in rest if each.path not in named], []


def _delete(store: ArtifactStore, garbage: Garbage) -> Failure | None:
    """Delete garbage; a file that is already gone counts as deleted."""
    try:
        if garbage.upload:
            abort_upload(store, garbage.path, garbage.upload)
        else:
            store.fs.rm_file(store.path(garbage.path))
    except FileNotFoundError:
        return None
    except Exception as error:  # clients raise more than OSErrors; the others are deleted all the same
        return Failure(garbage.path, str(error) or type(error).__name__)
    return None


def _remove_empty_folders(root: str, paths: Iterable[str]) -> None:
    """Remove the folders of deleted files, and the folders above, if they are empty.

    Args:
        root: of the store, on a local disk; it stays.
        paths: of the files, relative to the root.
    """
    folders: set[str] = set()
    for path in paths:
        parts = path.split("/")[:-1]
        folders |= {"/".join(parts[:count]) for count in range(1, len(parts) + 1)}
    for folder in sorted(folders, key=lambda each: each.count("/"), reverse=True):
        with contextlib.suppress(OSError):  # not empty, or removed by another process
            os.rmdir(os.path.join(root, folder))
