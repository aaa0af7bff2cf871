"""Find an artifact by its key, by the beginning of its key, or as the newest finished search."""

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


def artifact_by_key(store: ArtifactStore, key: str | None) -> Artifact:
    """Return the artifact with a key.

    Args:
        key: the key or its beginning; None for the newest finished search. If there are several searches, the one
            taken is named on stderr.

    Raises:
        KeyError: no artifact has this key, or several keys begin with it; or the store has no finished search.
    """
    return _newest_search(store) if key is None else _by_prefix(store, key)


def finished_searches(store: ArtifactStore) -> list[Artifact]:
    """Return all finished searches of a store, newest first."""
    return sorted(store.artifacts(f"{RESULT_STAGE}/"), key=lambda artifact: artifact.committed, reverse=True)


def _newest_search(store: ArtifactStore) -> Artifact:
    searches = finished_searches(store)
    if not searches:
        raise KeyError(
            f"{store.url} holds no finished search. Run `layerwise search`, "
            "or give the key of an artifact that `layerwise ls` lists."
        )
    newest = searches[0]
    if len(searches) > 1:
        sys.stderr.write(f"The newest of {len(searches)} searches: {_title(newest)}\n")
    if others := _possibly_newer(searches):
        logger.warning(
            "%s may not be the newest search: an older version of layerwise recorded times by the clock of the "
            "machine. Possibly newer: %s. Give a key to choose.",
            newest.key,
            "; ".join(map(_title, others)),
        )
    return newest


def _possibly_newer(searches: Sequence[Artifact]) -> list[Artifact]:
    """Return searches of older versions that are newest by the storage's dates or by their writer's clock."""
    old = [each for each in searches if each.made.get("clock") != STORAGE_CLOCK]
    by_date = max(searches, key=lambda each: each.dated or 0.0)
    by_record = max(searches, key=lambda each: each.recorded)
    return [each for each in old if each in (by_date, by_record) and each != searches[0]]


def _title(search: Artifact) -> str:
    """Return one line with the key, model, sparsity, pruner and time of a search."""
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
            f"{len(found)} artifacts of {store.url} have a key that begins with {key!r}. `layerwise ls` lists all keys."
        )
    return found[0]
