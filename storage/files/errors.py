"""Errors of stored files: bytes that are wrong, and storages that do not answer or refuse.

Errors of storage clients are translated into these, with the object, the server and what to do.
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from layerwise.storage.files.credentials import without_credentials, without_secrets

# Packages whose exceptions are about the access to a storage, whether or not they are OSErrors.
CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "requests", "urllib3"}
# Parts of the names of botocore's exceptions that are about credentials, and about the client's settings.
CREDENTIALS = ("Credential", "ProfileNotFound", "Token", "SSO", "Login", "RefreshWithMFA")
SETTINGS = ("Config", "Validation", "Region", "InvalidDNSName", "InvalidHostLabel", "Unsupported", "Unknown")
REFUSED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "CredentialsNotSupported"}
RANGE_TOO_FAR = 416  # HTTP status: the object is shorter than the requested range
PASSING_STATUSES = (408, 425, 429)  # HTTP statuses that mean "try later"; so do all from 500 on
CREDENTIALS_ADVICE = (
    "Put credentials that may read and write there into the environment (on S3 AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) or the fsspec configuration. AWS also requires the permission "
    "s3:ListBucket; without it, S3 refuses to report that an object is missing."
)


class Corrupt(OSError):
    """Stored bytes differ from the bytes that were written. A storage that fails raises ``Unreachable`` instead."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[type["Corrupt"], tuple[str]]:
        return Corrupt, (str(self),)  # OSError would be unpickled with two arguments


class Missing(Corrupt):
    """An expected file does not exist.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} is missing")
        self.path = path

    def __reduce__(self) -> tuple[type["Missing"], tuple[str]]:
        return Missing, (self.path,)


class Removed(Corrupt):
    """Another process deleted a file that this process wrote for an artifact, before the artifact was committed.

    Args:
        path: of the file.
    """

    def __init__(self, path: str) -> None:
        super().__init__(f"{path} was deleted while the artifact was being built")
        self.path = path

    def __reduce__(self) -> tuple[type["Removed"], tuple[str]]:
        return Removed, (self.path,)


class Unreachable(OSError):
    """The storage does not answer, or answers wrongly. Says nothing about the state of the stored files."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EHOSTUNREACH, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[type["Unreachable"], tuple[str]]:
        return Unreachable, (str(self),)  # OSError would be unpickled with two arguments


@contextlib.contextmanager
def reaching(fs: AbstractFileSystem, path: str) -> Iterator[None]:
    """Translate errors of requests for ``path`` in the block: add the path, the server and what to do.

    Errors of a local disk pass unchanged. So do errors about the stored object itself: a missing file, a folder.

    Raises:
        Unreachable: a connection fails, times out or breaks, or the server answers "try later".
        Corrupt: the client found a checksum that does not match.
        PermissionError: credentials are missing, wrong or insufficient.
        FileNotFoundError: the bucket does not exist.
        OSError: the server refuses for another reason; the errno is the one that the client chose.
    """
    try:
        yield
    except Exception as error:
        translated = explained(fs, path, error)
        if translated is error:
            raise
        # In a traceback, a chained error would show the secrets that were removed from the message.
        raise translated from (error if _without_secrets(fs, str(error)) == str(error) else None)


def explained(fs: AbstractFileSystem, path: str, error: Exception) -> Exception:
    """Return ``error`` as ``reaching`` raises it; the same object if there is nothing to add."""
    about_storage = isinstance(error, OSError) or _is_from_client(error)
    is_translated = isinstance(error, Corrupt | Unreachable) or f" at {endpoint_of(fs)} " in str(error)
    if isinstance(fs, LocalFileSystem) or not about_storage or is_translated:
        return error
    status, code = _answer(error)
    reason = " ".join(_without_secrets(fs, f"{type(error).__name__}: {error}").split())
    where = f"{path} at {endpoint_of(fs)}"
    if (
        isinstance(error, PermissionError)
        or status in (401, 403)
        or code in REFUSED_CODES
        or _is_about(error, CREDENTIALS)
    ):
        return PermissionError(
            errno.EACCES,
            f"{where} was refused ({reason}): the credentials are missing, wrong, expired or do not allow it. "
            f"{CREDENTIALS_ADVICE}",
        )
    if code == "NoSuchBucket":
        return FileNotFoundError(
            errno.ENOENT,
            f"{where} cannot be opened ({reason}): there is no such bucket. Create it, or correct the "
            "store's URL, the endpoint URL (AWS_ENDPOINT_URL) or the region (AWS_DEFAULT_REGION).",
        )
    about_the_object = FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError
    if isinstance(error, about_the_object) or status == RANGE_TOO_FAR:
        return error
    if status is not None and status < 500 and status not in PASSING_STATUSES:
        return OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{where} was refused with HTTP status {status} ({reason}). Check the store's URL, the endpoint URL "
            "(AWS_ENDPOINT_URL) and the region (AWS_DEFAULT_REGION).",
        )
    # The checksum is stored with the object, so it is checked only when a whole object is read.
    if _is_about(error, ("FlexibleChecksumError",)):
        return Corrupt(
            f"{where} was received with other bytes than were stored ({reason}). Check the storage, or delete the object."
        )
    if _is_about(error, SETTINGS) or isinstance(error, ValueError):
        return OSError(
            errno.EINVAL,
            f"{where} cannot be requested ({reason}): the settings of the client are invalid. Correct the AWS_* "
            "environment variables, the AWS configuration or the fsspec configuration.",
        )
    return Unreachable(
        f"{where} cannot be reached ({reason}) after several attempts. Check the network, the "
        "server and the endpoint URL, then start the same command again: nothing that was committed is lost."
    )


def endpoint_of(fs: AbstractFileSystem) -> str:
    """Return the URL of the server of ``fs`` for messages, without user name and password."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    client = getattr(fs, "_s3", None)
    url = client.meta.endpoint_url if client is not None else getattr(fs, "endpoint_url", None)
    if protocol == "s3":
        url = url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return f"{protocol}://"
    parts = urlsplit(without_credentials(str(url)))
    return f"{parts.scheme}://{parts.netloc}"


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status behind an error of a storage client; None if there was no answer."""
    return _answer(error)[0]


def _answer(error: BaseException) -> tuple[int | None, str | None]:
    """Return the HTTP status and error code of the answer behind ``error``."""
    for each in (error, error.__cause__):
        response = getattr(each, "response", None)
        if isinstance(response, dict):  # botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            return status, response.get("Error", {}).get("Code")
        status = getattr(response, "status_code", None) or getattr(each, "status", None)
        if isinstance(status, int):  # requests and httpx; aiohttp
            return status, None
    return None, None


def _is_from_client(error: Exception) -> bool:
    wrong_endpoint = isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")  # botocore's
    return wrong_endpoint or any(kind.__module__.partition(".")[0] in CLIENTS for kind in type(error).__mro__)


def _is_about(error: Exception, words: tuple[str, ...]) -> bool:
    names = [kind.__name__ for kind in type(error).__mro__ if kind.__module__.startswith("botocore")]
    return any(word in name for word in words for name in names)


def _without_secrets(fs: AbstractFileSystem, text: str) -> str:
    for name in ("secret", "token", "key", "password"):
        if isinstance(value := getattr(fs, name, None), str) and value:
            text = text.replace(value, "***")
    return without_secrets(text)
