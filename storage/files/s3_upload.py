"""Uploads to S3 in parts, several at a time.

fsspec's own file objects send one part after the other.
"""

import asyncio
import contextlib
import io
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import AbstractContextManager
from math import ceil
from typing import Any

from fsspec import AbstractFileSystem

PART = 8 << 20  # maximum bytes of a part, unless the file would have too many parts
SMALLEST = 5 << 20  # bytes: S3's minimum for all parts but the last one
PARTS = 10_000  # S3's maximum number
AT_ONCE = 32  # parts under way: 256 MB of memory
UPLOAD_MEMORY = AT_ONCE * PART  # bytes
FEWEST = 2  # parts under way, however large they are


def is_s3(fs: AbstractFileSystem) -> bool:
    """Return whether ``fs`` is s3fs's file system, whose requests ``upload_in_parts`` makes."""
    return "s3" in fs.protocol and "call_s3" in dir(fs)


def part_size(size: int) -> int:
    """Return the bytes of one part of a file of ``size`` bytes; 0 if its size is unknown.

    An upload ends with its last part. So the number of parts is a multiple of those that are under way, if they do not
    become too small, and none of them is left over for a round of its own.
    """
    if size <= PART:
        return PART
    rounds = ceil(size / (AT_ONCE * PART))
    return max(ceil(size / (AT_ONCE * rounds)), SMALLEST, ceil(size / PARTS))


def upload_in_parts(
    fs: AbstractFileSystem,
    path: str,
    parts: Iterable[io.BytesIO],
    size: int,
    requesting: Callable[[], AbstractContextManager[Any]],
) -> None:
    """Upload a file in parts. It becomes visible when it is complete; after an error, its parts are deleted.

    At most 32 parts are under way. They need 256 MB, or two parts if these are larger, in addition to the part that is
    being made. If a part fails, those under way are cancelled, and no other is sent.

    Args:
        parts: the content, consumed once; all but the last one have the same size, which some servers require.
        size: bytes of one part.
        requesting: context for requests, to translate their errors. Errors of ``parts`` are raised outside of it.
    """
    bucket, key, _ = fs.split_path(path)
    where = {"Bucket": bucket, "Key": key}
    with requesting():
        upload = where | {"UploadId": fs.call_s3("create_multipart_upload", **where)["UploadId"]}
    under_way: dict[Future[dict[str, Any]], int] = {}
    done: dict[int, dict[str, Any]] = {}

    def wait_until(count: int) -> None:
        """Wait until at most ``count`` parts are under way."""
        with requesting():
            while len(under_way) > count:
                for request in wait(under_way, return_when=FIRST_COMPLETED).done:
                    number = under_way.pop(request)
                    done[number] = _described(number, request.result())

    most = min(AT_ONCE, max(FEWEST, UPLOAD_MEMORY // size))
    try:
        for number, part in enumerate(parts, start=1):
            wait_until(most - 1)
            sending = fs._call_s3("upload_part", PartNumber=number, Body=part, **upload)
            under_way[asyncio.run_coroutine_threadsafe(sending, fs.loop)] = number
        wait_until(0)
        with requesting():
            ordered = {"Parts": [done[number] for number in sorted(done)]}
            fs.call_s3("complete_multipart_upload", MultipartUpload=ordered, **upload)
    except BaseException:
        for request in under_way:
            request.cancel()
        with contextlib.suppress(Exception):  # the first error is the one to report
            fs.call_s3("abort_multipart_upload", **upload)
        raise


def equal_parts(pieces: Iterable[memoryview], size: int) -> Iterator[io.BytesIO]:
    """Join and split ``pieces`` into parts of ``size`` bytes; the last one may be smaller.

    The HTTP client sends files in small blocks; of bytes it would make another copy.
    """
    part = io.BytesIO()
    for piece in pieces:
        rest = piece
        while len(rest):
            count = part.write(rest[: size - part.tell()])
            rest = rest[count:]
            if part.tell() == size:
                part.seek(0)
                yield part
                part = io.BytesIO()
    if part.tell():
        part.seek(0)
        yield part


def _described(number: int, answer: dict[str, Any]) -> dict[str, Any]:
    """Return what S3 wants to know about a part at the end of the upload."""
    fields = ("ETag", "ChecksumSHA256")
    return {"PartNumber": number} | {name: answer[name] for name in fields if name in answer}
