"""File systems: opened by URL through fsspec, with S3 settings that survive an outage of 20 seconds."""

import os
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.config import conf
from fsspec.core import split_protocol, url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import get_filesystem_class, known_implementations

# Attempts of s3fs: an attribute of its file system, not an argument. Its default of five gives up within seconds.
S3_RETRIES = 12
S3_CLIENT_SETTINGS = {  # measured; botocore's defaults do not survive an outage of 20 seconds
    "retries": {"mode": "standard", "total_max_attempts": 10},
    "connect_timeout": 10,  # seconds
    "read_timeout": 60,  # seconds without a byte
    "max_pool_connections": 64,  # reading and writing use up to 32 each; the default of 10 would limit them
}
MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")  # by file system


def open_filesystem(url: str, **options: Any) -> tuple[AbstractFileSystem, str]:
    """Return the file system of ``url``, and the path of ``url`` on it.

    Options go to fsspec. Credentials come from the environment or the fsspec configuration, not from the URL.

    Raises:
        ValueError: the protocol is unknown, or the URL holds a password.
        ImportError: the protocol needs a package that is not installed.
    """
    url = os.fspath(url)
    if "://" in url and urlsplit(url).password:
        raise ValueError(
            f"the {urlsplit(url).scheme} URL of {urlsplit(url).hostname!r} holds a password, which would end "
            "up in logs and reports. Put credentials into environment variables or the fsspec configuration."
        )
    protocol = split_protocol(url)[0] or "file"
    _require_protocol(protocol)
    if protocol not in ("s3", "s3a"):
        return url_to_fs(url, **options)
    fs, path = url_to_fs(url, **_s3_options(options))
    fs.retries = max(fs.retries, S3_RETRIES)
    return fs, path


def is_local(fs: AbstractFileSystem) -> bool:
    """Return whether paths on ``fs`` are paths of this machine."""
    return isinstance(fs, LocalFileSystem)


def modified(fs: AbstractFileSystem, row: dict[str, Any]) -> float:
    """Return when a listed file was modified, by the storage's clock, in seconds since 1970.

    Args:
        row: entry of the file in a listing, or from ``fs.info``.
    """
    for name in MODIFIED:
        value = row.get(name)
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            return datetime.fromisoformat(value).timestamp()
        if isinstance(value, datetime):
            return value.timestamp()
    return fs.modified(row["name"]).timestamp()


def _s3_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return arguments for s3fs: from the caller, then from the fsspec configuration, then our own."""
    configured = {name: value for protocol in ("s3", "s3a") for name, value in conf.get(protocol, {}).items()}
    settings = {**configured, **options}
    return {
        "use_listings_cache": False,  # another machine may have written since
        "fixed_upload_size": True,  # some servers require parts of equal size
        **settings,
        "config_kwargs": S3_CLIENT_SETTINGS | settings.get("config_kwargs", {}),
    }


def _require_protocol(protocol: str) -> None:
    for name in protocol.split("::"):
        try:
            get_filesystem_class(name)
        except ValueError:
            raise ValueError(
                f"{name}:// URLs are not supported. Use a folder, s3://, gs://, abfs://, hf:// or "
                "memory://, or install the fsspec package for this protocol."
            ) from None
        except ImportError as error:
            advice = known_implementations.get(name, {}).get("err", "Install the fsspec package for it")
            raise ImportError(
                f"{name}:// URLs need a package that is not installed ({error}). {advice} (pip install ...)."
            ) from error
