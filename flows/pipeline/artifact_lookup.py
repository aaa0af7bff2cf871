"""Find the artifact of a store that somebody asks for by its key."""

import logging
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, cast

from layerwise.storage.artifact import STORAGE_CLOCK, Artifact
from layerwise.storage.store import ArtifactStore
from layerwise.tasks.results.search_result import RESULT_STAGE
from layerwise.tasks.running.printable import printable

logger = logging.getLogger(__name__)


def asked_artifact(store: ArtifactStore, key: str | None) -> Artifact:
    """The artifact with this key, or whose key begins so; the newest search's if it is None, which people are told.

    Raises:
        KeyError: no artifact has that key, or several begin with it.
    """
    return _newest_search(store) if key is None else _by_prefix(store, key)


def finished_searches(store: ArtifactStore) -> list[Artifact]:
    """All of a store, the newest first."""
    return sorted(store.artifacts(f"{RESULT_STAGE}/"), key=lambda artifact: artifact.committed, reverse=True)


def _newest_search(store: ArtifactStore) -> Artifact:
    searches = finished_searches(store)
    if not searches:
        raise KeyError(
            f"{store.url} holds no finished search. Run `layerwise search`, "
            "or name an artifact that `layerwise ls` lists."
        )
    newest = searches[0]
    if len(searches) > 1:
        sys.stderr.write(f"The newest of {len(searches)} searches: {_title(newest)}\n")
    if others := _perhaps_newer(searches):
        logger.warning(
            "It is not certain that %s is the newest search: an older version of layerwise recorded times by the "
            "clock of the machine. Perhaps newer: %s. Give a key to choose.",
            newest.key,
            "; ".join(map(_title, others)),
        )
    return newest


def _perhaps_newer(searches: Sequence[Artifact]) -> list[Artifact]:
    """Searches of older versions that are the newest by the storage's dates, or by their writer's clock."""
    old = [each for each in searches if each.made.get("clock") != STORAGE_CLOCK]
    by_date = max(searches, key=lambda each: each.dated or 0.0)
    by_record = max(searches, key=lambda each: each.recorded)
    return [each for each in old if each in (by_date, by_record) and each != searches[0]]


def _title(search: Artifact) -> str:
    """A search in one line."""
    settings = cast(Mapping[str, Any], search.recipe["settings"])["settings"]
    title = (
        f"{search.key}, {search.facts['source']} at sparsity {settings['sparsity']:g}, "
        f"{settings['pruner']['method']}, finished {datetime.fromtimestamp(search.committed, UTC):%Y-%m-%d %H:%M} UTC"
    )
    return printable(title)


def _by_prefix(store: ArtifactStore, key: str) -> Artifact:
    if "/" in key and len(key.partition("/")[2]) == 32:
        return store.get(key)
    found = list(store.artifacts(key))
    if len(found) != 1:
        raise KeyError(
            f"{len(found)} artifacts of {store.url} have a key that begins with {key!r}. `layerwise ls` lists them."
        )
    return found[0]
