"""A stage: the recipe of one artifact, which determines its key."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from layerwise.storage.formats.canonical_json import canonical_json, digest

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # one folder name on every file system


@dataclass(frozen=True)
class Stage:
    """Identity of an artifact: everything that is part of its key.

    The storage, the device and the number of workers are not part of a stage, so they cannot change its key.

    Attributes:
        name: name of the stage.
        version: raise it when the meaning of the stage changes.
        settings: settings that determine the artifact, as plain values (see ``canonical_json``).
        inputs: everything else that the artifact is made from, by role: the key of an artifact, or the digest of a content.

    Raises:
        ValueError: ``name`` cannot be the name of a folder.
    """

    name: str
    version: int
    settings: object = None
    inputs: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not STAGE_NAME.fullmatch(self.name):
            raise ValueError(
                f"the stage name {self.name!r} cannot be the name of a folder on every storage. "
                "Use letters, digits, '_', '-' and '.', beginning with a letter or digit."
            )

    @cached_property
    def key(self) -> str:
        """Key of the artifact, ``<name>/<digest>``. The digest covers version, settings and inputs."""
        return f"{self.name}/{digest(self._content)}"

    @cached_property
    def recipe(self) -> dict[str, object]:
        """The stage as plain JSON, for display and for the manifest."""
        return {"name": self.name, **json.loads(canonical_json(self._content))}

    @property
    def _content(self) -> dict[str, object]:
        return {"version": self.version, "settings": self.settings, "inputs": self.inputs}
