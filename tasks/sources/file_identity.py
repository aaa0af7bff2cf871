"""Identity of a file that is read in place: its size, its content, and the version that the file system reports."""

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

# Fields of a file system's entry that change with the content of a file, the most reliable ones first.
VERSION_FIELDS = (
    *("ETag", "etag", "md5Hash", "blob_id", "content_md5"),
    *("mtime", "LastModified", "Last-Modified", "last_modified", "modified", "updated", "created"),
)
# Digests of the whole content that the server computes (Hugging Face Hub, Google). Azure's content_md5 is set by the
# client. An ETag depends on the parts of the upload on S3, and is often size and time behind HTTP.
CHECKSUM_FIELDS = ("blob_id", "md5Hash")


class SourceChanged(OSError):
    """A file of the source has changed since the run began."""


class BrokenLink(OSError):
    """A symbolic link in a source has no target."""


@dataclass(frozen=True)
class FileState:
    """Size and version of a file.

    Attributes:
        size: in bytes.
        version: ETag, blob id or modification time.
        checksum: digest of the whole content; None if the file system does not report one.
        changed: ctime of a local file, in ns; None for other file systems. It cannot be set back, but new hard
            links and changed permissions update it as well.
    """

    size: int
    version: str
    checksum: str | None = None
    changed: int | None = None


def file_state(fs: AbstractFileSystem, path: str) -> FileState:
    """Return the state of the file at ``path``. Links are followed.

    Raises:
        BrokenLink: the path is a link without a target.
        FileNotFoundError: there is no such file.
        ValueError: the file system reports nothing that changes with the content.
    """
    if is_local(fs):
        require_target(fs, path)
        status = os.stat(fs._strip_protocol(path))
        return FileState(status.st_size, str(status.st_mtime_ns), changed=status.st_ctime_ns)
    fs.invalidate_cache(fs._parent(path))  # a cached listing would hide a changed file
    with reaching(fs, path):
        return state_of_entry(fs, fs.info(path))


def state_of_entry(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> FileState:
    """Return the state of a file from its entry in ``fs.info`` or ``fs.ls``.

    Raises:
        ValueError: the entry has no size, or nothing that changes with the content.
    """
    if is_local(fs):
        return file_state(fs, entry["name"])
    name = entry["name"].rsplit("/", 1)[-1]
    if entry["size"] is None:
        raise ValueError(
            f"{type(fs).__name__} does not report the size of {name}, so parts of it cannot be read. Copy it to a "
            "local folder or a bucket."
        )
    checksum = next((str(entry[field]) for field in CHECKSUM_FIELDS if entry.get(field)), None)
    for field in VERSION_FIELDS:
        if version := entry.get(field):
            text = str(version.timestamp() if isinstance(version, datetime) else version)
            return FileState(int(entry["size"]), text.strip('"'), checksum)
    raise ValueError(
        f"{type(fs).__name__} reports neither an ETag nor a modification time for {name}, only {sorted(entry)}, so a "
        "change of the file could not be noticed. Copy it to a local folder or a bucket."
    )


def require_unchanged(
    fs: AbstractFileSystem, path: str, listed: FileState, bytes_are_checked: bool = False
) -> None:
    """Check that the file at ``path`` has not changed since it was ``listed``.

    Args:
        bytes_are_checked: set this if the bytes are compared with digests when they are read. A changed ctime alone
            (a new hard link) is then accepted.

    Raises:
        SourceChanged: the file has another size, ETag or time of change, or no longer exists.
    """
    try:
        found = file_state(fs, path)
    except (FileNotFoundError, BrokenLink) as error:
        raise SourceChanged(
            f"{path} has been removed since this run began. Restore it and run again, or give its new location."
        ) from error
    expected = replace(listed, changed=found.changed) if bytes_are_checked else listed
    if found != expected:
        raise SourceChanged(
            f"{path} has changed since this run began: from {listed.size} bytes, version {_version(listed)}, to "
            f"{found.size} bytes, version {_version(found)}. Restore the original, or run again to import the changed "
            "checkpoint. A run never mixes the two."
        )


def fingerprints(
    fs: AbstractFileSystem, states: Mapping[str, FileState], whole: Collection[str] = ()
) -> dict[str, str]:
    """Return fingerprints of the contents of files, by path. Files with equal fingerprints have equal bytes.

    - If the file system reports a digest of the content, the fingerprint is that digest.
    - For small files and those in ``whole``, it is a digest of all bytes. It does not depend on place or time.
    - For other files, it is the digest of a sample (``sample_contents``) together with the file's version, because
      the bytes outside of the sample may differ elsewhere.
    - Files behind an HTTP server without range requests are read completely.

    Args:
        states: sizes and versions by path.
        whole: paths of the files to read completely.

    Raises:
        Corrupt: a file is shorter than listed.
        OSError: a file cannot be read.
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
    """Return the fingerprint of one file, see ``fingerprints``."""
    return fingerprints(fs, {path: state})[path]


def resolve_link(fs: AbstractFileSystem, entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the entry of a link's target under the name of the link, or ``entry`` itself if it is not a link.

    Raises:
        BrokenLink: the link has no target.
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
    """Check that ``path`` is not a local link without a target.

    Raises:
        BrokenLink: names the link.
    """
    path = fs._strip_protocol(path)
    if is_local(fs) and os.path.islink(path) and not os.path.exists(path):
        raise BrokenLink(_broken(path, f" to {os.readlink(path)}"))


def _serves_ranges(fs: HTTPFileSystem, url: str) -> bool:
    """Return whether a server supports range requests. ``python -m http.server``, for example, does not."""

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
        f"{name} is a symbolic link{target}, but its target does not exist. Restore the target. If you copied a folder "
        "of links, such as the hub's cache, copy the files themselves with cp -rL."
    )
