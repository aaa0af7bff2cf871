"""Asking a storage whether it can decide who was first: the whole store rests on that."""

import contextlib
import errno
import uuid

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import endpoint_of
from layerwise.storage.files.publishing import create_once
from layerwise.storage.files.reading import read_exactly


def require_exclusive_creation(fs: AbstractFileSystem, root: str) -> None:
    """Make sure that of two creations of one file below ``root`` the second is refused.

    Leaves nothing behind, unless the process is killed in between: then one small file ``probe-<32 hex>``.

    Raises:
        OSError: if the second creation succeeded, or the storage cannot be written to.
        Unreachable: if the storage does not answer.
    """
    path = f"{root}/probe-{uuid.uuid4().hex}"
    first, second = (f"{number} {uuid.uuid4().hex}".encode() for number in ("first", "second"))
    try:
        created = [create_once(fs, path, document) for document in (first, second)]
        content = bytearray(len(first))
        read_exactly(fs, path, 0, memoryview(content))
    finally:
        with contextlib.suppress(Exception):  # what happened before is more important than a small file
            fs.rm_file(path)
    if created != [True, False] or content != first:
        raise OSError(
            errno.ENOTSUP,
            f"{root} at {endpoint_of(fs)} cannot be a store: of two exclusive creations of {path} the answers "
            f"were {created} instead of [True, False], and the file held {bytes(content)!r}, so two workers "
            "could overwrite each other's results. Use a server that respects 'If-None-Match: *' on PUT: AWS S3 "
            "documents it, SeaweedFS 4.48 and Ceph RGW 16.2 were measured; or put the store on a local disk.",
        )
