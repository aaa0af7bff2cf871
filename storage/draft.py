"""An artifact that is still being written, and the resume points it leaves on the way."""

import logging
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime

from fsspec import AbstractFileSystem

from storage.artifact import Artifact, StoredFile, checked_name
from storage.copies import copy_within
from storage.document import read_sealed, seal
from storage.files import Corrupt
from storage.progress import PROGRESS, Progress
from storage.publishing import overwrite, publish, remove_quietly
from storage.stage import Stage
from storage.tensor_entry import TensorEntry
from storage.unreachable import reaching

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
LOOKS_AT_ONCE = 16  # questions for the sizes of stored files


class Committed(Exception):
    """Another process has committed the artifact that this one is still working on."""


class Draft:
    """Files of an artifact that is still being written. Nobody else can see them.

    Attributes:
        files: what was written so far, including the files of an earlier attempt that left a resume point.
        facts: small results for the manifest; plain JSON.
        resumed: where an earlier attempt stopped; None on a fresh start.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, stage: Stage) -> None:
        self.files: dict[str, StoredFile] = {}
        self.facts: dict[str, object] = {}
        self.resumed: Progress | None = None
        self._fs, self._root, self._stage = fs, root, stage
        self._attempt = f"{stage.key}/{uuid.uuid4().hex}"
        self._state: dict[str, StoredFile] = {}  # of the last resume point, to be deleted after the next one
        self._unusable: Set[str] = frozenset()  # tokens of resume points whose state could not be read
        self._started, self._seconds_before = time.monotonic(), 0.0

    def write(
        self,
        name: str,
        data: bytes | Iterable[bytes | memoryview],
        tensors: dict[str, TensorEntry] | None = None,
    ) -> StoredFile:
        """Write one file; on failure nothing of it remains.

        Args:
            name: of the file, may contain "/".
            data: the content, whole or in consecutive pieces.
            tensors: where the tensors lie in it (``write_tensors`` fills this in).

        Raises:
            ValueError: if ``name`` is no proper name, or was already written by this attempt.
        """
        path = f"{self._attempt}/{checked_name(name)}"
        if name in self.files and self.files[name].path == path:
            raise ValueError(
                f"{self._stage.key}: the file {name!r} was already written. Files are never changed: "
                "choose another name, or write it once."
            )
        pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        size, digest = publish(self._fs, f"{self._root}/{path}", pieces)
        self.files[name] = StoredFile(path, size, digest, tensors)
        return self.files[name]

    def save_progress(self, step: int, write_state: Callable[["Draft"], None]) -> None:
        """Commit a resume point: a new attempt will have all files written so far and go on from here.

        Nothing is written if another process, at work on the same stage, is further on.

        Args:
            step: what ``resumed.step`` will be; the number of the next piece of work, say.
            write_state: writes what is needed to go on into a draft of its own. These files live until the
                next resume point, and are no part of the artifact.

        Raises:
            Committed: another process has finished the artifact.
        """
        self._require_uncommitted()
        standing = self._standing()
        if standing is not None and standing.step > step:
            logger.debug("%s: %s is at %d already", self._stage.key, standing.host, standing.step)
            return
        state = Draft(self._fs, self._root, self._stage)
        write_state(state)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        progress = Progress(
            step,
            Artifact(f"{self._stage.key}/{PROGRESS}", state.files, state.facts),
            self.files,
            self.facts,
            self.seconds,
            now,
            socket.gethostname(),
        )
        overwrite(self._fs, self._progress_path, seal(progress.to_json(self._stage.key)))
        logger.debug("%s: resume point %d committed", self._stage.key, step)
        self._remove_state()
        self._state = state.files

    def resume(self, unusable: Set[str] = frozenset()) -> None:
        """Go on from the resume point of an earlier attempt, if there is one and all its files are there.

        Args:
            unusable: tokens of resume points that were tried and found damaged.
        """
        self._unusable = unusable
        progress = self._standing()
        if progress is None:
            return
        try:
            self._require_sizes([*progress.files.values(), *progress.state.files.values()])
        except Corrupt as error:
            logger.warning("%s starts afresh, its resume point is unusable: %s", self._stage.key, error)
            self._unusable = {*unusable, progress.token}
            return
        self.files, self.facts, self.resumed = dict(progress.files), dict(progress.facts), progress
        self._state, self._seconds_before = dict(progress.state.files), progress.seconds

    def gather(self) -> None:
        """Bring the files of earlier attempts into this attempt's folder, by copies on the storage itself.

        For artifacts whose folder is opened by programs that know no manifest.
        """
        for name, file in self.files.items():
            path = f"{self._attempt}/{name}"
            if file.path != path:
                copy_within(self._fs, f"{self._root}/{file.path}", f"{self._root}/{path}")
                self.files[name] = replace(file, path=path)

    def require_files(self) -> None:
        """Look once more, before the manifest names them, whether all files are there.

        Raises:
            Corrupt: one is missing or has another size; naming it.
        """
        self._require_sizes(list(self.files.values()))

    def remove_progress(self) -> None:
        """Delete the resume point; the artifact was committed."""
        remove_quietly(self._fs, [self._progress_path])
        self._remove_state()

    @property
    def seconds(self) -> float:
        """Time spent on this artifact, earlier attempts up to their last resume point included."""
        return round(self._seconds_before + time.monotonic() - self._started, 3)

    @property
    def _progress_path(self) -> str:
        return f"{self._root}/{self._stage.key}/{PROGRESS}"

    def _standing(self) -> Progress | None:
        """The stage's present resume point, whoever wrote it; None if there is no usable one."""
        try:
            progress = Progress.from_json(read_sealed(self._fs, self._progress_path), self._stage.key)
        except FileNotFoundError:
            return None
        except Corrupt as error:
            logger.warning("%s has an unusable resume point: %s", self._stage.key, error)
            return None
        return None if progress.token in self._unusable else progress

    def _require_uncommitted(self) -> None:
        try:
            read_sealed(self._fs, f"{self._root}/{self._stage.key}/{MANIFEST}")
        except (FileNotFoundError, Corrupt):
            return
        raise Committed(self._stage.key)

    def _require_sizes(self, files: list[StoredFile]) -> None:
        with ThreadPoolExecutor(LOOKS_AT_ONCE) as pool:
            list(pool.map(self._require_size, files))

    def _require_size(self, file: StoredFile) -> None:
        path = f"{self._root}/{file.path}"
        try:
            with reaching(self._fs, path):
                size = self._fs.info(path)["size"]
        except FileNotFoundError as error:
            raise Corrupt(f"{path} is missing") from error
        if size != file.size:
            raise Corrupt(f"{path} has {size} bytes, not the {file.size} that were written")

    def _remove_state(self) -> None:
        remove_quietly(self._fs, [f"{self._root}/{file.path}" for file in self._state.values()])
        self._state = {}
