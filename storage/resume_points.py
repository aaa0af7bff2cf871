"""Resume points: the state at which an attempt at an artifact stopped, and from which another one continues.

``Draft.save_resume_point`` writes one. Its state is chosen by each task: hidden states, statistics and outcomes so far.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from layerwise.storage.artifact import Artifact, Damaged, StoredFile, files_from_json, files_to_json
from layerwise.storage.formats.document import read_sealed
from layerwise.storage.location import StoreLocation

RESUME_POINT_FILE = "progress.json"


@dataclass(frozen=True)
class ResumePoint:
    """State of an unfinished attempt at a stage, from which another attempt continues.

    Attributes:
        step: number that it was saved under.
        state: files needed to continue; read them like those of an artifact.
        files: files of the artifact written so far.
        facts: facts of the artifact known so far.
        seconds: time spent so far.
        at: when it was saved (ISO 8601, UTC).
        host: name of the machine that saved it.
    """

    step: int
    state: Artifact
    files: Mapping[str, StoredFile]
    facts: Mapping[str, object]
    seconds: float
    at: str
    host: str

    @property
    def token(self) -> str:
        """Token that distinguishes it from other resume points of the stage; "" before it is written."""
        return self.state.token

    @property
    def all_files(self) -> list[StoredFile]:
        """All files that are needed to continue, and those of the artifact."""
        return [*self.files.values(), *self.state.files.values()]

    def to_json(self, key: str) -> dict[str, object]:
        """Return the content of the file that ``from_json`` reads."""
        return {
            "key": key,
            "step": self.step,
            "files": files_to_json(self.files),
            "facts": self.facts,
            "state": {"files": files_to_json(self.state.files), "facts": self.state.facts},
            "seconds": self.seconds,
            "at": self.at,
            "host": self.host,
        }

    @classmethod
    def from_json(cls, document: dict, key: str) -> "ResumePoint":
        """Return the resume point that ``to_json`` wrote for the stage ``key``.

        Raises:
            Damaged: it belongs to another stage, or names files outside of the stage's folder.
        """
        name = f"{key}/{RESUME_POINT_FILE}"
        try:
            if document["key"] != key:
                raise ValueError(f"it belongs to {document['key']}")
            state = files_from_json(document["state"]["files"], key)
            return cls(
                int(document["step"]),
                Artifact(name, state, dict(document["state"]["facts"]), token=document["token"]),
                files_from_json(document["files"], key),
                dict(document["facts"]),
                float(document["seconds"]),
                str(document["at"]),
                str(document["host"]),
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(f"{name} is not a resume point of this stage ({error})", name) from error


def read_resume_point(store: StoreLocation, key: str) -> ResumePoint | None:
    """Return the current resume point of a stage, from any attempt; None if there is none.

    Raises:
        Corrupt: it is damaged.
        Unreachable: the storage does not answer.
    """
    try:
        return ResumePoint.from_json(read_sealed(store.fs, store.path(f"{key}/{RESUME_POINT_FILE}")), key)
    except FileNotFoundError:
        return None
