"""Reading a whole store through: every manifest, every resume point, every byte of their files."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Literal

from layerwise.storage.artifact import StoredFile
from layerwise.storage.checking import require_content
from layerwise.storage.draft import MANIFEST
from layerwise.storage.files.corrupt import Corrupt
from layerwise.storage.files.reading import is_local
from layerwise.storage.resume_points import PROGRESS, read_progress
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.inventory import StageFolder, take_inventory

AT_ONCE = 4  # folders, on a remote storage: small files would wait for its answers most of the time
LOOKS = 3  # at a folder that others change while it is read


@dataclass(frozen=True)
class Finding:
    """Something that is not as it should be.

    Args:
        key: of the artifact, or of the stage whose resume point it is.
        name: of the file.
        problem: what is wrong, with the values.
        kind: ``damaged``: lost, to be built anew; ``unread``: the storage failed, so nothing is known;
            ``unfinished``: files that nothing commits, which a killed process, one that is running, or a lost
            manifest leaves.
    """

    key: str
    name: str
    problem: str
    kind: Literal["damaged", "unread", "unfinished"] = "damaged"


class Tally:
    """What was read so far; the reader changes it, anybody may look.

    Attributes:
        folders: how many hold an artifact or a resume point, 0 until the store was listed.
        artifacts: read through.
        resume_points: read through.
        files: read through, manifests not counted.
        bytes: of these files.
    """

    def __init__(self) -> None:
        self.folders = self.artifacts = self.resume_points = self.files = self.bytes = 0
        self._lock = Lock()

    def add(self, **counts: int) -> None:
        """Count further things that were read; from any thread."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)


def verify(store: ArtifactStore, tally: Tally | None = None) -> Iterator[Finding]:
    """Read everything that is committed in a store, and tell what is not as it was written; nothing is changed.

    Memory is 32 MB whatever the sizes, four times that on a remote storage.

    Args:
        tally: is kept up to date while the findings are consumed.

    Raises:
        OSError: if the store cannot be listed.
    """
    tally = Tally() if tally is None else tally
    inventory = take_inventory(store.fs, store.root)
    folders = [folder for _, folder in sorted(inventory.folders.items())]
    tally.add(folders=sum(bool(folder.manifest or folder.progress) for folder in folders))
    read_by: dict[str, str] = {}  # key of an artifact -> one that was made from it
    pool = ThreadPoolExecutor(1 if is_local(store.fs) else AT_ONCE)
    try:
        for findings in pool.map(lambda folder: _read_folder(store, folder, tally, read_by), folders):
            yield from findings
    finally:
        pool.shutdown(cancel_futures=True)
    for folder in folders:
        if folder.attempts and not folder.manifest and not folder.progress:
            yield _unfinished(folder, read_by.get(folder.key))


def _unfinished(folder: StageFolder, reader: str | None) -> Finding:
    count = sum(len(files) for files in folder.attempts.values())
    if reader is None or folder.set_aside:
        problem = (
            f"{count} files are there, but neither a manifest nor a resume point ({PROGRESS}): a killed process left "
            "them, or one is at work there. `layerwise gc` deletes them when they are old"
        )
        return Finding(folder.key, MANIFEST, problem, "unfinished")
    return Finding(
        folder.key,
        MANIFEST,
        f"it is missing: {reader} was made from this artifact, of which {count} files are there",
    )


def _read_folder(
    store: ArtifactStore, folder: StageFolder, tally: Tally, read_by: dict[str, str]
) -> list[Finding]:
    """Findings of one stage folder, read again if another process changed it meanwhile."""
    findings: list[Finding] = []
    for _ in range(LOOKS):
        before, findings = _committed_files(store, folder, read_by)
        if before is None:
            break
        token, files = before
        findings = [
            finding for name, file in files for finding in _read_file(store, folder.key, name, file, tally)
        ]
        if not findings or _token(store, folder) == token:
            break
    if folder.manifest or folder.progress:
        tally.add(**{"artifacts" if folder.manifest else "resume_points": 1})
    return findings


Committed = tuple[str, list[tuple[str, StoredFile]]]  # token of the document, the files it names


def _committed_files(
    store: ArtifactStore, folder: StageFolder, read_by: dict[str, str]
) -> tuple[Committed | None, list[Finding]]:
    """What is to be read in a folder; a resume point beside a manifest is of no use, and is not read."""
    name = MANIFEST if folder.manifest else PROGRESS
    try:
        if folder.manifest:
            artifact = store.get(folder.key)
            inputs = artifact.recipe.get("inputs")
            if isinstance(inputs, Mapping):
                read_by.update(dict.fromkeys(map(str, inputs.values()), folder.key))
            return (artifact.token, list(artifact.files.items())), []
        if folder.progress and (progress := read_progress(store.fs, store.root, folder.key)):
            return (progress.token, [*progress.files.items(), *progress.state.files.items()]), []
        return None, []
    except KeyError:
        return None, []  # it was deleted, or set aside, since the listing
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
        require_content(store.fs, store.root, file, lambda size: tally.add(bytes=size))
        tally.add(files=1)
    except Corrupt as error:
        yield Finding(key, name, str(error))
    except Exception as error:  # clients raise more than OSErrors; the other files are read all the same
        yield Finding(key, name, f"{store.root}/{file.path} could not be read: {error}", "unread")
