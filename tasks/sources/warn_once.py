"""Warnings about a source. A search reads the source several times and logs each warning once."""

import logging
from functools import cache

logger = logging.getLogger(__name__)


@cache
def warn_once(message: str) -> None:
    """Log a warning, unless this process has already logged the same one."""
    logger.warning("%s", message)
