"""Sealed documents: small JSON files that contain their own digest, such as manifests and resume points."""

import errno
import json
import time
import uuid
from collections.abc import Mapping

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import RANGE_TOO_FAR, Corrupt, Unreachable, reaching, status_of
from layerwise.storage.formats.canonical_json import digest

FORMAT = 1
MAX_BYTES = 1 << 30
ATTEMPTS = 3  # a small object can arrive truncated without an error


def seal(content: Mapping[str, object]) -> bytes:
    """Return ``content`` as indented JSON, with a unique token and a digest of everything.

    Raises:
        TypeError: something in ``content`` is not plain (see ``canonical_json``).
        ValueError: a number in ``content`` is not finite.
    """
    sealed = {"format": FORMAT, **content, "token": uuid.uuid4().hex}
    return json.dumps({**sealed, "digest": digest(sealed)}, indent=1).encode()


def read_sealed(fs: AbstractFileSystem, path: str) -> dict:
    """Return the content of a file written by ``seal``.

    Raises:
        FileNotFoundError: the file does not exist.
        Corrupt: the file differs from what was written, several times in a row, or has an unknown format.
        Unreachable: the storage does not answer.
    """
    problem: Exception
    content = b""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(0.1 * 2**attempt)
        try:
            with reaching(fs, path):
                # A range: for a whole object, S3 clients request the size first, and list if it is missing.
                content = fs.cat_file(path, start=0, end=MAX_BYTES)
            return _opened(content)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, Corrupt) as error:
            problem = error
        except OSError as error:
            if (
                error.errno == errno.ESTALE
            ):  # on NFS, another machine replaced the file between opening and reading it
                problem = error
            elif status_of(error) == RANGE_TOO_FAR:
                problem = ValueError("it is empty")
            else:
                raise
    with reaching(fs, path):
        size = fs.info(path)["size"]
    if len(content) < size:
        raise Unreachable(
            f"{path} arrives as {len(content)} bytes, although it has {size}: the server, or a proxy in front of it, answers "
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
