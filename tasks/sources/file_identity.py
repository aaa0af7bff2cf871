"""Identity of a file that is read in place: its name, size, content, and the version that the storage tells."""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from http import HTTPStatus
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.asyn import sync
from fsspec.implementations.http import HTTPFileSystem
from xxhash import xxh3_128

from layerwise.storage.content_sample import sample_contents
from layerwise.storage.files.errors import reaching
from layerwise.storage.files.filesystem import is_local

# What changes when a file's bytes do, under the names that file systems use for it; the surest first.
VERSION_FIELDS = (
    *("ETag", "etag", "md5Hash", "blob_id", "content_md5"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modified", "updated", "created"),
)
# Digests of the whole content that the server itself computes (the Hugging Face Hub; Google). Not Azure's
# content_md5, which is what a client says; not an ETag, which on S3 depends on the parts of the upload and behind
# HTTP is often size and time.
CHECKSUM_FIELDS = ("blob_id", "md5Hash")


class SourceChanged(OSError):
    """A file that a run reads is not the one that the run began with."""


class BrokenLink(OSError):
    """A symbolic link in a source leads to nothing."""


@dataclass(frozen=True)
class FileState:
    """Size in bytes of a file, and what changes with its content.

    Attributes:
        version: an ETag, blob id or modification time.
        checksum: of the whole content, if the storage tells one.
        changed: of a file on a local disk, the time of its last change of any kind (ctime), in ns. Nobody can set
            it back, but a new hard link or other permissions are such a change, too.
    """

    size: int
    version: str
    checksum: str | None = None
    changed: int | None = None


def file_state(fs: AbstractFileSystem, path: str) -> FileState:
    """The state of the file at ``path``; a link means the file that it leads to.

    Raises:
        BrokenLink: if it is a link that leads to nothing.
        FileNotFoundError: if there is no such file.
        ValueError: if the file system tells nothing that changes with the content.
    """
    if is_local(fs):
        require_target(fs, path)
        status = os.stat(fs._strip_protocol(path))
        return FileState(status.st_size, str(status.st_mtime_ns), changed=status.st_ctime_ns)
    fs.invalidate_cache(fs._parent(path))  # a listing that is remembered would hide a changed file
    with reaching(fs, path):
        return state_of_entry(fs, fs.info(path))


def state_of_entry(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> FileState:
    """The state of a file by what ``fs.info`` or ``fs.ls`` tells about it.

    Raises:
        ValueError: if the file system tells no size, or nothing that changes with the content.
    """
    if is_local(fs):
        return file_state(fs, entry["name"])
    name = entry["name"].rsplit("/", 1)[-1]
    if entry["size"] is None:
        raise ValueError(
            f"{type(fs).__name__} does not tell the size of {name}, so it cannot be read by ranges. Copy it to a "
            "local folder or a bucket."
        )
    checksum = next((str(entry[field]) for field in CHECKSUM_FIELDS if entry.get(field)), None)
    for field in VERSION_FIELDS:
        if version := entry.get(field):
            text = str(version.timestamp() if isinstance(version, datetime) else version)
            return FileState(int(entry["size"]), text.strip('"'), checksum)
    raise ValueError(
        f"{type(fs).__name__} tells neither an ETag nor a modification time for {name}, only {sorted(entry)}, so a "
        "changed file could not be told from the one that was read before. Copy it to a local folder or a bucket."
    )


def require_unchanged(
    fs: AbstractFileSystem, path: str, listed: FileState, bytes_are_checked: bool = False
) -> None:
    """Look whether the file at ``path`` is still the one that was ``listed``.

    Args:
        bytes_are_checked: whether what is read of it is compared with digests: then a changed ctime alone, as a new
            hard link gives it, does not matter.

    Raises:
        SourceChanged: it has another size, ETag or time of change, or is gone.
    """
    try:
        found = file_state(fs, path)
    except (FileNotFoundError, BrokenLink) as error:
        raise SourceChanged(
            f"{path} is gone since this run began. Put it back and run again, or name the place where it is now."
        ) from error
    expected = replace(listed, changed=found.changed) if bytes_are_checked else listed
    if found != expected:
        raise SourceChanged(
            f"{path} has changed since this run began: {listed.size} bytes, version {_version(listed)}, became "
            f"{found.size} bytes, version {_version(found)}. Put the original back, or run again: the changed "
            "checkpoint is imported anew, and a run never mixes the two."
        )


def fingerprints(
    fs: AbstractFileSystem, states: Mapping[str, FileState], whole: Collection[str] = ()
) -> dict[str, str]:
    """Fingerprints of files by their content: two files with equal ones have equal bytes.

    A digest of all bytes where the storage tells one, for small files and for those named in ``whole``: it is the
    same wherever and whenever the file was written. For others the digest of a sample (``sample_contents``) and the
    storage's version of the file, as nobody knows whether the bytes that were not read are equal elsewhere. What
    lies behind an HTTP server that gives no parts of files is read to its end.

    Args:
        states: by path.
        whole: paths of files to read whole.

    Raises:
        Corrupt: if a file is shorter than was listed.
        OSError: if a file cannot be read.
    """
    unknown = {path: state.size for path, state in states.items() if state.checksum is None}
    found = {path: state.checksum for path, state in states.items() if state.checksum is not None}
    if isinstance(fs, HTTPFileSystem) and (
        streamed := [path for path in unknown if not _serves_ranges(fs, path)]
    ):
        found |= {path: _streamed_digest(fs, path) for path in streamed}
        unknown = {path: size for path, size in unknown.items() if path not in found}
    samples = sample_contents(fs, unknown, whole)
    for path, sample in samples.items():
        found[path] = sample.digest if sample.whole else f"{sample.digest} {_version(states[path])}"
    return found


def fingerprint(fs: AbstractFileSystem, path: str, state: FileState) -> str:
    """Fingerprint of one file, see ``fingerprints``."""
    return fingerprints(fs, {path: state})[path]


def resolve_link(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a listed entry leads to, if it is a link; otherwise the entry itself.

    Raises:
        BrokenLink: if it leads to nothing.
    """
    if not entry.get("islink") and entry["type"] in ("file", "directory"):
        return entry
    path = entry["name"]
    require_target(fs, path)
    try:
        with reaching(fs, path):
            return {**fs.info(path), "name": path}
    except FileNotFoundError as error:
        raise BrokenLink(_broken(path, "")) from error


def require_target(fs: AbstractFileSystem, path: str) -> None:
    """Look whether a local link leads to something.

    Raises:
        BrokenLink: if it does not; names the link.
    """
    path = fs._strip_protocol(path)
    if is_local(fs) and os.path.islink(path) and not os.path.exists(path):
        raise BrokenLink(_broken(path, f" to {os.readlink(path)}"))


def _serves_ranges(fs: HTTPFileSystem, url: str) -> bool:
    """Whether a server gives a part of a file; python -m http.server, for one, always gives all of it."""

    async def answers_with_a_part() -> bool:
        session = await fs.set_session()
        async with session.get(fs.encode_url(url), headers={"Range": "bytes=0-0"}) as answer:
            return bool(answer.status == HTTPStatus.PARTIAL_CONTENT)

    with reaching(fs, url):
        return bool(sync(fs.loop, answers_with_a_part))


def _streamed_digest(fs: HTTPFileSystem, url: str) -> str:
    digest = xxh3_128()
    with reaching(fs, url), fs.open(url, "rb", block_size=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _version(state: FileState) -> str:
    return state.version if state.changed is None else f"{state.version} {state.changed}"


def _broken(name: str, target: str) -> str:
    return (
        f"{name} is a symbolic link{target} that leads to no file. Restore what it leads to; when copying a folder of "
        "links, as the hub's cache is, copy the files themselves: cp -rL."
    )
