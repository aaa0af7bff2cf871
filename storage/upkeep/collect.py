"""Garbage collection: what nobody can reach any more is found, shown, and deleted on request."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from math import floor

from layerwise.storage.artifact import Artifact
from layerwise.storage.files.reading import is_local
from layerwise.storage.resume_points import PROGRESS
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.garbage import ARTIFACTS, STALE, TEMPORARY, UPLOADS, Garbage, garbage_of
from layerwise.storage.upkeep.inventory import Inventory, StageFolder, take_inventory
from layerwise.storage.upkeep.reachability import Documents, read_documents
from layerwise.storage.upkeep.removal import Failure, remove_empty_folders, remove_file
from layerwise.storage.upkeep.signs_of_life import (
    STALE_AFTER,
    RunningProcess,
    running_processes,
    storage_clock,
)
from layerwise.storage.upkeep.unfinished_uploads import abort_upload, open_uploads

AT_ONCE = 16  # requests to a remote storage
GRACE_SECONDS = 3600.0


class StoreInUse(OSError):
    """Other processes work in the store, and what was asked for would take from them what they read."""


@dataclass(frozen=True)
class Collection:
    """What would be deleted, and what would not.

    Args:
        garbage: grouped by key.
        damaged: keys whose documents cannot be read, and why: all of their files stay.
        not_ours: paths that this program has not written; they stay.
        running: processes that work in the store.
        horizon: whatever was modified since then stays; by the storage's clock, in seconds since 1970.
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
    """What was deleted.

    Args:
        garbage: what is gone.
        failures: what could not be deleted, with the reason.
    """

    garbage: tuple[Garbage, ...]
    failures: tuple[Failure, ...]


def plan_collection(
    store: ArtifactStore,
    keys_to_keep: Callable[[Sequence[Artifact]], AbstractSet[str]] | None = None,
    grace_seconds: float = GRACE_SECONDS,
    now: float | None = None,
) -> Collection:
    """Find what nobody can reach; nothing is deleted. Lists the store once, and reads every manifest.

    Args:
        keys_to_keep: given all artifacts, the keys of those that are to stay; None for all of them.
        grace_seconds: whatever was modified in this time stays.
        now: in seconds since 1970; None for the storage's clock.

    Raises:
        StoreInUse: if artifacts are to go, and a process works in the store.
        ValueError: if artifacts are to go, and some are damaged: one of those might say what is to stay.
        OSError: if the storage cannot be reached, or not be written.
    """
    now = storage_clock(store.fs, store.root) if now is None else now
    running = running_processes(store.fs, store.root, now)
    if keys_to_keep is not None:
        _require_nobody(store, running)
    # Some listings give whole seconds only.
    horizon = floor(min([now - grace_seconds, *(process.since.timestamp() for process in running)]))
    inventory = take_inventory(store.fs, store.root)
    documents = _read_all(store, inventory.folders.values())
    damaged = {key: each.problem for key, each in documents.items() if each.problem}
    kept = None
    if keys_to_keep is not None:
        _require_undamaged(damaged)
        kept = keys_to_keep([each.artifact for each in documents.values() if each.artifact is not None])
    garbage = [*_loose_garbage(store, inventory, horizon, now - STALE_AFTER)]
    for key, folder in sorted(inventory.folders.items()):
        committed = folder.manifest or folder.progress
        if kept is not None and key not in kept and committed and folder.newest < horizon:
            garbage += [Garbage(ARTIFACTS, each.path, each.size, key) for each in folder.entries()]
        else:
            garbage += garbage_of(store, folder, documents[key], horizon)
    not_ours = tuple(sorted(inventory.not_ours))
    return Collection(tuple(garbage), damaged, not_ours, tuple(running), horizon, kept is not None)


def collect(store: ArtifactStore, collection: Collection) -> Collected:
    """Delete what was planned, unless it has come into use since. Goes on when something cannot be deleted.

    Raises:
        StoreInUse: as for ``plan_collection``.
        OSError: if the storage cannot be reached.
    """
    if collection.results_only:
        _require_nobody(store, running_processes(store.fs, store.root, storage_clock(store.fs, store.root)))
    by_key = [list(group) for _, group in groupby(collection.garbage, key=lambda each: each.key)]
    with ThreadPoolExecutor(1 if is_local(store.fs) else AT_ONCE) as pool:
        failures: list[Failure] = []
        to_go: list[Garbage] = []
        gone: list[Garbage] = []
        for deleted, unused, failed in pool.map(lambda group: _uncommit(store, group), by_key):
            gone += deleted
            to_go += unused
            failures += failed
        for each, failure in zip(to_go, pool.map(lambda each: _delete(store, each), to_go), strict=True):
            if failure is None:
                gone.append(each)
            else:
                failures.append(failure)
    if is_local(store.fs):
        remove_empty_folders(store.root, [each.path for each in gone])
    return Collected(tuple(gone), tuple(failures))


def _read_all(store: ArtifactStore, folders: Iterable[StageFolder]) -> dict[str, Documents]:
    committed = [folder.key for folder in folders if folder.manifest or folder.progress]
    documents = dict.fromkeys((folder.key for folder in folders), Documents())
    with ThreadPoolExecutor(1 if is_local(store.fs) else AT_ONCE) as pool:
        documents.update(
            zip(committed, pool.map(lambda key: read_documents(store, key), committed), strict=True)
        )
    return documents


def _require_nobody(store: ArtifactStore, running: Sequence[RunningProcess]) -> None:
    if running:
        raise StoreInUse(
            f"{store.url} is in use by {'; '.join(map(str, running))}. It may need the artifacts that would be "
            "deleted: wait for its end (or, if it was killed, ten minutes), or leave out --results-only."
        )


def _require_undamaged(damaged: Mapping[str, str]) -> None:
    if damaged:
        raise ValueError(
            f"{len(damaged)} artifacts are damaged, so that it is not known what they need: "
            f"{'; '.join(f'{key} ({problem})' for key, problem in damaged.items())}. Restore them or delete their "
            "folders, or leave out --results-only."
        )


def _loose_garbage(
    store: ArtifactStore, inventory: Inventory, horizon: float, stale: float
) -> Iterator[Garbage]:
    for entry in inventory.running:
        if entry.modified < min(horizon, stale):
            yield Garbage(STALE, entry.path, entry.size)
    for entry in inventory.temporary:
        if entry.modified < horizon:
            yield Garbage(TEMPORARY, entry.path, entry.size)
    for upload in open_uploads(store.fs, store.root, {key.partition("/")[0] for key in inventory.folders}):
        if upload.began < horizon:
            yield Garbage(UPLOADS, upload.path, 0, upload=upload.identifier)


def _uncommit(
    store: ArtifactStore, group: Sequence[Garbage]
) -> tuple[list[Garbage], list[Garbage], list[Failure]]:
    """Delete the manifest of an artifact that is to go; of another folder, look again at what is in use.

    Returns:
        What was deleted, what can be deleted now, and what failed.
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
    except Exception as error:  # clients raise more than OSErrors; the other folders are judged all the same
        return [], [], [Failure(group[0].key, str(error))]
    if documents.problem:
        return [], [], [Failure(group[0].key, documents.problem)]
    if documents.artifact is None and any(each.path.endswith(f"/{PROGRESS}") for each in rest):
        return [], [], []  # the manifest was set aside meanwhile, and somebody is building the artifact anew
    named = documents.in_use
    return [], [each for each in rest if each.path not in named], []


def _delete(store: ArtifactStore, garbage: Garbage) -> Failure | None:
    if garbage.upload:
        return remove_file(
            garbage.path, lambda: abort_upload(store.fs, store.root, garbage.path, garbage.upload)
        )
    return remove_file(garbage.path, lambda: store.fs.rm_file(f"{store.root}/{garbage.path}"))
