"""Setting damaged artifacts aside: they are taken out of use, and kept for inspection."""

import uuid

from layerwise.storage.artifact import MANIFEST, Damaged
from layerwise.storage.files.errors import Corrupt, reaching
from layerwise.storage.files.publishing import overwrite, remove_quietly
from layerwise.storage.formats.document import read_sealed
from layerwise.storage.resume_points import RESUME_POINT_FILE
from layerwise.storage.store import ArtifactStore


def set_aside(store: ArtifactStore, damaged: Damaged) -> bool:
    """Take a damaged artifact out of use, so that the next ``get_or_build`` of its stage rebuilds it.

    Its manifest is kept under another name until ``layerwise gc`` deletes it with the files that only it names.

    Returns:
        False if the artifact was replaced since it was examined: read it again.

    Raises:
        OSError: the storage refuses, or cannot be reached.
    """
    folder = store.path(damaged.key)
    path = f"{folder}/{MANIFEST}"
    try:
        manifest = _content(store, path, damaged.token)
        if manifest is None:
            return False
        # A resume point left next to the manifest would make the rebuild inherit the damaged files.
        remove_quietly(store.fs, [f"{folder}/{RESUME_POINT_FILE}"])
        overwrite(store.fs, f"{path}.damaged-{uuid.uuid4().hex}", manifest)
        if _content(store, path, damaged.token) != manifest:
            return False
        with reaching(store.fs, path):
            store.fs.rm_file(path)
    except FileNotFoundError:
        return False
    return True


def _content(store: ArtifactStore, path: str, token: str) -> bytes | None:
    """Return the stored manifest; None if it is readable and has another token.

    Raises:
        FileNotFoundError: there is no manifest.
    """
    try:
        if read_sealed(store.fs, path)["token"] != token:
            return None
    except Corrupt:
        pass
    with reaching(store.fs, path):
        content: bytes = store.fs.cat_file(path)
    return content
