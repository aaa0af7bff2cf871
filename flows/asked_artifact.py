"""Find the artifact of a store that somebody asks for by its key."""

from storage.artifact import Artifact
from storage.store import ArtifactStore
from tasks.search_result import RESULT_STAGE


def asked_artifact(store: ArtifactStore, key: str | None) -> Artifact:
    """The artifact with this key, or whose key begins so; the newest search's if it is None.

    Raises:
        KeyError: no artifact has that key, or several begin with it.
    """
    return _newest_search(store) if key is None else _by_prefix(store, key)


def finished_searches(store: ArtifactStore) -> list[Artifact]:
    """All of a store, the newest first."""
    searches = [artifact for artifact in store.artifacts() if artifact.recipe.get("name") == RESULT_STAGE]
    return sorted(searches, key=lambda artifact: str(artifact.made.get("at")), reverse=True)


def _newest_search(store: ArtifactStore) -> Artifact:
    searches = finished_searches(store)
    if not searches:
        raise KeyError(
            f"{store.url} holds no finished search. Run `layerwise search`, "
            "or name an artifact that `layerwise ls` lists."
        )
    return searches[0]


def _by_prefix(store: ArtifactStore, key: str) -> Artifact:
    if "/" in key and len(key.partition("/")[2]) == 32:
        return store.get(key)
    found = [artifact for artifact in store.artifacts() if artifact.key.startswith(key)]
    if len(found) != 1:
        raise KeyError(
            f"{len(found)} artifacts of {store.url} have a key that begins with {key!r}. `layerwise ls` lists them."
        )
    return found[0]
