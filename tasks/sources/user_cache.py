"""Files that are fetched once per machine, in the user's cache folder."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_128


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


def fetch_with_checksum(target: Path, fetch: Callable[[Path], Path]) -> Path:
    """``target``, fetched first unless it is there with the content that it was fetched with.

    Its checksum lies in a file next to it, and is compared at every call.

    Args:
        fetch: as for ``fetch_once``; has checked what it returns.

    Raises:
        OSError: if what was fetched cannot be read back.
    """
    record = target.with_name(f"{target.name}.xxh3_128")

    def is_as_fetched(path: Path) -> bool:
        return record.exists() and record.read_text() == _checksum(path)

    def fetch_and_record(folder: Path) -> Path:
        fetched = fetch(folder)
        written = folder / record.name
        written.write_text(_checksum(fetched))
        os.replace(written, record)
        return fetched

    return fetch_once(target, is_as_fetched, fetch_and_record)


def _checksum(path: Path) -> str:
    digest = xxh3_128()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()
