"""Damaged artifacts are taken out of use, and kept for people to look at."""

import uuid

from storage.corrupt import Corrupt
from storage.damage import Damaged
from storage.document import read_sealed
from storage.draft import MANIFEST
from storage.publishing import overwrite
from storage.store import ArtifactStore
from storage.unreachable import reaching


def set_aside(store: ArtifactStore, damaged: Damaged) -> bool:
    """Take a damaged artifact out of use: the next ``get_or_build`` of its stage builds it anew.

    Its manifest is kept under another name until ``layerwise gc`` collects it and the files that only it names.

    Returns:
        False if the artifact was replaced since it was judged: look again.

    Raises:
        OSError: if the storage refuses, or cannot be reached.
    """
    path = f"{store.root}/{damaged.key}/{MANIFEST}"
    try:
        if read_sealed(store.fs, path)["token"] != damaged.token:
            return False
    except FileNotFoundError:
        return False
    except Corrupt:
        pass
    with reaching(store.fs, path):
        overwrite(store.fs, f"{path}.damaged-{uuid.uuid4().hex}", store.fs.cat_file(path))
        store.fs.rm_file(path)
    return True
