"""What a model name means: the demo model, a hub id, a folder anywhere, or a GGUF file."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem

from storage.files import is_local, open_filesystem
from storage.keys import digest
from storage.unreachable import reaching
from tasks.checkpoint_files import identifying_files
from tasks.demo_model import WHEEL_SHA256, demo_gguf
from tasks.file_corpus import without_credentials
from tasks.folder import FileState, Folder, file_version, list_folder, require_unchanged
from tasks.hub import open_repository, resolve_commit
from tasks.user_cache import cache_folder, fetch_once

HUB_ID = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s]+))?")
# In a URL a revision ends at the next slash, apart from refs/pr/3: the rest is a path in the repository.
HUB_URL = re.compile(r"hf://(?P<repo>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>[^@\s/]+|refs/\w+/[^@\s/]+))?/?")
SECRET_IN_QUERY = re.compile(
    r"[?&][^=&]*(token|signature|sig|secret|password|credential|key)[^=&]*=", re.IGNORECASE
)


@dataclass(frozen=True)
class DemoSource:
    """The built-in demo model; one fixed file, so its identity is known without having it."""

    label: str = "demo"

    @property
    def identity(self) -> dict[str, object]:
        return {"wheel sha256": WHEEL_SHA256}

    def local_gguf(self) -> Path:
        return demo_gguf()

    def require_unchanged(self) -> None:
        """The file is known by its checksum, and nobody changes it."""


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
    """A folder that holds a checkpoint and keeps holding it: its tensors are read in place."""

    folder: Folder

    @property
    def label(self) -> str:
        return self.folder.name

    @property
    def identity(self) -> dict[str, object]:
        states = {name: self.folder.files[name] for name in identifying_files(self.folder)}
        return {"files": [[name, state.size, state.version] for name, state in sorted(states.items())]}


@dataclass(frozen=True)
class GgufSource:
    """One GGUF file, local or behind a URL."""

    fs: AbstractFileSystem
    path: str
    label: str
    state: FileState

    @property
    def file_name(self) -> str:
        return self.path.rsplit("/", 1)[-1]

    @property
    def identity(self) -> dict[str, object]:
        return {"gguf": [self.file_name, self.state.size, self.state.version], "dtype": "BF16"}

    def require_unchanged(self) -> None:
        """Look whether the file is still the one that was named.

        Raises:
            SourceChanged: it has another size, ETag or modification time, or is gone.
        """
        require_unchanged(self.fs, self.path, self.state)

    def local_gguf(self) -> Path:
        """The file itself, or a copy of a remote one in the user's cache folder."""
        if is_local(self.fs):
            return Path(self.path)
        target = cache_folder() / "gguf" / digest(self.identity) / self.file_name

        def download(folder: Path) -> Path:
            with reaching(self.fs, self.path):
                self.fs.get_file(self.path, str(folder / self.file_name))
            self.require_unchanged()
            return folder / self.file_name

        return fetch_once(target, lambda path: path.stat().st_size == self.state.size, download)


Source = DemoSource | HubSource | FolderSource | GgufSource


def find_source(model: str) -> Source:
    """What ``model`` means.

    Args:
        model: ``demo``; a hub id ``owner/name`` or ``owner/name@revision``; a local folder or any fsspec URL
            of one; the path or URL of a ``.gguf`` file. A local folder wins over a hub id of the same name.

    Raises:
        ValueError: if it is none of these, or a URL with credentials in it.
        OSError: if it is not there.
    """
    if model == "demo":
        return DemoSource()
    if "://" in model:
        _refuse_credentials(model)
        hub_id = HUB_URL.fullmatch(model)
        return _hub_source(hub_id) if hub_id else _stored_source(model, model.split("?")[0])
    local = os.path.abspath(os.path.expanduser(model))
    if model and os.path.exists(local):
        return _stored_source(local, model)
    if hub_id := HUB_ID.fullmatch(model):
        return _hub_source(hub_id)
    raise ValueError(
        f"{model!r} is neither a file or folder on this machine nor a hub id (owner/name or "
        "owner/name@revision), a URL, or demo. Check the spelling; hub models without an owner have one by "
        "now (openai-community/gpt2)."
    )


def _hub_source(hub_id: re.Match[str]) -> HubSource:
    return HubSource(hub_id["repo"], resolve_commit(hub_id["repo"], hub_id["revision"]))


def _stored_source(url: str, label: str) -> FolderSource | GgufSource:
    fs, path = open_filesystem(url)
    if label.endswith(".gguf"):
        try:
            with reaching(fs, path):
                entry = fs.info(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"there is no file {label}. Check the spelling, and for remote files the access rights."
            ) from error
        return GgufSource(fs, path, label, FileState(entry["size"], file_version(fs, entry)))
    with reaching(fs, path):
        is_file = fs.isfile(path)
    if is_file:
        raise ValueError(
            f"{label} is a single file. Give the folder that holds config.json and the *.safetensors files, "
            "or a .gguf file."
        )
    return FolderSource(list_folder(fs, path, label))


def holds_credentials(url: str) -> bool:
    """Whether a link of a URL, which may be a chain of them, has a user, a password, or a secret in its query."""
    return any(
        without_credentials(place := link.partition("?")[0]) != place or SECRET_IN_QUERY.search(link)
        for link in url.split("::")
    )


def _refuse_credentials(url: str) -> None:
    if holds_credentials(url):
        raise ValueError(
            f"the {urlsplit(url).scheme}:// URL of the model holds credentials (not shown), which would "
            "end up in logs and reports. Put them into the environment or the fsspec configuration and "
            "give the bare URL."
        )
