"""Small JSON files that carry their own digest: manifests and resume points."""

import json
import time
import uuid
from collections.abc import Mapping

from fsspec import AbstractFileSystem

from layerwise.storage.files.corrupt import Corrupt
from layerwise.storage.files.errors import RANGE_TOO_FAR, Unreachable, reaching, status_of
from layerwise.storage.keys import digest

FORMAT = 1
LONGEST = 1 << 30  # bytes
ATTEMPTS = 3  # a small object can come truncated without an error, see STORAGE.md 5


def seal(content: Mapping[str, object]) -> bytes:
    """``content`` as JSON for people, with a unique token and a digest over everything.

    Raises:
        TypeError: if something in ``content`` is not plain (see ``canonical_json``).
        ValueError: if a number in it is not finite.
    """
    sealed = {"format": FORMAT, **content, "token": uuid.uuid4().hex}
    return json.dumps({**sealed, "digest": digest(sealed)}, indent=1).encode()


def read_sealed(fs: AbstractFileSystem, path: str) -> dict:
    """The content of a file written by ``seal``.

    Raises:
        FileNotFoundError: if there is no such file.
        Corrupt: if it is not what was written, several times in a row, or of an unknown format.
        Unreachable: if the storage does not answer.
    """
    problem: Exception
    content = b""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.1 * 2**attempt)
        try:
            with reaching(fs, path):
                # A range, as S3 clients ask for the size first where they want the whole, and list for what is missing.
                content = fs.cat_file(path, start=0, end=LONGEST)
            return _opened(content)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, Corrupt) as error:
            problem = error
        except OSError as error:
            if status_of(error) != RANGE_TOO_FAR:
                raise
            problem = ValueError("it is empty")
    with reaching(fs, path):
        size = fs.info(path)["size"]
    if len(content) < size:
        raise Unreachable(
            f"{path} comes as {len(content)} bytes, although it has {size}: the server, or a proxy before it, answers "
            "wrongly. Check them, then start the same command again: nothing that was committed is lost."
        )
    raise Corrupt(
        f"{path} is not readable ({problem}): it is damaged, or was written by another version of layerwise. "
        "Restore it."
    ) from problem


def _opened(data: bytes) -> dict:
    document = json.loads(data)
    recorded = document.pop("digest")
    if document["format"] != FORMAT:
        raise ValueError(f"format {document['format']}, this version reads {FORMAT}")
    if digest(document) != recorded:
        raise ValueError("its digest does not match its content")
    return document
