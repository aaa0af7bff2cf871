"""Resume points: where an earlier attempt at an artifact stopped, and what is needed to go on."""

from collections.abc import Mapping
from dataclasses import dataclass

from fsspec import AbstractFileSystem

from layerwise.storage.artifact import Artifact, StoredFile, files_from_json, files_to_json
from layerwise.storage.damage import Damaged
from layerwise.storage.formats.document import read_sealed

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where an earlier attempt of the same stage stopped.

    Args:
        step: the number it was saved under.
        state: the files needed to go on; read them like those of any artifact.
        files: of the artifact, written up to then.
        facts: of the artifact, known up to then.
        seconds: spent up to then.
        at: when it was saved (ISO 8601, UTC), and by which machine.
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
        """Tells it from other resume points of the stage; "" before it is written."""
        return self.state.token

    @property
    def all_files(self) -> list[StoredFile]:
        """Everything that is needed to go on, and for the artifact."""
        return [*self.files.values(), *self.state.files.values()]

    def to_json(self, key: str) -> dict[str, object]:
        """The content of the file that ``from_json`` reads."""
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
    def from_json(cls, document: dict, key: str) -> "Progress":
        """The resume point that ``to_json`` wrote for the stage ``key``.

        Raises:
            Damaged: it is of another stage, or names files that are not the stage's own.
        """
        name = f"{key}/{PROGRESS}"
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


def read_progress(fs: AbstractFileSystem, root: str, key: str) -> Progress | None:
    """The present resume point of a stage, whoever wrote it; None if there is none.

    Raises:
        Corrupt: if it is damaged.
        Unreachable: if the storage does not answer.
    """
    try:
        return Progress.from_json(read_sealed(fs, f"{root}/{key}/{PROGRESS}"), key)
    except FileNotFoundError:
        return None
