"""Uploads to S3 that were begun and neither finished nor aborted: they cost storage and no listing shows them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fsspec import AbstractFileSystem

from layerwise.storage.files.errors import reaching
from layerwise.storage.upkeep.inventory import ATTEMPT_FILE, STAGE_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OpenUpload:
    """An upload of a file of a store that is not finished.

    Args:
        path: of the file it would be, relative to the store's root.
        identifier: by which the server knows it.
        began: by the server's clock, in seconds since 1970.
    """

    path: str
    identifier: str
    began: float


def open_uploads(fs: AbstractFileSystem, root: str, stage_names: set[str]) -> list[OpenUpload]:
    """Uploads under way below ``root`` to places where this program writes; none where there is no such thing.

    Args:
        stage_names: folders to look into if the store is a whole bucket: others may upload to it, too.
    """
    if not hasattr(fs, "call_s3"):
        return []
    bucket, prefix, _ = fs.split_path(root)
    below = f"{prefix}/" if prefix else ""
    prefixes = [below] if below else [f"{name}/" for name in sorted(stage_names)]
    try:
        with reaching(fs, root):
            rows = [row for each in prefixes for row in _list(fs, bucket, each)]
    except (OSError, NotImplementedError) as error:
        logger.warning("open uploads below %s cannot be listed (%s): they are left alone", root, error)
        return []
    found = []
    for row in rows:
        path = row["Key"].removeprefix(below)
        match = STAGE_FILE.fullmatch(path)
        if row["Key"].startswith(below) and match and ATTEMPT_FILE.fullmatch(match["name"]):
            found.append(OpenUpload(path, row["UploadId"], row["Initiated"].timestamp()))
    return found


def abort_upload(fs: AbstractFileSystem, root: str, path: str, identifier: str) -> None:
    """Abort an upload; its parts are deleted.

    Raises:
        FileNotFoundError: if it was finished or aborted meanwhile.
        OSError: if the server refuses.
    """
    bucket, key, _ = fs.split_path(f"{root}/{path}")
    fs.call_s3("abort_multipart_upload", Bucket=bucket, Key=key, UploadId=identifier)


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
