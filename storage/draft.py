"""Drafts: artifacts that are being written, and the resume points they save on the way."""

import json
import logging
import resource
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Set
from dataclasses import replace
from datetime import UTC, datetime

from layerwise.storage.artifact import MANIFEST, STORAGE_CLOCK, Artifact, Damaged, StoredFile, checked_name
from layerwise.storage.files.errors import Corrupt, Missing, Removed
from layerwise.storage.files.publishing import copy_within, overwrite, publish, remove_quietly
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.formats.tensor_entry import TensorEntry
from layerwise.storage.integrity import require_content, require_sizes
from layerwise.storage.location import StoreLocation
from layerwise.storage.pauses import longest_pause, since_boot
from layerwise.storage.resume_points import RESUME_POINT_FILE, ResumePoint, read_resume_point
from layerwise.storage.signs_of_life import storage_clock
from layerwise.storage.stage import Stage

logger = logging.getLogger(__name__)


class Committed(Exception):
    """Another process has committed the artifact that this one is still working on."""


class Draft:
    """Files of an artifact that is being written. Other processes do not see them.

    Attributes:
        files: files written so far, including those of an earlier attempt that left a resume point.
        facts: small results for the manifest; plain JSON.
        made: how this attempt made the artifact, for the manifest, in addition to time and memory; not part of the
            artifact's identity.
        resumed: resume point of an earlier attempt that this one continues; None for a fresh start.
        tokens: tokens of ``resumed`` and of the resume points that this attempt saved.
        began: when this attempt began, by ``since_boot``.
    """

    def __init__(self, store: StoreLocation, stage: Stage) -> None:
        self.files: dict[str, StoredFile] = {}
        self.facts: dict[str, object] = {}
        self.made: dict[str, object] = {}
        self.resumed: ResumePoint | None = None
        self.tokens: set[str] = set()
        self._store, self._stage = store, stage
        self._attempt = f"{stage.key}/{uuid.uuid4().hex}"
        self._state: dict[str, StoredFile] = {}  # of the last resume point; deleted after the next one
        self._unusable: set[str] = set()  # tokens of resume points whose files are missing or damaged
        self._inherited: frozenset[str] = frozenset()  # names of files that an earlier attempt wrote
        self._started, self._seconds_before = time.monotonic(), 0.0
        self._booted: float | None = None  # boot time by the storage's clock; known once a file is written
        self.began = self._checked = since_boot()  # time of the last check of its files

    def write(
        self,
        name: str,
        data: bytes | Iterable[bytes | memoryview],
        tensors: dict[str, TensorEntry] | None = None,
        expected_size: int = 0,
    ) -> StoredFile:
        """Write one file. After an error nothing of it remains.

        Args:
            name: of the file, may contain "/".
            data: the content, as a whole or in consecutive pieces.
            tensors: entry of each tensor in the file (set by ``write_tensors``).
            expected_size: see ``publish``; needed for pieces of more than 84 GB in all.

        Raises:
            ValueError: ``name`` is not a valid name, or this attempt already wrote it.
            Removed: another process deleted the file while it was being written.
        """
        path = f"{self._attempt}/{checked_name(name)}"
        if name in self.files and self.files[name].path == path:
            raise ValueError(
                f"{self._stage.key}: the file {name!r} was already written. Files are never changed: "
                "choose another name, or write it once."
            )
        if isinstance(data, bytes | bytearray | memoryview):
            data, expected_size = [data], len(data)
        size, digest, date = publish(self._store.fs, self._store.path(path), data, expected_size)
        # The latest: S3 truncates dates to seconds, and dates a large file by the beginning of its upload.
        self._booted = max(date - since_boot(), self._booted or 0.0)
        self.files[name] = StoredFile(path, size, digest, tensors)
        self._inherited -= {name}
        return self.files[name]

    def save_resume_point(self, step: int, write_state: Callable[["Draft"], None]) -> None:
        """Commit a resume point: a new attempt gets all files written so far and continues from here.

        Commits nothing if another process that works on the same stage has progressed further.

        Args:
            step: value of ``resumed.step`` in the new attempt; usually the number of the next piece of work.
            write_state: writes what is needed to continue into a draft of its own. These files are kept until the
                next resume point, and are not part of the artifact.

        Raises:
            Committed: another process has finished the artifact.
            Removed: another process deleted files of this attempt while this process was paused.
        """
        if longest_pause(self._checked):
            self.require_files()
        if self._is_behind(step):
            return
        state = Draft(self._store, self._stage)
        write_state(state)
        if self._is_behind(step):  # check again: writing gigabytes of state takes time
            state.remove_files()
            return
        resume_point = ResumePoint(
            step,
            Artifact(f"{self._stage.key}/{RESUME_POINT_FILE}", state.files, state.facts),
            self.files,
            self.facts,
            self.seconds,
            datetime.now(UTC).isoformat(timespec="seconds"),
            socket.gethostname(),
        )
        document = seal(resume_point.to_json(self._stage.key))
        overwrite(self._store.fs, self._resume_point_path, document)
        self.tokens.add(json.loads(document)["token"])
        logger.debug("%s: resume point %d committed", self._stage.key, step)
        self._remove_state()
        self._state = state.files

    def resume(self, unusable: Set[str] = frozenset()) -> None:
        """Continue from the resume point of an earlier attempt, if there is one and all its files exist.

        Args:
            unusable: tokens of resume points that were tried and are damaged.
        """
        self._unusable = set(unusable)
        while resume_point := self._current_resume_point():
            try:
                require_sizes(self._store, resume_point.all_files)
            except Corrupt as error:
                # Another process that works on this stage may have replaced it, and deleted its state.
                self._unusable.add(resume_point.token)
                logger.warning("%s: a resume point cannot be used: %s", self._stage.key, error)
                continue
            self.files, self.facts = dict(resume_point.files), dict(resume_point.facts)
            self.resumed = resume_point
            self._inherited = frozenset(resume_point.files)
            self.tokens.add(resume_point.token)
            self._state, self._seconds_before = dict(resume_point.state.files), resume_point.seconds
            return

    def gather(self) -> None:
        """Copy the files of earlier attempts into this attempt's folder, within the storage.

        For artifacts whose folder is opened by programs that do not read manifests.

        Raises:
            Damaged: a file is missing; the resume point that names it is unusable.
        """
        for name, file in self.files.items():
            path = f"{self._attempt}/{name}"
            if file.path != path:
                source = self._store.path(file.path)
                try:
                    copy_within(self._store.fs, source, self._store.path(path))
                except FileNotFoundError as error:
                    raise self._damaged_resume_point(Missing(source)) from error
                self.files[name] = replace(file, path=path)

    def check_inherited(self) -> None:
        """Read and check the files of earlier attempts; for artifacts that this program never reads itself.

        Raises:
            Damaged: a file differs from what was written; the resume point that names it is unusable.
        """
        for name in sorted(self._inherited):
            try:
                require_content(self._store, self.files[name])
            except Corrupt as error:
                raise self._damaged_resume_point(error) from error

    def require_files(self) -> None:
        """Check that all files exist, before the manifest names them.

        Raises:
            Damaged: a file of an earlier attempt does not; the resume point that names it is unusable.
            Removed: a file of this attempt no longer exists.
            Corrupt: a file of this attempt has another size.
        """
        self._checked = since_boot()
        for names in (self._inherited, self.files.keys() - self._inherited):
            try:
                require_sizes(self._store, [self.files[name] for name in sorted(names)])
            except Corrupt as error:
                if names is self._inherited:
                    raise self._damaged_resume_point(error) from error
                if isinstance(error, Missing):
                    raise Removed(error.path) from error
                raise Corrupt(
                    f"{self._stage.key} cannot be committed: {error}. Another process changed it since. Run again, and "
                    "let only layerwise write to the store."
                ) from error

    def remove_resume_point(self) -> None:
        """Delete the resume point, after the artifact was committed."""
        remove_quietly(self._store.fs, [self._resume_point_path])
        self._remove_state()

    def remove_files(self) -> None:
        """Delete the files written so far."""
        remove_quietly(self._store.fs, [self._store.path(file.path) for file in self.files.values()])
        self.files = {}

    @property
    def how_it_was_made(self) -> dict[str, object]:
        """Time, duration in seconds, and peak memory of this process so far in bytes.

        Raises:
            OSError: the storage's time cannot be read.
        """
        return {
            "at": datetime.fromtimestamp(self._storage_time(), UTC).isoformat(timespec="milliseconds"),
            "clock": STORAGE_CLOCK,
            "seconds": self.seconds,
            "peak_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,  # in KiB on Linux
            **self.made,
        }

    @property
    def seconds(self) -> float:
        """Time spent on this artifact, including earlier attempts up to their last resume point."""
        return round(self._seconds_before + time.monotonic() - self._started, 3)

    def _storage_time(self) -> float:
        """Return the current time by the storage's clock, in seconds since 1970: clocks of machines may differ."""
        if self._booted is None:
            return storage_clock(self._store)
        return self._booted + since_boot()

    @property
    def _resume_point_path(self) -> str:
        return self._store.path(f"{self._stage.key}/{RESUME_POINT_FILE}")

    def _current_resume_point(self) -> ResumePoint | None:
        """Return the stage's current resume point, from any attempt; None if there is no usable one."""
        try:
            resume_point = read_resume_point(self._store, self._stage.key)
        except Corrupt as error:
            logger.warning("%s has a resume point that cannot be used: %s", self._stage.key, error)
            return None
        return None if resume_point is None or resume_point.token in self._unusable else resume_point

    def _is_behind(self, step: int) -> bool:
        """Return whether another process that works on this stage has progressed further.

        Raises:
            Committed: it has finished the artifact.
        """
        try:
            read_sealed(self._store.fs, self._store.path(f"{self._stage.key}/{MANIFEST}"))
        except (FileNotFoundError, Corrupt):
            current = self._current_resume_point()
            return current is not None and current.step > step
        raise Committed(self._stage.key)

    def _damaged_resume_point(self, error: Corrupt) -> Damaged:
        assert self.resumed is not None, "only a resume point brings files of earlier attempts"
        return Damaged(str(error), self.resumed.state.key, self.resumed.token)

    def _remove_state(self) -> None:
        remove_quietly(self._store.fs, [self._store.path(file.path) for file in self._state.values()])
        self._state = {}
