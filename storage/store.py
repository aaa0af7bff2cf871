"""The artifact store: find what was built, build what was not."""

import contextlib
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any

from xxhash import xxh3_128_hexdigest

from storage.artifact import Artifact, StoredFile, files_from_json, files_to_json
from storage.document import read_sealed, seal
from storage.draft import Draft
from storage.files import Corrupt, is_local, open_filesystem, read_exactly
from storage.publishing import create_once
from storage.stage import Stage

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class ArtifactStore:
    """Artifacts below one URL.

    Layout: ``<root>/<stage name>/<digest>/manifest.json`` commits an artifact; its files lie beside it, in a
    folder private to the attempt that wrote them. The manifest is written last and only once, so a crash
    leaves garbage but never a half-built artifact.

    Args:
        url: a folder or any fsspec URL, such as ``s3://bucket/runs``; credentials come from the environment.
        options: for fsspec, such as ``endpoint_url``.

    Attributes:
        built: keys of the stages whose ``build`` was called through this object; all others were found.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self.url = url
        self.fs, root = open_filesystem(url, **options)
        self.root = root.rstrip("/")
        self.built: set[str] = set()

    def __repr__(self) -> str:
        return f"ArtifactStore({self.url!r})"  # without the options: they may hold a secret

    def find(self, stage: Stage) -> Artifact | None:
        """The artifact of ``stage``, or None if nobody has committed it.

        Raises:
            Corrupt: if its manifest is damaged, or names files that are not its own.
        """
        return self._find(stage.key)

    def get(self, key: str) -> Artifact:
        """The artifact committed under ``key``.

        Raises:
            KeyError: if there is none.
            Corrupt: as for ``find``.
        """
        artifact = self._find(key)
        if artifact is None:
            raise KeyError(f"{self!r} has no artifact {key!r}. Build it first, or check the store's URL.")
        return artifact

    def get_or_build(self, stage: Stage, build: Callable[[Draft], None]) -> Artifact:
        """The artifact of ``stage``; calls ``build`` only if no one has committed it yet.

        If another process commits the same stage meanwhile, its artifact is returned and ours is dropped.
        """
        if artifact := self.find(stage):
            return artifact
        self.built.add(stage.key)
        draft = self._built_draft(stage, build)
        manifest = {
            "key": stage.key,
            "recipe": stage.recipe,
            "files": files_to_json(draft.files),
            "facts": draft.facts,
            "made": {"at": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": draft.seconds},
        }
        if not create_once(self.fs, self._manifest_path(stage.key), seal(manifest)):
            logger.info("%s was committed by another process first; using that one", stage.key)
        committed = self.find(stage)
        assert committed is not None, "a manifest that was created must be readable"
        draft.remove_progress()
        return committed

    def _built_draft(self, stage: Stage, build: Callable[[Draft], None]) -> Draft:
        draft = Draft(self.fs, self.root, stage)
        draft.resume()
        try:
            build(draft)
        except Corrupt as error:
            if draft.resumed is None or not draft.resumed.holds(error):
                raise
            logger.warning("%s starts afresh, its resume point is damaged: %s", stage.key, error)
            draft = Draft(self.fs, self.root, stage)
            build(draft)
        return draft

    def read(self, artifact: Artifact, name: str) -> bytes:
        """The content of one file, checked; for files that fit into memory easily.

        Raises:
            KeyError: if the artifact has no such file.
            Corrupt: if the file is missing or not what was written, twice in a row.
        """
        file = self.file(artifact, name)
        path = f"{self.root}/{file.path}"
        with self.naming_missing_files(artifact, name):
            size = self.fs.info(path)["size"]
            if size != file.size:
                raise Corrupt(
                    f"{artifact.key}: {name!r} ({path}) has {size} bytes, but {file.size} were written: it "
                    "was truncated or replaced. Delete the artifact's manifest and run again."
                )
            content = bytearray(size)
            for _ in range(2):  # bits flip on the way, too
                read_exactly(self.fs, path, 0, memoryview(content))
                if xxh3_128_hexdigest(content) == file.digest:
                    return bytes(content)
        raise Corrupt(
            f"{artifact.key}: {name!r} ({path}) has digest {xxh3_128_hexdigest(content)}, but {file.digest} "
            "was recorded: it was damaged or replaced. Delete the artifact's manifest and run again."
        )

    def file(self, artifact: Artifact, name: str) -> StoredFile:
        """The manifest's entry of one file.

        Raises:
            KeyError: if the artifact has no such file.
        """
        try:
            return artifact.files[name]
        except KeyError:
            raise KeyError(f"{artifact.key} has no file {name!r}; it has {sorted(artifact.files)}") from None

    def artifacts(self) -> Iterator[Artifact]:
        """All committed artifacts, by listing: for people. Damaged ones are skipped with a warning."""
        for stage_folder in self._subfolders(self.root):
            for folder in self._subfolders(stage_folder):
                key = "/".join(folder.rstrip("/").split("/")[-2:])
                try:
                    artifact = self._find(key)
                except Corrupt as error:
                    logger.warning("%s is skipped: %s", key, error)
                    continue
                if artifact is not None:
                    yield artifact

    def location(self, artifact: Artifact, name: str = "") -> str:
        """Where a file is, for people: a plain path on a local disk, a URL elsewhere.

        Args:
            name: of the file; "" for the folder that holds all files, which is the attempt's folder unless
                the artifact was finished by a second attempt (``storage.copies`` makes one folder of it).
        """
        if name:
            path = self.file(artifact, name).path
        else:
            attempts = {"/".join(file.path.split("/")[:3]) for file in artifact.files.values()}
            path = attempts.pop() if len(attempts) == 1 else artifact.key
        full = f"{self.root}/{path}"
        return full if is_local(self.fs) else str(self.fs.unstrip_protocol(full))

    @contextlib.contextmanager
    def naming_missing_files(self, artifact: Artifact, name: str) -> Iterator[None]:
        """Report a missing file of a committed artifact as ``Corrupt``, by name."""
        try:
            yield
        except FileNotFoundError as error:
            raise Corrupt(
                f"{artifact.key}: its file {name!r} ({self.root}/{self.file(artifact, name).path}) is "
                "missing from the store. Restore it, or delete the artifact's manifest and run again."
            ) from error

    def _find(self, key: str) -> Artifact | None:
        path = self._manifest_path(key)
        try:
            manifest = read_sealed(self.fs, path)
        except FileNotFoundError:
            return None
        try:
            if manifest["key"] != key:
                raise ValueError(f"it belongs to {manifest['key']}")
            files = files_from_json(manifest["files"], key)
            facts, recipe, made = (dict(manifest[part]) for part in ("facts", "recipe", "made"))
            return Artifact(key, files, facts, recipe, made)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Corrupt(
                f"{path} is not the manifest of {key} ({error}): it was copied or edited. "
                "Delete it and run again."
            ) from error

    def _manifest_path(self, key: str) -> str:
        return f"{self.root}/{key}/{MANIFEST}"

    def _subfolders(self, path: str) -> list[str]:
        try:
            rows = self.fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(row["name"] for row in rows if row["type"] == "directory")
