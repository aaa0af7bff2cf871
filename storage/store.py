"""The artifact store: find what was built, build what was not."""

import contextlib
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from xxhash import xxh3_128_hexdigest

from layerwise.storage.artifact import Artifact, StoredFile, files_from_json, files_to_json
from layerwise.storage.checking import require_size
from layerwise.storage.damage import Damaged
from layerwise.storage.draft import MANIFEST, Committed, Draft
from layerwise.storage.files.corrupt import Corrupt, Removed
from layerwise.storage.files.probe import require_exclusive_creation
from layerwise.storage.files.publishing import create_once
from layerwise.storage.files.reading import is_local, open_filesystem, read_exactly
from layerwise.storage.formats.document import read_sealed, seal
from layerwise.storage.pauses import why_files_are_gone
from layerwise.storage.resume_points import Progress, read_progress
from layerwise.storage.stage import STAGE_NAME, Stage
from layerwise.storage.upkeep.inventory import take_inventory

logger = logging.getLogger(__name__)

REBUILDS = 3  # of a stage whose files others delete while it is being built
KEY = re.compile(rf"{STAGE_NAME.pattern}/[0-9a-f]{{32}}")


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
        self._writable = False  # not asked yet

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
        artifact = self._find(key) if KEY.fullmatch(key) else None
        if artifact is None:
            raise KeyError(f"{self!r} has no artifact {key!r}. Build it first, or check the store's URL.")
        return artifact

    def get_or_build(self, stage: Stage, build: Callable[[Draft], None]) -> Artifact:
        """The artifact of ``stage``; calls ``build`` only if no one has committed it yet.

        If another process commits the same stage meanwhile, its artifact is returned and ours is dropped.

        Raises:
            OSError: the storage cannot be written, or does not create files exclusively; before any work.
            Corrupt: other processes delete its files again and again while it is being built.
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
                logger.info("%s was committed by another process meanwhile; using that one", stage.key)
                draft.remove_progress()
            except Damaged as error:
                if draft.resumed is None or error.key != draft.resumed.state.key:
                    raise
                # Damaged, or deleted by another process at work on this stage, which has left a newer one.
                logger.warning("%s: its resume point cannot be used: %s", stage.key, error)
                unusable |= draft.tokens
            except Removed as error:
                removals += 1
                if removals > REBUILDS:
                    raise Corrupt(
                        f"{stage.key} cannot be built: its files were deleted {removals} times, the last time "
                        f"{error.path}. Stop what deletes files in {self.root}, and run again. `layerwise gc` spares "
                        "what running processes have written."
                    ) from error
                logger.warning(
                    "%s: %s. %s It is built again, from its last resume point if there is one.",
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
        draft.remove_progress()

    def draft(self, stage: Stage) -> Draft:
        """A draft of ``stage`` that is not committed by it: to leave a resume point."""
        return Draft(self.fs, self.root, stage)

    def progress(self, stage: Stage) -> Progress | None:
        """The resume point of ``stage``; None if there is none that can be read."""
        try:
            return read_progress(self.fs, self.root, stage.key)
        except Corrupt:
            return None

    def read(self, artifact: Artifact, name: str) -> bytes:
        """The content of one file, checked; for files that fit into memory easily.

        Raises:
            KeyError: if the artifact has no such file.
            Corrupt: if the file is missing or not what was written, twice in a row.
        """
        file = self.file(artifact, name)
        path = f"{self.root}/{file.path}"
        with self.blaming(artifact, name):
            require_size(self.fs, self.root, file)
            content = bytearray(file.size)
            for _ in range(2):  # bits flip on the way, too
                read_exactly(self.fs, path, 0, memoryview(content))
                if xxh3_128_hexdigest(content) == file.digest:
                    return bytes(content)
            raise Corrupt(
                f"{path} has digest {xxh3_128_hexdigest(content)}, but {file.digest} was recorded, twice in a row"
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

    def artifacts(self, beginning: str = "") -> Iterator[Artifact]:
        """All committed artifacts, by listing: for people. Damaged ones are skipped with a warning.

        Args:
            beginning: of the keys that are asked for.
        """
        for key, folder in sorted(take_inventory(self.fs, self.root).folders.items()):
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
        """Where a file is, for people: a plain path on a local disk, a URL elsewhere.

        Args:
            name: of the file; "" for the folder that holds all files: the attempt's folder, or, of an artifact
                that was finished by a second attempt and not gathered (``Draft.gather``), its stage's.
        """
        if name:
            path = self.file(artifact, name).path
        else:
            attempts = {"/".join(file.path.split("/")[:3]) for file in artifact.files.values()}
            path = attempts.pop() if len(attempts) == 1 else artifact.key
        full = f"{self.root}/{path}"
        return full if is_local(self.fs) else str(self.fs.unstrip_protocol(full))

    @contextlib.contextmanager
    def blaming(self, artifact: Artifact, name: str) -> Iterator[None]:
        """Report that a file of a committed artifact is missing or corrupt as ``Damaged``, by the artifact's key."""
        try:
            yield
        except (FileNotFoundError, Corrupt) as error:
            missing = f"{self.root}/{self.file(artifact, name).path} is missing"
            what = missing if isinstance(error, FileNotFoundError) else str(error)
            raise Damaged(
                f"{artifact.key}: its file {name!r} is damaged: {what}. Check the storage; "
                "`layerwise verify` reads all of it. A search builds the artifact anew.",
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
            raise Damaged(f"{error} A search builds the artifact anew.", key) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise Damaged(
                f"{path} is not the manifest of {key} ({error}): it was copied or edited. Restore it; a search "
                "builds the artifact anew.",
                key,
                token,
            ) from error

    def _require_writable(self) -> None:
        if not self._writable:
            require_exclusive_creation(self.fs, self.root)
            self._writable = True

    def _manifest_path(self, key: str) -> str:
        return f"{self.root}/{key}/{MANIFEST}"
