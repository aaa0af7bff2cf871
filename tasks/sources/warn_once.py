"""Warnings about a source: a search looks at it several times, and says each of them once."""

import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has logged the very same one already."""
    logger.warning("%s", message)
