"""Verification of a store: read every manifest, every resume point, and every byte of their files."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Literal

from layerwise.storage.artifact import MANIFEST, StoredFile
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.integrity import require_content
from layerwise.storage.inventory import StageFolder, take_inventory
from layerwise.storage.resume_points import RESUME_POINT_FILE, read_resume_point
from layerwise.storage.store import ArtifactStore

CONCURRENT_FOLDERS = 4  # on a remote storage, where reading small files is mostly waiting
READS = 3  # maximum for a folder that other processes change while it is read


@dataclass(frozen=True)
class Finding:
    """A file that is damaged, unreadable or not committed.

    Attributes:
        key: of the artifact, or of the stage whose resume point is affected.
        name: of the file.
        problem: description, with the values.
        kind: ``damaged``: lost, must be rebuilt; ``unread``: the storage failed, so the state is unknown;
            ``unfinished``: files without a manifest or resume point, left by a killed or running process or by the
            loss of a manifest.
    """

    key: str
    name: str
    problem: str
    kind: Literal["damaged", "unread", "unfinished"] = "damaged"


class Tally:
    """Counts of what was verified so far. Updated by the verifying threads, readable from any thread.

    Attributes:
        folders: number of folders with an artifact or a resume point; 0 until the store is listed.
        artifacts: number of artifacts read.
        resume_points: number of resume points read.
        files: number of files read, without manifests.
        bytes: total size of these files.
    """

    def __init__(self) -> None:
        self.folders = self.artifacts = self.resume_points = self.files = self.bytes = 0
        self._lock = Lock()

    def add(self, **counts: int) -> None:
        """Add to the counts, from any thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


def verify(store: ArtifactStore, tally: Tally | None = None) -> Iterator[Finding]:
    """Read everything that is committed in a store, and yield what differs from what was written. Changes nothing.

    Needs 4 MB of memory for files of any size; up to 1 GB on a remote storage, where four folders are read at once.

    Args:
        tally: updated while the findings are consumed.

    Raises:
        OSError: the store cannot be listed.
    """
    tally = Tally() if tally is None else tally
    inventory = take_inventory(store)
    folders = [folder for _, folder in sorted(inventory.folders.items())]
    tally.add(folders=sum(bool(folder.manifest or folder.resume_point) for folder in folders))
    read_by: dict[str, str] = {}  # key of an artifact: key of one that was made from it
    pool = ThreadPoolExecutor(1 if store.is_local else CONCURRENT_FOLDERS)
    try:
        for findings in pool.map(lambda folder: _read_folder(store, folder, tally, read_by), folders):
            yield from findings
    finally:
        pool.shutdown(cancel_futures=True)
    for folder in folders:
        if folder.attempts and not folder.manifest and not folder.resume_point:
            yield _unfinished(folder, read_by.get(folder.key))


def _unfinished(folder: StageFolder, reader: str | None) -> Finding:
    count = sum(len(files) for files in folder.attempts.values())
    if reader is None or folder.set_aside:
        problem = (
            f"{count} files without a manifest or a resume point ({RESUME_POINT_FILE}): a killed process left "
            "them, or one is at work there. `layerwise gc` deletes them when they are old"
        )
        return Finding(folder.key, MANIFEST, problem, "unfinished")
    return Finding(
        folder.key,
        MANIFEST,
        f"it is missing: {reader} was made from this artifact, and {count} files of it exist",
    )


def _read_folder(
    store: ArtifactStore, folder: StageFolder, tally: Tally, read_by: dict[str, str]
) -> list[Finding]:
    """Return the findings of one stage folder; read it again if another process changed it in the meantime."""
    findings: list[Finding] = []
    for _ in range(READS):
        before, findings = _committed_files(store, folder, read_by)
        if before is None:
            break
        token, files = before
        findings = [
            finding for name, file in files for finding in _read_file(store, folder.key, name, file, tally)
        ]
        if not findings or _token(store, folder) == token:
            break
    if folder.manifest or folder.resume_point:
        tally.add(**{"artifacts" if folder.manifest else "resume_points": 1})
    return findings


Committed = tuple[str, list[tuple[str, StoredFile]]]  # token of the document, and the files it names


def _committed_files(
    store: ArtifactStore, folder: StageFolder, read_by: dict[str, str]
) -> tuple[Committed | None, list[Finding]]:
    """Return the files to read in a folder. A resume point next to a manifest is not needed, and is not read."""
    name = MANIFEST if folder.manifest else RESUME_POINT_FILE
    try:
        if folder.manifest:
            artifact = store.get(folder.key)
            inputs = artifact.recipe.get("inputs")
            if isinstance(inputs, Mapping):
                read_by.update(dict.fromkeys(map(str, inputs.values()), folder.key))
            return (artifact.token, list(artifact.files.items())), []
        if folder.resume_point and (resume_point := read_resume_point(store, folder.key)):
            files = [*resume_point.files.items(), *resume_point.state.files.items()]
            return (resume_point.token, files), []
        return None, []
    except KeyError:
        return None, []  # deleted or set aside since the listing
    except Corrupt as error:
        return None, [Finding(folder.key, name, str(error))]
    except Exception as error:  # clients raise more than OSErrors; the other folders are read all the same
        return None, [Finding(folder.key, name, str(error), "unread")]


def _token(store: ArtifactStore, folder: StageFolder) -> str:
    committed, _ = _committed_files(store, folder, {})
    return "" if committed is None else committed[0]


def _read_file(
    store: ArtifactStore, key: str, name: str, file: StoredFile, tally: Tally
) -> Iterator[Finding]:
    try:
        require_content(store, file, lambda size: tally.add(bytes=size))
        tally.add(files=1)
    except Corrupt as error:
        yield Finding(key, name, str(error))
    except Exception as error:  # clients raise more than OSErrors; the other files are read all the same
        yield Finding(key, name, f"{store.path(file.path)} could not be read: {error}", "unread")
