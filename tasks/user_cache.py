"""Files that are fetched once per machine, in the user's cache folder."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def cache_folder() -> Path:
    """``$XDG_CACHE_HOME/layerwise``, by default ``~/.cache/layerwise``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise"


def fetch_once(target: Path, is_right: Callable[[Path], bool], fetch: Callable[[Path], Path]) -> Path:
    """``target``, fetched first unless the right file is there already. It appears whole or not at all.

    Args:
        is_right: whether the content of a file is the wanted one.
        fetch: puts the file into the empty folder it is given and returns its path.

    Raises:
        OSError: if what was fetched is not right.
    """
    if target.exists() and is_right(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, so that os.replace is a rename.
    folder = Path(tempfile.mkdtemp(prefix=f"{target.name}.", dir=target.parent))
    try:
        fetched = fetch(folder)
        if not is_right(fetched):
            raise OSError(
                f"{target.name} was fetched with {fetched.stat().st_size} bytes, and they are not the "
                "expected ones. Run again; if it stays, the source has changed or something on the way "
                "alters downloads."
            )
        os.replace(fetched, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target
