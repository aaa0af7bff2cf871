"""The artifact store: returns the artifact of a stage, and builds it only if it does not exist."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from xxhash import xxh3_128_hexdigest

from layerwise.storage.artifact import (
    MANIFEST,
    Artifact,
    Damaged,
    StoredFile,
    files_from_json,
    files_to_json,
)
from layerwise.storage.draft import Committed, Draft
from layerwise.storage.files.errors import Corrupt, Removed
from layerwise.storage.files.publishing import create_once, require_exclusive_creation
from layerwise.storage.files.reading import read_exactly
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.integrity import require_size
from layerwise.storage.inventory import take_inventory
from layerwise.storage.layer_cache import LayerCache
from layerwise.storage.location import StoreLocation
from layerwise.storage.pauses import why_files_are_gone
from layerwise.storage.resume_points import ResumePoint, read_resume_point
from layerwise.storage.stage import STAGE_NAME, Stage

logger = logging.getLogger(__name__)

REBUILDS = 3  # maximum for a stage whose files other processes delete while it is being built
KEY = re.compile(rf"{STAGE_NAME.pattern}/[0-9a-f]{{32}}")


class ArtifactStore(StoreLocation):
    """Artifacts below one URL.

    Layout: ``<root>/<stage name>/<digest>/manifest.json`` commits an artifact. Its files are in a folder next to the
    manifest, which belongs to the attempt that wrote them. The manifest is written last and only once, so a crash
    leaves garbage but never a half-built artifact.

    Args:
        url: a folder or any fsspec URL, such as ``s3://bucket/runs``; credentials come from the environment.
        layer_cache: local cache for the tensors of checkpoints in the store, or in remote folders; None for none.
        options: for fsspec, such as ``endpoint_url``.

    Attributes:
        built: keys of the stages whose ``build`` was called through this object; all other artifacts were reused.
    """

    def __init__(self, url: str, layer_cache: LayerCache | None = None, **options: Any) -> None:
        super().__init__(url, **options)
        self.layer_cache = layer_cache
        self.built: set[str] = set()
        self._writable = False  # not checked yet

    def find(self, stage: Stage) -> Artifact | None:
        """Return the artifact of ``stage``, or None if it has not been committed.

        Raises:
            Corrupt: its manifest is damaged, or names files outside of its folder.
        """
        return self._find(stage.key)

    def get(self, key: str) -> Artifact:
        """Return the artifact committed under ``key``.

        Raises:
            KeyError: there is none.
            Corrupt: as for ``find``.
        """
        artifact = self._find(key) if KEY.fullmatch(key) else None
        if artifact is None:
            raise KeyError(f"{self!r} has no artifact {key!r}. Build it first, or check the store's URL.")
        return artifact

    def get_or_build(self, stage: Stage, build: Callable[[Draft], None]) -> Artifact:
        """Return the artifact of ``stage``; call ``build`` only if it has not been committed.

        If another process commits the same stage in the meantime, its artifact is returned and ours is dropped.

        Raises:
            OSError: the storage cannot be written, or does not create files exclusively. Raised before ``build``.
            Corrupt: other processes repeatedly delete its files while it is being built.
            Damaged: an artifact that ``build`` reads is damaged (see ``layerwise.storage.upkeep.set_aside``).
        """
        unusable: set[str] = set()
        removals = 0
        while (artifact := self.find(stage)) is None:
            self._require_writable()
            self.built.add(stage.key)
            draft = self.draft(stage)
            draft.resume(unusable)
            try:
                build(draft)
                draft.require_files()
                self._commit(stage, draft)
            except Committed:
                logger.info("%s was committed by another process in the meantime; using that one", stage.key)
                draft.remove_resume_point()
            except Damaged as error:
                if draft.resumed is None or error.key != draft.resumed.state.key:
                    raise
                # Damaged, or deleted by another process that works on this stage and has left a newer one.
                logger.warning("%s: its resume point cannot be used: %s", stage.key, error)
                unusable |= draft.tokens
            except Removed as error:
                removals += 1
                if removals > REBUILDS:
                    raise Corrupt(
                        f"{stage.key} cannot be built: its files were deleted {removals} times, the last time "
                        f"{error.path}. Stop the program that deletes files in {self.root}, and run again. "
                        "`layerwise gc` spares the files of running processes."
                    ) from error
                logger.warning(
                    "%s: %s. %s It is rebuilt, from its last resume point if there is one.",
                    stage.key,
                    error,
                    why_files_are_gone(draft.began),
                )
        return artifact

    def _commit(self, stage: Stage, draft: Draft) -> None:
        manifest = {
            "key": stage.key,
            "recipe": stage.recipe,
            "files": files_to_json(draft.files),
            "facts": draft.facts,
            "made": draft.how_it_was_made,
        }
        if not create_once(self.fs, self._manifest_path(stage.key), seal(manifest)):
            logger.info("%s was committed by another process first; using that one", stage.key)
        draft.remove_resume_point()

    def draft(self, stage: Stage) -> Draft:
        """Return a draft of ``stage`` that the caller does not commit: to save a resume point."""
        return Draft(self, stage)

    def resume_point(self, stage: Stage) -> ResumePoint | None:
        """Return the resume point of ``stage``; None if there is none that can be read."""
        try:
            return read_resume_point(self, stage.key)
        except Corrupt:
            return None

    def read(self, artifact: Artifact, name: str) -> bytes:
        """Return the content of one file, checked; for files that easily fit into memory.

        Raises:
            KeyError: the artifact has no such file.
            Corrupt: the file is missing, or differs from what was written, twice in a row.
        """
        file = self.file(artifact, name)
        path = self.path(file.path)
        with self.blaming(artifact, name):
            require_size(self, file)
            content = bytearray(file.size)
            for _ in range(2):  # bits can also flip in transit
                read_exactly(self.fs, path, 0, memoryview(content))
                if xxh3_128_hexdigest(content) == file.digest:
                    return bytes(content)
            raise Corrupt(
                f"{path} has digest {xxh3_128_hexdigest(content)}, but {file.digest} was recorded, twice in a row"
            )

    def file(self, artifact: Artifact, name: str) -> StoredFile:
        """Return the manifest's entry of one file.

        Raises:
            KeyError: the artifact has no such file.
        """
        try:
            return artifact.files[name]
        except KeyError:
            raise KeyError(f"{artifact.key} has no file {name!r}; it has {sorted(artifact.files)}") from None

    def artifacts(self, beginning: str = "") -> Iterator[Artifact]:
        """Yield all committed artifacts, from a listing of the store. Damaged ones are skipped with a warning.

        Args:
            beginning: prefix of the keys.
        """
        for key, folder in sorted(take_inventory(self).folders.items()):
            if folder.manifest is None or not key.startswith(beginning):
                continue
            try:
                artifact = self._find(key)
            except Corrupt as error:
                logger.warning("%s is skipped: %s", key, error)
                continue
            if artifact is not None:
                yield replace(artifact, dated=folder.manifest.modified)

    def location(self, artifact: Artifact, name: str = "") -> str:
        """Return where a file is, for display: a plain path on a local disk, a URL elsewhere.

        Args:
            name: of the file; "" for the folder that contains all files.
        """
        full = self.path(self.file(artifact, name).path if name else artifact.folder)
        return full if self.is_local else str(self.fs.unstrip_protocol(full))

    @contextlib.contextmanager
    def blaming(self, artifact: Artifact, name: str) -> Iterator[None]:
        """Raise ``Damaged`` with the artifact's key if its file ``name`` is missing or corrupt in the block."""
        try:
            yield
        except (FileNotFoundError, Corrupt) as error:
            missing = f"{self.path(self.file(artifact, name).path)} is missing"
            problem = missing if isinstance(error, FileNotFoundError) else str(error)
            raise Damaged(
                f"{artifact.key}: its file {name!r} is damaged: {problem}. Check the storage; "
                "`layerwise verify` checks all files. A search rebuilds the artifact.",
                artifact.key,
                artifact.token,
            ) from error

    def _find(self, key: str) -> Artifact | None:
        path = self._manifest_path(key)
        token = ""
        try:
            manifest = read_sealed(self.fs, path)
            token = manifest["token"]
            if manifest["key"] != key:
                raise ValueError(f"it belongs to {manifest['key']}")
            files = files_from_json(manifest["files"], key)
            facts, recipe, made = (dict(manifest[part]) for part in ("facts", "recipe", "made"))
            return Artifact(key, files, facts, recipe, made, token)
        except FileNotFoundError:
            return None
        except Corrupt as error:
            raise Damaged(f"{error} A search rebuilds the artifact.", key) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(
                f"{path} is not the manifest of {key} ({error}): it was copied or edited. Restore it; a search "
                "rebuilds the artifact.",
                key,
                token,
            ) from error

    def _require_writable(self) -> None:
        if not self._writable:
            require_exclusive_creation(self.fs, self.root)
            self._writable = True

    def _manifest_path(self, key: str) -> str:
        return self.path(f"{key}/{MANIFEST}")
