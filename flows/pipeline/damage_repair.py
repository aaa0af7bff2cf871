"""Repair during a run: damaged artifacts are set aside and rebuilt, deleted artifacts are rebuilt."""

import logging
from collections.abc import Callable
from typing import TypeVar

from layerwise.storage.artifact import Damaged
from layerwise.storage.files.errors import Corrupt
from layerwise.storage.pauses import since_boot, why_files_are_gone
from layerwise.storage.store import ArtifactStore
from layerwise.storage.upkeep.set_aside import set_aside

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def rebuild_damaged(store: ArtifactStore, run: Callable[[], Result]) -> Result:
    """Call ``run`` again after each damaged artifact that it meets, until it succeeds.

    A damaged artifact is set aside first, so that the next call rebuilds it; undamaged artifacts are reused. An
    artifact also counts as damaged if another process deleted it after this process had found it, for instance
    ``layerwise gc --results-only`` while this process was paused.

    Raises:
        Damaged: an artifact is damaged again after it was rebuilt.
    """
    repaired: set[str] = set()
    began = since_boot()
    while True:
        try:
            return run()
        except Damaged as damaged:
            if damaged.key in repaired:
                raise
            repaired.add(damaged.key)
            if set_aside(store, damaged):
                logger.warning("%s It is set aside and rebuilt.", damaged)
            elif _is_gone(store, damaged.key):
                logger.warning(
                    "%s was deleted from the store during this run. %s It is rebuilt.",
                    damaged.key,
                    why_files_are_gone(began),
                )


def _is_gone(store: ArtifactStore, key: str) -> bool:
    try:
        store.get(key)
    except KeyError:
        return True
    except Corrupt:
        pass
    return False
