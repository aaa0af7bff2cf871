"""The user's cache folder: files that are downloaded once per machine."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from xxhash import xxh3_128


def cache_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/layerwise``; by default ``~/.cache/layerwise``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "layerwise"


def fetch_once(target: Path, is_right: Callable[[Path], bool], fetch: Callable[[Path], Path]) -> Path:
    """Return ``target``; fetch it first unless the right file exists. The file appears complete or not at all.

    Args:
        is_right: returns whether a file has the expected content.
        fetch: writes the file into the empty folder it is given, and returns its path.

    Raises:
        OSError: the fetched file does not have the expected content.
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
                f"{target.name} was downloaded ({fetched.stat().st_size} bytes), but its content is not the expected "
                "one. Run again. If the error persists, the source has changed or a proxy alters downloads."
            )
        os.replace(fetched, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return target


def fetch_with_checksum(target: Path, fetch: Callable[[Path], Path]) -> Path:
    """Return ``target``; fetch it first unless it exists with the content that was fetched.

    A checksum file next to it is compared at every call.

    Args:
        fetch: see ``fetch_once``. It must check the file that it returns.

    Raises:
        OSError: the fetched file cannot be read back.
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
