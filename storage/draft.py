"""An artifact that is still being written, and the resume points it leaves on the way."""

import logging
import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from storage.artifact import Artifact, StoredFile, checked_name, files_from_json, files_to_json
from storage.document import read_sealed, seal
from storage.files import Corrupt
from storage.publishing import overwrite, publish, remove_quietly
from storage.stage import Stage
from storage.tensor_entry import TensorEntry

logger = logging.getLogger(__name__)

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where an earlier attempt of the same stage stopped.

    Args:
        step: the number it was saved under.
        state: the files needed to go on; read them like those of any artifact.
    """

    step: int
    state: Artifact

    def holds(self, error: Corrupt) -> bool:
        """Whether it is this state's own files that ``error`` is about."""
        return any(file.path in str(error) for file in self.state.files.values())


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

        Args:
            step: what ``resumed.step`` will be; the number of the next piece of work, say.
            write_state: writes what is needed to go on into a draft of its own. These files live until the
                next resume point, and are no part of the artifact.
        """
        state = Draft(self._fs, self._root, self._stage)
        write_state(state)
        document = {
            "key": self._stage.key,
            "step": step,
            "files": files_to_json(self.files),
            "facts": self.facts,
            "state": {"files": files_to_json(state.files), "facts": state.facts},
            "seconds": self.seconds,
        }
        overwrite(self._fs, self._progress_path, seal(document))
        logger.debug("%s: resume point %d committed", self._stage.key, step)
        self._remove_state()
        self._state = state.files

    def resume(self) -> None:
        """Go on from the resume point of an earlier attempt, if there is one and all its files are there."""
        try:
            self._adopt(read_sealed(self._fs, self._progress_path))
        except FileNotFoundError:
            return
        except Corrupt as error:
            logger.warning("%s starts afresh, its resume point is unusable: %s", self._stage.key, error)

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

    def _adopt(self, document: dict) -> None:
        key = self._stage.key
        try:
            if document["key"] != key:
                raise ValueError(f"it belongs to {document['key']}")
            files = files_from_json(document["files"], key)
            state = files_from_json(document["state"]["files"], key)
            progress = Progress(
                int(document["step"]), Artifact(f"{key}/{PROGRESS}", state, document["state"]["facts"])
            )
            facts, seconds = dict(document["facts"]), float(document["seconds"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Corrupt(f"{self._progress_path} is not a resume point of this stage ({error})") from error
        self._require_sizes([*files.values(), *state.values()])
        self.files, self.facts, self.resumed = files, facts, progress
        self._state, self._seconds_before = state, seconds

    def _require_sizes(self, files: list[StoredFile]) -> None:
        for file in files:
            path = f"{self._root}/{file.path}"
            try:
                size = self._fs.info(path)["size"]
            except FileNotFoundError as error:
                raise Corrupt(f"{path} is missing") from error
            if size != file.size:
                raise Corrupt(f"{path} has {size} bytes, not the {file.size} that were written")

    def _remove_state(self) -> None:
        remove_quietly(self._fs, [f"{self._root}/{file.path}" for file in self._state.values()])
        self._state = {}
