"""Damaged and deleted artifacts: a run that meets one builds it anew; a damaged one is set aside before."""

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


def mending(store: ArtifactStore, run: Callable[[], Result]) -> Result:
    """Call ``run`` until it meets no damaged artifact any more; what is whole is found done every time.

    An artifact that another process has deleted since this one found it (``layerwise gc --results-only``, while this
    process was paused) is one whose files are missing.

    Raises:
        Damaged: an artifact is damaged again after it was built anew.
    """
    mended: set[str] = set()
    began = since_boot()
    while True:
        try:
            return run()
        except Damaged as damaged:
            if damaged.key in mended:
                raise
            mended.add(damaged.key)
            if set_aside(store, damaged):
                logger.warning("%s It is set aside and built anew.", damaged)
            elif _is_gone(store, damaged.key):
                logger.warning(
                    "%s is not in the store any more, although this run has read it before. %s It is built anew.",
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
