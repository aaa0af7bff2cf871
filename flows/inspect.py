"""Show one artifact of a store, or what a search found."""

import json

from flows.console import open_console, size
from flows.terminal import show_selection, show_test
from storage.artifact import Artifact
from storage.store import ArtifactStore
from tasks.evaluate import read_test
from tasks.search_result import RESULT_FILE, RESULT_STAGE
from tasks.select import read_selection


def show_key(store_url: str, key: str | None) -> None:
    """Print what is known of an artifact: how it was made, its files; of a search, its result.

    Args:
        key: as ``ls`` prints it, or its beginning; None for the newest search.

    Raises:
        KeyError: no artifact has that key, or several begin with it.
    """
    store = ArtifactStore(store_url)
    artifact = asked_artifact(store, key)
    console = open_console()
    console.print(artifact.key, style="bold")
    console.print_json(
        json.dumps({"recipe": artifact.recipe, "made": artifact.made, "facts": artifact.facts})
    )
    for name, file in sorted(artifact.files.items()):
        console.print(f"  {size(file.size):>8}  {store.location(artifact, name)}", soft_wrap=True)
    if artifact.recipe.get("name") == RESULT_STAGE:
        document = json.loads(store.read(artifact, RESULT_FILE))
        stages = document["stages"]
        console.print()
        title = f"{document['source']} at sparsity {document['settings']['sparsity']:g}"
        show_selection(console, title, read_selection(store, store.get(stages["select"])))
        show_test(console, read_test(store, store.get(stages["evaluate"])))
        if "export" in stages:
            exported = store.location(store.get(stages["export"]))
            console.print(f"\nPruned model: {exported}", soft_wrap=True)


def asked_artifact(store: ArtifactStore, key: str | None) -> Artifact:
    """The artifact with this key, or whose key begins so; the newest search's if it is None.

    Raises:
        KeyError: no artifact has that key, or several begin with it.
    """
    return _newest_search(store) if key is None else _by_prefix(store, key)


def _newest_search(store: ArtifactStore) -> Artifact:
    searches = [artifact for artifact in store.artifacts() if artifact.recipe.get("name") == RESULT_STAGE]
    if not searches:
        raise KeyError(
            f"{store.url} holds no finished search. Run `layerwise search`, "
            "or name an artifact that `layerwise ls` lists."
        )
    return max(searches, key=lambda artifact: str(artifact.made.get("at")))


def _by_prefix(store: ArtifactStore, key: str) -> Artifact:
    if "/" in key and len(key.partition("/")[2]) == 32:
        return store.get(key)
    found = [artifact for artifact in store.artifacts() if artifact.key.startswith(key)]
    if len(found) != 1:
        raise KeyError(
            f"{len(found)} artifacts of {store.url} have a key that begins with {key!r}. `layerwise ls` lists them."
        )
    return found[0]
