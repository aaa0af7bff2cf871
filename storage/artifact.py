"""Artifacts: committed, immutable sets of files, as their manifests describe them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

from layerwise.storage.files.errors import Corrupt
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.formats.tensor_entry import TensorEntry

MANIFEST = "manifest.json"
# ``made["clock"]`` if ``made["at"]`` is by the storage's clock; older artifacts lack it.
STORAGE_CLOCK = "storage"
COPIED = 3600.0  # seconds between an artifact's own time and its manifest's: clocks rarely differ by more


class Damaged(Corrupt):
    """An artifact or a resume point is damaged. Its key says which one, so that it can be rebuilt.

    Attributes:
        key: of the artifact, as in its manifest; the key of a resume point ends with the name of its file.
        token: of the manifest or resume point that was examined; "" if it could not be read.
    """

    def __init__(self, message: str, key: str, token: str = "") -> None:
        super().__init__(message)
        self.key, self.token = key, token

    def __reduce__(self) -> tuple[type["Damaged"], tuple[str, str, str]]:  # type: ignore[override]
        return Damaged, (str(self), self.key, self.token)


@dataclass(frozen=True)
class StoredFile:
    """One file of an artifact.

    Attributes:
        path: relative to the store's root.
        size: in bytes.
        digest: xxh3_128 of the content, 32 hex digits.
        tensors: entry of each tensor, for files written by ``write_tensors``.
    """

    path: str
    size: int
    digest: str
    tensors: dict[str, TensorEntry] | None = None

    def to_json(self) -> dict[str, object]:
        row: dict[str, object] = {"path": self.path, "size": self.size, "digest": self.digest}
        if self.tensors is not None:
            row["tensors"] = {name: entry.to_json() for name, entry in self.tensors.items()}
        return row

    @classmethod
    def from_json(cls, row: dict, folder: str) -> "StoredFile":
        """Return the file that ``to_json`` wrote.

        Raises:
            ValueError: its path is not below ``folder``, or a number is wrong.
        """
        checked_name(row["path"].removeprefix(f"{folder}/"))
        if not row["path"].startswith(f"{folder}/"):
            raise ValueError(f"the path {row['path']!r} is not below {folder!r}")
        if type(row["size"]) is not int or row["size"] < 0:
            raise ValueError(f"{row['path']!r} would have {row['size']!r} bytes")
        tensors = row.get("tensors")
        if tensors is not None:
            tensors = {name: TensorEntry.from_json(entry) for name, entry in tensors.items()}
        return cls(row["path"], row["size"], row["digest"], tensors)


@dataclass(frozen=True)
class Artifact:
    """A committed, immutable set of files. Small enough to pass between tasks.

    Attributes:
        key: its address in the store, ``<stage name>/<digest>``.
        files: by the name they were written under.
        facts: small results that are read without opening a file; plain JSON.
        recipe: the stage as plain JSON: name, version, settings, inputs.
        made: time, duration and memory of the build; not part of the artifact's identity.
        token: of the manifest; distinguishes it from a manifest that another attempt wrote.
        dated: modification time of its manifest according to the storage's listing, in seconds since 1970; None if
            it was not listed.
    """

    key: str
    files: dict[str, StoredFile]
    facts: dict[str, object] = field(default_factory=dict)
    recipe: dict[str, object] = field(default_factory=dict)
    made: dict[str, object] = field(default_factory=dict)
    token: str = ""
    dated: float | None = field(default=None, compare=False)

    @property
    def committed(self) -> float:
        """Time of its commit by the storage's clock, in seconds since 1970.

        This is the date of the manifest, unless the store was copied since: a copy gives all manifests new dates, in any
        order. Therefore the recorded time is used if it is by the storage's clock. Artifacts of older versions
        recorded it by their writer's clock; that time is used if the manifest is dated more than ``COPIED`` later.
        """
        if self.dated is None:
            return self.recorded
        is_certain = self.made.get("clock") == STORAGE_CLOCK or self.dated - self.recorded > COPIED
        return min(self.recorded, self.dated) if is_certain else self.dated

    @property
    def recorded(self) -> float:
        """Time of its commit as its writer recorded it, in seconds since 1970."""
        return datetime.fromisoformat(str(self.made["at"])).timestamp()

    @property
    def content(self) -> str:
        """Digest of all bytes: artifacts with equal files have equal content, whatever their key."""
        return digest({name: [file.size, file.digest] for name, file in self.files.items()})

    @property
    def size(self) -> int:
        """Total size of all files in bytes."""
        return sum(file.size for file in self.files.values())

    @property
    def folder(self) -> str:
        """Path of the folder that contains all files, relative to the store's root.

        This is the folder of the attempt, or of the stage if two attempts wrote the files and they were not gathered
        (``Draft.gather``).
        """
        attempts = {"/".join(file.path.split("/")[:3]) for file in self.files.values()}
        return attempts.pop() if len(attempts) == 1 else self.key


def newest(artifacts: Iterable[Artifact], wanted: Callable[[Artifact], bool]) -> Artifact | None:
    """Return the artifact that was committed last among the wanted ones; None if there is none."""
    return max(filter(wanted, artifacts), key=lambda each: each.committed, default=None)


def newest_from(artifacts: Iterable[Artifact], name: str, role: str, source: Artifact) -> Artifact | None:
    """Return the newest artifact of the stage ``name`` that has ``source`` as its input ``role``; None if there is none."""

    def reads_source(artifact: Artifact) -> bool:
        return artifact.recipe.get("name") == name and input_of(artifact, role) == source.key

    return newest(artifacts, reads_source)


def input_of(artifact: Artifact, role: str) -> object:
    """Return the key of the input ``role`` of an artifact; None if it has no such input."""
    inputs = artifact.recipe.get("inputs")
    return inputs.get(role) if isinstance(inputs, dict) else None


def files_to_json(files: Mapping[str, StoredFile]) -> dict[str, object]:
    return {name: file.to_json() for name, file in files.items()}


def files_from_json(rows: Mapping[str, dict], folder: str) -> dict[str, StoredFile]:
    """Return the files that ``files_to_json`` wrote.

    Raises:
        ValueError: a path is not below ``folder``.
    """
    return {name: StoredFile.from_json(row, folder) for name, row in rows.items()}


def checked_name(name: str) -> str:
    """Return ``name`` if it can be the name of a file below a folder on every storage.

    Raises:
        ValueError: it is absolute, has an empty, ``.`` or ``..`` part, or unsafe characters.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable() or "\\" in name:
        raise ValueError(
            f"{name!r} cannot be the name of a file in an artifact: it could leave its folder. Use a "
            "relative name of printable characters, without backslashes, empty parts, '.' and '..'."
        )
    return name
