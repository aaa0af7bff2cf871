"""The source that a model name refers to: the demo model, a hub repository, a folder, or a GGUF file."""

import os
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.implementations.http import HTTPFileSystem

from layerwise.storage.files.credentials import holds_credentials
from layerwise.storage.files.errors import reaching
from layerwise.storage.files.filesystem import is_local, open_filesystem
from layerwise.storage.formats.canonical_json import digest
from layerwise.storage.formats.large_file_pointer import refuse_pointers
from layerwise.tasks.sources.checkpoint_files import (
    INDEX,
    SUBFOLDERS,
    copied_files,
    identifying_files,
    require_files,
)
from layerwise.tasks.sources.demo_model import WHEEL_SHA256, demo_gguf
from layerwise.tasks.sources.file_identity import (
    FileState,
    SourceChanged,
    file_state,
    fingerprint,
    fingerprints,
    require_unchanged,
)
from layerwise.tasks.sources.folder import Folder, list_folder
from layerwise.tasks.sources.hub import open_repository, resolve_commit
from layerwise.tasks.sources.user_cache import cache_folder, fetch_with_checksum

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")
# In a URL, the revision ends at the next slash (except for refs/pr/3); the rest is a path in the repository.
HUB_URL = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s/]+|refs/\w+/[^@\s/]+))?/?")


@dataclass(frozen=True)
class DemoSource:
    """The built-in demo model. It is one fixed file, so its identity is known before it is downloaded."""

    label: str = "demo"

    @property
    def identity(self) -> dict[str, object]:
        return {"wheel sha256": WHEEL_SHA256}

    def local_gguf(self) -> Path:
        return demo_gguf()

    def require_unchanged(self) -> None:
        """Do nothing: the file was compared with a fixed checksum."""


@dataclass(frozen=True)
class HubSource:
    """A model repository at one commit."""

    repo: str
    commit: str

    @property
    def label(self) -> str:
        return f"{self.repo}@{self.commit}"

    @property
    def identity(self) -> dict[str, object]:
        return {"repo": self.repo, "commit": self.commit}

    def open(self) -> Folder:
        return open_repository(self.repo, self.commit)


@dataclass(frozen=True)
class FolderSource:
    """A folder with a checkpoint. Its tensors are read in place, so the folder must be kept."""

    folder: Folder

    @property
    def label(self) -> str:
        return self.folder.name

    @cached_property
    def identity(self) -> dict[str, object]:
        """Name, size and fingerprint of every file that affects the import. Reads a few MiB."""
        folder, names = self.folder, identifying_files(self.folder)
        whole = {*copied_files(names), INDEX}
        found = fingerprints(
            folder.fs,
            {folder.path(name): folder.files[name] for name in names},
            {folder.path(name) for name in names if name in whole},
        )
        return {"files": [[name, folder.files[name].size, found[folder.path(name)]] for name in names]}


@dataclass(frozen=True)
class GgufSource:
    """One GGUF file, local or at a URL."""

    fs: AbstractFileSystem
    path: str
    label: str
    state: FileState

    @property
    def file_name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @cached_property
    def identity(self) -> dict[str, object]:
        """Name, size and fingerprint of the file. Reads a few MiB."""
        found = fingerprint(self.fs, self.path, self.state)
        return {"gguf": [self.file_name, self.state.size, found], "dtype": "BF16"}

    def require_unchanged(self) -> None:
        """Check that the file has not changed since ``find_source``.

        Raises:
            SourceChanged: the file has another size, ETag or time of change, or no longer exists.
        """
        require_unchanged(self.fs, self.path, self.state)

    def local_gguf(self) -> Path:
        """Return the local file; a remote one is first copied into the user's cache folder."""
        if is_local(self.fs):
            return Path(self.path)
        target = cache_folder() / "gguf" / digest(self.identity) / self.file_name

        def download(folder: Path) -> Path:
            copy = folder / self.file_name
            with reaching(self.fs, self.path):
                self.fs.get_file(self.path, str(copy))
            self.require_unchanged()
            if copy.stat().st_size != self.state.size:
                raise SourceChanged(
                    f"{self.label} has {self.state.size} bytes, but {copy.stat().st_size} were downloaded. Run again. "
                    "If the error persists, a proxy alters downloads."
                )
            return copy

        return fetch_with_checksum(target, download)


Source = DemoSource | HubSource | FolderSource | GgufSource


def find_source(model: str) -> Source:
    """Find the source that ``model`` refers to. Lists folders and asks the hub; reads no weights.

    Args:
        model: ``demo``; a hub id ``owner/name`` or ``owner/name@revision``; the path or any fsspec URL of a
            folder, except HTTP; the path or URL of a ``.gguf`` file. A local folder takes precedence over a hub id of
            the same name.

    Raises:
        ValueError: ``model`` is none of these, or a URL with credentials.
        OSError: the source does not exist or cannot be reached.
    """
    if model == "demo":
        return DemoSource()
    if hub_id := hub_id_of(model):
        return HubSource(hub_id["repo"], resolve_commit(hub_id["repo"], hub_id["revision"]))
    if "://" in model:
        return _stored_source(model, model.split("?")[0])
    local = os.path.abspath(os.path.expanduser(model))
    if model and os.path.lexists(local):
        return _stored_source(local, model)
    raise ValueError(
        f"{model!r} is neither a file or folder on this machine nor a hub id (owner/name or "
        "owner/name@revision), a URL, or demo. Check the spelling. Hub models that used to have no owner have one "
        "now (openai-community/gpt2)."
    )


def hub_id_of(model: str) -> re.Match[str] | None:
    """Return the groups ``repo`` and ``revision`` of a hub id or of the URL of a repository; None for any other name.

    A local file or folder takes precedence over a hub id of the same name.

    Raises:
        ValueError: ``model`` is a URL with credentials.
    """
    if "://" in model:
        _refuse_credentials(model)
        return HUB_URL.fullmatch(model)
    return None if os.path.lexists(os.path.expanduser(model)) else HUB_ID.fullmatch(model)


def _stored_source(url: str, label: str) -> FolderSource | GgufSource:
    fs, path = open_filesystem(url)
    if label.endswith(".gguf"):
        try:
            state = file_state(fs, path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"there is no file {label}. Check the spelling and, for a remote file, the access rights."
            ) from error
        refuse_pointers(fs, {path: state.size}, {path: label})
        return GgufSource(fs, path, label, state)
    if isinstance(fs, HTTPFileSystem):
        raise ValueError(
            f"{label} cannot be used as a model: HTTP servers do not list the files of a folder. Give owner/name for a model "
            "on huggingface.co; download any other folder, or copy it to a bucket such as s3://. Of an HTTP server, only "
            ".gguf files can be used."
        )
    with reaching(fs, path):
        is_file = fs.isfile(path)
    if is_file:
        raise ValueError(
            f"{label} is a single file. Give the folder with config.json and the *.safetensors files, "
            "or a .gguf file."
        )
    folder = list_folder(fs, path, label, subfolders=SUBFOLDERS)
    require_files(folder)
    return FolderSource(folder)


def _refuse_credentials(url: str) -> None:
    if holds_credentials(url):
        raise ValueError(
            f"the {urlsplit(url).scheme}:// URL of the model contains credentials (not shown here), which would "
            "end up in logs and reports. Put them into the environment or the fsspec configuration, and "
            "give the URL without them."
        )
