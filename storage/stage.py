"""A stage: the recipe of one artifact, and therefore its address."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from layerwise.storage.keys import canonical_json, digest

STAGE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")  # one folder name on every file system


@dataclass(frozen=True)
class Stage:
    """What an artifact *is*: the step that makes it, the settings, the artifacts it reads.

    Where it is stored, which device computes it and how many workers help are not part of a
    stage, so none of them can change its key. Raise ``version`` when the step's meaning changes.

    Raises:
        ValueError: if ``name`` cannot be the name of a folder.
    """

    name: str
    version: int
    settings: object = None
    inputs: Mapping[str, str] = field(default_factory=dict)  # role -> key of the artifact

    def __post_init__(self) -> None:
        if not STAGE_NAME.fullmatch(self.name):
            raise ValueError(
                f"the stage name {self.name!r} cannot be the name of a folder on every storage. "
                "Use letters, digits, '_', '-' and '.', beginning with a letter or digit."
            )

    @cached_property
    def key(self) -> str:
        """``<name>/<digest>``: the digest covers version, settings and inputs."""
        return f"{self.name}/{digest(self._content)}"

    @cached_property
    def recipe(self) -> dict[str, object]:
        """The stage as plain JSON, for people and for the manifest."""
        return {"name": self.name, **json.loads(canonical_json(self._content))}

    @property
    def _content(self) -> dict[str, object]:
        return {"version": self.version, "settings": self.settings, "inputs": self.inputs}
