"""Damaged artifacts: a run that meets one sets it aside and builds it anew."""

import logging
from collections.abc import Callable
from typing import TypeVar

from storage.damage import Damaged
from storage.set_aside import set_aside
from storage.store import ArtifactStore

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


def mending(store: ArtifactStore, run: Callable[[], Result]) -> Result:
    """Call ``run`` until it meets no damaged artifact any more; what is whole is found done every time.

    Raises:
        Damaged: an artifact is damaged again after it was built anew.
    """
    mended: set[str] = set()
    while True:
        try:
            return run()
        except Damaged as damaged:
            if damaged.key in mended:
                raise
            mended.add(damaged.key)
            if set_aside(store, damaged):
                logger.warning("%s It is set aside and built anew.", damaged)
