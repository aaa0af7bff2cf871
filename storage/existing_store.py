"""Opening a store that must exist: for commands that read it, or work on the result of a search."""

from collections.abc import Iterator
from typing import Any

from layerwise.storage.files.errors import reaching
from layerwise.storage.inventory import LOG_FILE, RUNNING_FILE, is_temporary
from layerwise.storage.layer_cache import LayerCache
from layerwise.storage.store import KEY, ArtifactStore

NAMED = 3  # maximum number of entries that the message about a folder without a store lists


def existing_store(url: str, layer_cache: LayerCache | None = None) -> ArtifactStore:
    """Open the store at ``url``. An empty folder is an empty store. Creates nothing.

    Args:
        layer_cache: see ``ArtifactStore``.

    Raises:
        ValueError: ``url`` is empty, as from an unset shell variable. It does not mean the current folder.
        FileNotFoundError: nothing, or something that is not a store, is at ``url``: a wrong path or URL.
        OSError: the storage cannot be reached.
    """
    if not url.strip():
        raise ValueError(
            f"the name of the store is empty ({url!r}). Give its folder or URL; for the current folder, give a dot."
        )
    store = ArtifactStore(url, layer_cache)
    try:
        with reaching(store.fs, store.root):
            rows = store.fs.ls(store.root, detail=True)
    except FileNotFoundError as error:
        if "no such bucket" in str(error):
            raise
        raise FileNotFoundError(f"{url} is not a store: nothing is there. Check the path or URL.") from error
    if any(row["name"].rstrip("/") == store.root and row["type"] == "file" for row in rows):
        raise FileNotFoundError(f"{url} is not a store: it is a file. Give the folder or URL of the store.")
    if rows and not any(_is_of_a_store(path) for path in _paths(store, rows)):
        names = sorted(row["name"].rstrip("/").rsplit("/", 1)[-1] for row in rows)
        others = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        raise FileNotFoundError(
            f"{url} is not a store: it contains {', '.join(map(repr, names[:NAMED]))}{others}, but nothing that "
            "layerwise has written. Check the path or URL."
        )
    return store


def _paths(store: ArtifactStore, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield paths, relative to the root, of the files and folders in the root and in its folders."""
    for row in rows:
        if row["type"] != "directory":
            yield store.relative(row["name"])
            continue
        try:
            with reaching(store.fs, row["name"]):
                inner = store.fs.ls(row["name"], detail=False)
        except (FileNotFoundError, PermissionError):  # removed since, or owned by another user
            continue
        yield from (store.relative(name.rstrip("/")) for name in inner)


def _is_of_a_store(path: str) -> bool:
    return any(kind.fullmatch(path) for kind in (KEY, RUNNING_FILE, LOG_FILE)) or is_temporary(path)
