"""Damaged artifacts are taken out of use, and kept for people to look at."""

import uuid

from layerwise.storage.damage import Damaged
from layerwise.storage.draft import MANIFEST
from layerwise.storage.files.corrupt import Corrupt
from layerwise.storage.files.errors import reaching
from layerwise.storage.files.publishing import overwrite, remove_quietly
from layerwise.storage.formats.document import read_sealed
from layerwise.storage.resume_points import PROGRESS
from layerwise.storage.store import ArtifactStore


def set_aside(store: ArtifactStore, damaged: Damaged) -> bool:
    """Take a damaged artifact out of use: the next ``get_or_build`` of its stage builds it anew.

    Its manifest is kept under another name until ``layerwise gc`` collects it and the files that only it names.

    Returns:
        False if the artifact was replaced since it was judged: look again.

    Raises:
        OSError: if the storage refuses, or cannot be reached.
    """
    folder = f"{store.root}/{damaged.key}"
    path = f"{folder}/{MANIFEST}"
    try:
        manifest = _content(store, path, damaged.token)
        if manifest is None:
            return False
        # One that was left beside the manifest would lead the rebuilding to the damaged files.
        remove_quietly(store.fs, [f"{folder}/{PROGRESS}"])
        overwrite(store.fs, f"{path}.damaged-{uuid.uuid4().hex}", manifest)
        if _content(store, path, damaged.token) != manifest:
            return False
        with reaching(store.fs, path):
            store.fs.rm_file(path)
    except FileNotFoundError:
        return False
    return True


def _content(store: ArtifactStore, path: str, token: str) -> bytes | None:
    """The manifest as it is stored; None if it can be read and is not the one with ``token``.

    Raises:
        FileNotFoundError: if there is none.
    """
    try:
        if read_sealed(store.fs, path)["token"] != token:
            return None
    except Corrupt:
        pass
    with reaching(store.fs, path):
        content: bytes = store.fs.cat_file(path)
    return content
