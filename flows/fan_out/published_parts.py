"""Parts of searches in the store: a search publishes them, and workers on any machine claim and run them.

A part has up to three files: its description, which the search creates and removes; the claim, which exactly one worker
creates, and which names the sign of life of that worker; and the end, which this worker writes. They contain neither code
nor paths of the store. A part whose worker died is published again under another name, so a worker that was only paused
notices that its part is gone.
"""

import socket
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prefect.client.schemas.objects import StateType

from layerwise.flows.fan_out.part import Part
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.files.publishing import create_once, overwrite, remove_quietly
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.inventory import PART_FILE
from layerwise.storage.signs_of_life import list_shared_folder
from layerwise.storage.store import ArtifactStore

FOLDER = "parts"
DESCRIPTION, CLAIM, END = "", ".claim", ".end"


@dataclass(frozen=True)
class PublishedPart:
    """A part as its search describes it to the workers.

    Attributes:
        search: name of the search's sign of life. Without it, nobody takes the part.
        tag: tag of the search, the same in every run of it.
        key: digest of the work, see ``Part.key``.
        flow: name of the part's flow.
        title: name of the part, which includes the search.
        parameters: parameters of the flow without the runtime, which every worker has its own of.
    """

    search: str
    tag: str
    key: str
    flow: str
    title: str
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, part: Part, search: str, tag: str) -> "PublishedPart":
        """Return the description of a part."""
        parameters = {name: value for name, value in part.parameters.items() if name != "runtime"}
        return cls(search, tag, part.key, part.flow, part.run_name, parameters)


@dataclass(frozen=True)
class PartEnd:
    """How the run of a part ended in its worker: the state of its flow run there."""

    state: StateType
    message: str


def publish_part(store: ArtifactStore, part: PublishedPart) -> str:
    """Publish a part, and return its name.

    Raises:
        OSError: the storage cannot be written, or does not answer.
    """
    name = uuid.uuid4().hex
    overwrite(store.fs, _path(store, name, DESCRIPTION), seal(asdict(part)))
    return name


def list_parts(store: ArtifactStore) -> dict[str, set[str]]:
    """Return the published parts by name, each with the kinds of its files.

    Raises:
        OSError: the storage does not answer.
    """
    parts: dict[str, set[str]] = {}
    for row in list_shared_folder(store, FOLDER):
        if match := PART_FILE.fullmatch(store.relative(row["name"])):
            parts.setdefault(match["part"], set()).add(f".{match['news']}" if match["news"] else DESCRIPTION)
    return parts


def read_part(store: ArtifactStore, name: str) -> PublishedPart | None:
    """Return the description of a part; None if it was removed, or comes from another version.

    Raises:
        OSError: the storage does not answer.
    """
    content = _read(store, name, DESCRIPTION)
    fields = PublishedPart.__dataclass_fields__
    if content is None or not fields.keys() <= content.keys():
        return None
    return PublishedPart(**{field: content[field] for field in fields})


def claim_part(store: ArtifactStore, name: str, sign: str) -> bool:
    """Claim a part for this process; return False if another worker has it, or its search has removed it.

    Args:
        sign: name of this process's sign of life.

    Raises:
        OSError: the storage cannot be written, or does not answer.
    """
    if not create_once(
        store.fs, _path(store, name, CLAIM), seal({"sign": sign, "host": socket.gethostname()})
    ):
        return False
    if read_part(store, name) is None:  # removed since it was listed
        remove_quietly(store.fs, [_path(store, name, CLAIM)])
        return False
    return True


def read_claim(store: ArtifactStore, name: str) -> str | None:
    """Return the name of the sign of life of the worker that has claimed a part; None if nobody has.

    Raises:
        OSError: the storage does not answer.
    """
    content = _read(store, name, CLAIM)
    return None if content is None else str(content["sign"])


def report_end(store: ArtifactStore, name: str, end: PartEnd) -> None:
    """Tell the search how a part ended, unless the search has removed the part.

    Raises:
        OSError: the storage cannot be written, or does not answer.
    """
    if read_part(store, name) is not None:
        overwrite(store.fs, _path(store, name, END), seal({"state": end.state.value, "message": end.message}))


def read_end(store: ArtifactStore, name: str) -> PartEnd | None:
    """Return how a part ended in its worker; None if it has not ended.

    Raises:
        OSError: the storage does not answer.
    """
    content = _read(store, name, END)
    return None if content is None else PartEnd(StateType(content["state"]), str(content["message"]))


def remove_part(store: ArtifactStore, name: str) -> None:
    """Remove all files of a part. A worker that runs it stops at its next layer."""
    # The description first: without it, nobody claims the part.
    remove_quietly(store.fs, [_path(store, name, kind) for kind in (DESCRIPTION, CLAIM, END)])


def _path(store: ArtifactStore, name: str, kind: str) -> str:
    return store.path(f"{FOLDER}/{name}{kind}.json")


def _read(store: ArtifactStore, name: str, kind: str) -> dict[str, Any] | None:
    try:
        return read_sealed(store.fs, _path(store, name, kind))
    except (FileNotFoundError, Corrupt):  # damaged: as good as removed
        return None
