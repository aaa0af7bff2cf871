"""An artifact that is still being written, and the resume points it leaves on the way."""

import json
import logging
import resource
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from datetime import UTC, datetime

from fsspec import AbstractFileSystem

from layerwise.storage.artifact import STORAGE_CLOCK, Artifact, StoredFile, checked_name
from layerwise.storage.checking import require_content, require_sizes
from layerwise.storage.damage import Damaged
from layerwise.storage.files.copies import copy_within
from layerwise.storage.files.corrupt import Corrupt, Missing, Removed
from layerwise.storage.files.publishing import overwrite, publish, remove_quietly
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.storage.pauses import longest_pause, since_boot
from layerwise.storage.resume_points import PROGRESS, Progress, read_progress
from layerwise.storage.stage import Stage
from layerwise.storage.upkeep.signs_of_life import storage_clock

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class Committed(Exception):
    """Another process has committed the artifact that this one is still working on."""


class Draft:
    """Files of an artifact that is still being written. Nobody else can see them.

    Attributes:
        files: what was written so far, including the files of an earlier attempt that left a resume point.
        facts: small results for the manifest; plain JSON.
        made: for the manifest, beside time and memory: how this attempt made it; no part of what the artifact is.
        resumed: where an earlier attempt stopped; None on a fresh start.
        tokens: of that resume point, and of those that this attempt left.
        began: when this attempt did, by ``since_boot``.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, stage: Stage) -> None:
        self.files: dict[str, StoredFile] = {}
        self.facts: dict[str, object] = {}
        self.made: dict[str, object] = {}
        self.resumed: Progress | None = None
        self.tokens: set[str] = set()
        self._fs, self._root, self._stage = fs, root, stage
        self._attempt = f"{stage.key}/{uuid.uuid4().hex}"
        self._state: dict[str, StoredFile] = {}  # of the last resume point, to be deleted after the next one
        self._unusable: set[str] = set()  # tokens of resume points whose files are missing or damaged
        self._inherited: frozenset[str] = frozenset()  # names of files that an earlier attempt wrote
        self._started, self._seconds_before = time.monotonic(), 0.0
        self._booted: float | None = (
            None  # this machine, by the storage's clock; known once a file is written
        )
        self.began = self._looked = since_boot()  # when its files were last looked for

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
            Removed: if another process deleted the file while it was being written.
        """
        path = f"{self._attempt}/{checked_name(name)}"
        if name in self.files and self.files[name].path == path:
            raise ValueError(
                f"{self._stage.key}: the file {name!r} was already written. Files are never changed: "
                "choose another name, or write it once."
            )
        pieces = [data] if isinstance(data, bytes | bytearray | memoryview) else data
        size, digest, date = publish(self._fs, f"{self._root}/{path}", pieces)
        # The latest: S3 cuts dates to the second, and dates a large file with the beginning of its upload.
        self._booted = max(date - since_boot(), self._booted or 0.0)
        self.files[name] = StoredFile(path, size, digest, tensors)
        self._inherited -= {name}
        return self.files[name]

    def save_progress(self, step: int, write_state: Callable[["Draft"], None]) -> None:
        """Commit a resume point: a new attempt will have all files written so far and go on from here.

        Nothing is committed if another process, at work on the same stage, is further on.

        Args:
            step: what ``resumed.step`` will be; the number of the next piece of work, say.
            write_state: writes what is needed to go on into a draft of its own. These files live until the
                next resume point, and are no part of the artifact.

        Raises:
            Committed: another process has finished the artifact.
            Removed: another process deleted what was written, while this one was paused.
        """
        if longest_pause(self._looked):
            self.require_files()
        if self._is_behind(step):
            return
        state = Draft(self._fs, self._root, self._stage)
        write_state(state)
        if self._is_behind(step):  # look again: gigabytes of state take their time
            state.remove_files()
            return
        progress = Progress(
            step,
            Artifact(f"{self._stage.key}/{PROGRESS}", state.files, state.facts),
            self.files,
            self.facts,
            self.seconds,
            datetime.now(UTC).isoformat(timespec="seconds"),
            socket.gethostname(),
        )
        document = seal(progress.to_json(self._stage.key))
        overwrite(self._fs, self._progress_path, document)
        self.tokens.add(json.loads(document)["token"])
        logger.debug("%s: resume point %d committed", self._stage.key, step)
        self._remove_state()
        self._state = state.files

    def resume(self, unusable: Set[str] = frozenset()) -> None:
        """Go on from the resume point of an earlier attempt, if there is one and all its files are there.

        Args:
            unusable: tokens of resume points that were tried and found damaged.
        """
        self._unusable = set(unusable)
        while progress := self._standing():
            try:
                require_sizes(self._fs, self._root, progress.all_files)
            except Corrupt as error:
                # Another process at work on this stage may have replaced it, and deleted its state, meanwhile.
                self._unusable.add(progress.token)
                logger.warning("%s: a resume point cannot be used: %s", self._stage.key, error)
                continue
            self.files, self.facts, self.resumed = dict(progress.files), dict(progress.facts), progress
            self._inherited = frozenset(progress.files)
            self.tokens.add(progress.token)
            self._state, self._seconds_before = dict(progress.state.files), progress.seconds
            return

    def gather(self) -> None:
        """Bring the files of earlier attempts into this attempt's folder, by copies on the storage itself.

        For artifacts whose folder is opened by programs that know no manifest.

        Raises:
            Damaged: one of them is missing; the resume point that names it is useless.
        """
        for name, file in self.files.items():
            path = f"{self._attempt}/{name}"
            if file.path != path:
                try:
                    copy_within(self._fs, f"{self._root}/{file.path}", f"{self._root}/{path}")
                except FileNotFoundError as error:
                    raise self._useless(Missing(f"{self._root}/{file.path}")) from error
                self.files[name] = replace(file, path=path)

    def check_inherited(self) -> None:
        """Read the files of earlier attempts through; for artifacts that this program never reads itself.

        Raises:
            Damaged: one of them is not what was written; the resume point that names it is useless.
        """
        for name in sorted(self._inherited):
            try:
                require_content(self._fs, self._root, self.files[name])
            except Corrupt as error:
                raise self._useless(error) from error

    def require_files(self) -> None:
        """Look once more, before the manifest names them, whether all files are there.

        Raises:
            Damaged: one of an earlier attempt is not; the resume point that names it is useless.
            Removed: one of this attempt is not there any more.
            Corrupt: one of this attempt has another size.
        """
        self._looked = since_boot()
        for names in (self._inherited, self.files.keys() - self._inherited):
            try:
                require_sizes(self._fs, self._root, [self.files[name] for name in sorted(names)])
            except Corrupt as error:
                if names is self._inherited:
                    raise self._useless(error) from error
                if isinstance(error, Missing):
                    raise Removed(error.path) from error
                raise Corrupt(
                    f"{self._stage.key} cannot be committed: {error}. Another process changed it since. Run again, and "
                    "let only layerwise write to the store."
                ) from error

    def remove_progress(self) -> None:
        """Delete the resume point; the artifact was committed."""
        remove_quietly(self._fs, [self._progress_path])
        self._remove_state()

    def remove_files(self) -> None:
        """Delete what was written; nobody will need it."""
        remove_quietly(self._fs, [f"{self._root}/{file.path}" for file in self.files.values()])
        self.files = {}

    @property
    def how_it_was_made(self) -> dict[str, object]:
        """When, in how many seconds, and in how many bytes of memory: the most that this process has held so far.

        Raises:
            OSError: if the storage cannot be asked for its time.
        """
        return {
            "at": datetime.fromtimestamp(self._storage_time(), UTC).isoformat(timespec="milliseconds"),
            "clock": STORAGE_CLOCK,
            "seconds": self.seconds,
            "peak_memory": 1024
            * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # which is in KiB on Linux
            **self.made,
        }

    @property
    def seconds(self) -> float:
        """Time spent on this artifact, earlier attempts up to their last resume point included."""
        return round(self._seconds_before + time.monotonic() - self._started, 3)

    def _storage_time(self) -> float:
        """Now by the storage's clock, in seconds since 1970: the clocks of the machines that share it may differ."""
        if self._booted is None:
            return storage_clock(self._fs, self._root)
        return self._booted + since_boot()

    @property
    def _progress_path(self) -> str:
        return f"{self._root}/{self._stage.key}/{PROGRESS}"

    def _standing(self) -> Progress | None:
        """The stage's present resume point, whoever wrote it; None if there is no usable one."""
        try:
            progress = read_progress(self._fs, self._root, self._stage.key)
        except Corrupt as error:
            logger.warning("%s has a resume point that cannot be used: %s", self._stage.key, error)
            return None
        return None if progress is None or progress.token in self._unusable else progress

    def _is_behind(self, step: int) -> bool:
        """Whether another process at work on this stage has come further.

        Raises:
            Committed: it has finished the artifact.
        """
        try:
            read_sealed(self._fs, f"{self._root}/{self._stage.key}/{MANIFEST}")
        except (FileNotFoundError, Corrupt):
            standing = self._standing()
            return standing is not None and standing.step > step
        raise Committed(self._stage.key)

    def _useless(self, error: Corrupt) -> Damaged:
        assert self.resumed is not None, "only a resume point brings files of earlier attempts"
        return Damaged(str(error), self.resumed.state.key, self.resumed.token)

    def _remove_state(self) -> None:
        remove_quietly(self._fs, [f"{self._root}/{file.path}" for file in self._state.values()])
        self._state = {}
