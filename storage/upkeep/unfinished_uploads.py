"""Unfinished uploads to S3, which were neither completed nor aborted. They cost storage, and no listing shows them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import reaching
from layerwise.storage.inventory import ATTEMPT_FILE, STAGE_FILE
from layerwise.storage.location import StoreLocation

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenUpload:
    """An unfinished upload of a file of a store.

    Attributes:
        path: of the file, relative to the store's root.
        identifier: of the upload on the server.
        began: by the server's clock, in seconds since 1970.
    """

    path: str
    identifier: str
    began: float


def open_uploads(store: StoreLocation, stage_names: set[str]) -> list[OpenUpload]:
    """Return the unfinished uploads of files that this program writes; an empty list on storages other than S3.

    Args:
        stage_names: folders to search if the store is a whole bucket, to which other programs may upload, too.
    """
    fs = store.fs
    if not hasattr(fs, "call_s3"):
        return []
    bucket, prefix, _ = fs.split_path(store.root)
    below = f"{prefix}/" if prefix else ""
    prefixes = [below] if below else [f"{name}/" for name in sorted(stage_names)]
    try:
        with reaching(fs, store.root):
            rows = [row for each in prefixes for row in _list(fs, bucket, each)]
    except (OSError, NotImplementedError) as error:
        logger.warning("open uploads below %s cannot be listed (%s): they stay", store.root, error)
        return []
    found = []
    for row in rows:
        path = row["Key"].removeprefix(below)
        match = STAGE_FILE.fullmatch(path)
        if row["Key"].startswith(below) and match and ATTEMPT_FILE.fullmatch(match["name"]):
            found.append(OpenUpload(path, row["UploadId"], row["Initiated"].timestamp()))
    return found


def abort_upload(store: StoreLocation, path: str, identifier: str) -> None:
    """Abort an upload. The server deletes its parts.

    Raises:
        FileNotFoundError: it was completed or aborted in the meantime.
        OSError: the server refuses.
    """
    bucket, key, _ = store.fs.split_path(store.path(path))
    store.fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=identifier)


def _list(fs: AbstractFileSystem, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    markers: dict[str, str] = {}
    while True:
        answer = fs.call_s3("list_multipart_uploads", Bucket=bucket, Prefix=prefix, **markers)
        yield from answer.get("Uploads", [])
        following = {
            "KeyMarker": answer.get("NextKeyMarker") or "",
            "UploadIdMarker": answer.get("NextUploadIdMarker") or "",
        }
        if not answer.get("IsTruncated") or following == markers:
            return
        markers = following
