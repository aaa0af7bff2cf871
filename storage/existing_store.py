"""Open a store that must exist: for commands that read it, or work on the result of a search."""

import re
from collections.abc import Iterator
from typing import Any

from layerwise.storage.files.errors import reaching
from layerwise.storage.stage import STAGE_NAME
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.inventory import RUNNING_FILE, is_temporary

STAGE_FOLDER = re.compile(rf"{STAGE_NAME.pattern}/[0-9a-f]{{32}}")
NAMED = 3  # entries of a folder that is no store which the message shows


def existing_store(url: str) -> ArtifactStore:
    """The store at ``url``; an empty folder is an empty store. Nothing is created.

    Raises:
        ValueError: ``url`` is empty, as an unset variable of a shell is. It does not mean the current folder.
        FileNotFoundError: if there is nothing at ``url``, or something that is no store: a wrong path or URL.
        OSError: if the storage cannot be reached.
    """
    if not url.strip():
        raise ValueError(
            f"the name of the store is empty ({url!r}). Give its folder or URL; the current folder is a dot."
        )
    store = ArtifactStore(url)
    try:
        with reaching(store.fs, store.root):
            rows = store.fs.ls(store.root, detail=True)
    except FileNotFoundError as error:
        if "no such bucket" in str(error):
            raise
        raise FileNotFoundError(f"{url} holds no store: nothing is there. Check the path or URL.") from error
    if any(row["name"].rstrip("/") == store.root and row["type"] == "file" for row in rows):
        raise FileNotFoundError(f"{url} holds no store: it is a file. Give the folder or URL of the store.")
    if rows and not any(_is_of_a_store(path) for path in _paths(store, rows)):
        names = sorted(row["name"].rstrip("/").rsplit("/", 1)[-1] for row in rows)
        others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise FileNotFoundError(
            f"{url} holds no store: it holds {', '.join(map(repr, names[:NAMED]))}{others}, but nothing that "
            "layerwise has written. Check the path or URL."
        )
    return store


def _paths(store: ArtifactStore, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Paths, relative to the root, of the files and folders in the root and in its folders."""
    for row in rows:
        if row["type"] != "directory":
            yield row["name"][len(store.root) + 1 :]
            continue
        try:
            with reaching(store.fs, row["name"]):
                inner = store.fs.ls(row["name"], detail=False)
        except (FileNotFoundError, PermissionError):  # removed since, or somebody else's
            continue
        yield from (name.rstrip("/")[len(store.root) + 1 :] for name in inner)


def _is_of_a_store(path: str) -> bool:
    return bool(STAGE_FOLDER.fullmatch(path) or RUNNING_FILE.fullmatch(path) or is_temporary(path))
