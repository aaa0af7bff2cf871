"""Checkpoints to watch: all folders with a checkpoint under a prefix, or the newest commit of a hub model."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from fsspec import AbstractFileSystem
from fsspec.implementations.http import HTTPFileSystem

from layerwise.storage.files.errors import Corrupt, reaching
from layerwise.storage.files.filesystem import is_local, open_filesystem
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.location import StoreLocation
from layerwise.tasks.sources.checkpoint_files import (
    CONFIG,
    INDEX,
    SINGLE,
    SPARSITY_FILE,
    SUBFOLDERS,
    identifying_files,
    require_files,
    stored_tensors,
)
from layerwise.tasks.sources.file_identity import BrokenLink, SourceChanged
from layerwise.tasks.sources.folder import Folder, list_folder
from layerwise.tasks.sources.hub import FULL_COMMIT, open_repository, resolve_commit
from layerwise.tasks.sources.model_source import FolderSource, hub_id_of

SHARD = re.compile(r".*-\d+-of-0*(?P<count>\d+)\.safetensors")


class Incomplete(ValueError):
    """A checkpoint is not complete, or cannot be read."""


@dataclass(frozen=True)
class WatchedCheckpoint:
    """A checkpoint as it was listed.

    Attributes:
        model: its name for a search: the path or URL of the folder, or ``owner/name@commit``.
        folder: its files.
    """

    model: str
    folder: Folder

    @property
    def state(self) -> list[list[object]]:
        """Name, size and version of every file that an import uses. Uploads that are in progress change it.

        Raises:
            Incomplete: a file is a link without a target.
        """
        try:
            names = identifying_files(self.folder)
        except BrokenLink as error:
            raise Incomplete(str(error)) from error
        states = ((name, self.folder.files[name]) for name in names)
        return [[name, state.size, state.version, state.changed] for name, state in states]

    def content(self) -> str:
        """Return a digest of the files that an import uses. Reads headers and a few MiB.

        Raises:
            Incomplete: a file is missing, truncated or damaged, or changed since the folder was listed.
            Unreachable: the storage does not answer.
        """
        try:
            self._require_complete()
            return digest(FolderSource(self.folder).identity)
        except (ValueError, Corrupt, SourceChanged, BrokenLink, FileNotFoundError, PermissionError) as error:
            raise Incomplete(str(error)) from error
        except RecursionError as error:
            raise Incomplete(f"a JSON file of {self.folder.name} is nested too deeply") from error

    def _require_complete(self) -> None:
        files = self.folder.files
        if CONFIG not in files:  # removed since it was found
            raise Incomplete(f"{self.folder.name} has no {CONFIG}")
        if not isinstance(json.loads(self.folder.read(CONFIG)), dict):
            raise Incomplete(f"{CONFIG} of {self.folder.name} is not a JSON object")
        shards = [match for name in files if (match := SHARD.fullmatch(name)) and int(match["count"]) > 1]
        if shards and INDEX not in files and SINGLE not in files:
            raise Incomplete(
                f"{self.folder.name} has {len(shards)} of {shards[0]['count']} shards and no {INDEX}"
            )
        require_files(self.folder)
        stored_tensors(self.folder)


def watched_checkpoints(model: str, store: StoreLocation) -> list[WatchedCheckpoint]:
    """List the checkpoints that ``model`` refers to, without reading their files.

    Args:
        model: a hub id or URL, for the newest commit of a branch; or a folder or fsspec URL, for this folder and all folders
            below it that have a config.json. Models that layerwise has pruned are left out.
        store: the store of the searches.

    Raises:
        ValueError: ``model`` cannot be watched, or the store lies below it.
        OSError: the folder does not exist, or the hub or the storage cannot be reached.
    """
    if hub_id := hub_id_of(model):
        revision = hub_id["revision"]
        if revision and FULL_COMMIT.fullmatch(revision):
            raise ValueError(
                f"{model} is one commit, which never changes. Give a branch, such as {hub_id['repo']}@main."
            )
        commit = resolve_commit(hub_id["repo"], revision)
        return [WatchedCheckpoint(f"{hub_id['repo']}@{commit}", open_repository(hub_id["repo"], commit))]
    if model == "demo" or model.endswith(".gguf"):
        raise ValueError(
            f"{model} is a single model. To watch for new checkpoints, give the folder or URL that they appear under, or a "
            "hub id (owner/name)."
        )
    fs, root = open_filesystem(model if "://" in model else os.path.abspath(os.path.expanduser(model)))
    if isinstance(fs, HTTPFileSystem):
        raise ValueError(
            f"{model} cannot be watched: HTTP servers do not list files. Give a folder, a bucket such as s3://, or a "
            "hub id (owner/name)."
        )
    if is_local(fs) and not os.path.isdir(root):
        raise FileNotFoundError(f"there is no folder {model}. Check the path, or create the folder.")
    _require_apart(fs, root.rstrip("/"), model, store)
    return list(_checkpoints(fs, root.rstrip("/")))


def _require_apart(fs: AbstractFileSystem, root: str, model: str, store: StoreLocation) -> None:
    """Refuse a prefix with the store below it: it would find the copies of models in the store."""
    inside = f"{store.root}/".startswith(f"{root}/") or f"{root}/".startswith(f"{store.root}/")
    if type(fs) is type(store.fs) and inside:
        raise ValueError(
            f"the store {store.url} and the watched prefix {model} contain one another, so the models in the store would be "
            "pruned as well. Use separate folders or prefixes."
        )


def _checkpoints(fs: AbstractFileSystem, root: str) -> Iterator[WatchedCheckpoint]:
    fs.invalidate_cache()  # a cached listing would hide a new checkpoint
    with reaching(fs, root):
        found = fs.find(root)
    for path in sorted(path.removesuffix(f"/{CONFIG}") for path in found if path.endswith(f"/{CONFIG}")):
        name = path if is_local(fs) else fs.unstrip_protocol(path)
        try:
            folder = list_folder(fs, path, name, subfolders=SUBFOLDERS)
        except (FileNotFoundError, PermissionError):  # removed since, or owned by another user
            continue
        if SPARSITY_FILE not in folder.files:
            yield WatchedCheckpoint(name, folder)
