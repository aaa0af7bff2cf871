"""A storage that does not answer, or refuses: told apart from damage, with the object and the server named."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from urllib.parse import urlsplit

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from layerwise.storage.files.corrupt import Corrupt

# Packages whose exceptions are about the way to a storage, whether or not they are OSErrors.
CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "requests", "urllib3"}
# Parts of the names of their exceptions that are about who we are, and about how the client was set up.
CREDENTIALS = ("Credential", "ProfileNotFound", "Token", "SSO", "Login", "RefreshWithMFA")
SETTINGS = ("Config", "Validation", "Region", "InvalidDNSName", "InvalidHostLabel", "Unsupported", "Unknown")
REFUSED_CODES = {"ExpiredToken", "InvalidToken", "TokenRefreshRequired", "CredentialsNotSupported"}
RANGE_TOO_FAR = 416  # says what is stored: less than was asked for
PASSING_STATUSES = (408, 425, 429)  # "later, please"; so are all from 500 on
CREDENTIALS_ADVICE = (
    "Put credentials that may read and write there into the environment (on S3 AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, or AWS_PROFILE) or the fsspec configuration; AWS wants the right s3:ListBucket, "
    "too, or it refuses to say that an object is missing."
)


class Unreachable(OSError):
    """The storage does not answer, or not properly. It says nothing about what is stored there."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EHOSTUNREACH, message)

    def __str__(self) -> str:
        return str(self.args[1])

    def __reduce__(self) -> tuple[type["Unreachable"], tuple[str]]:
        return Unreachable, (str(self),)  # OSError would be unpickled with two arguments


@contextlib.contextmanager
def reaching(fs: AbstractFileSystem, path: str) -> Iterator[None]:
    """Put around requests about ``path``: their errors name it, the server and what to do.

    Errors of a local disk pass as they are, and so do those that say what is stored: a missing file, a folder.

    Raises:
        Unreachable: for connections that fail, time out or break, and for answers that say "later".
        Corrupt: if the client itself found a checksum that does not match.
        PermissionError: if credentials are missing, wrong or not enough.
        FileNotFoundError: if there is no such bucket.
        OSError: if the server refuses for another reason, with the errno the client chose.
    """
    try:
        yield
    except Exception as error:
        told = explained(fs, path, error)
        if told is error:
            raise
        # A chained error would show in a traceback what was taken out of the message.
        raise told from (error if _without_secrets(fs, str(error)) == str(error) else None)


def explained(fs: AbstractFileSystem, path: str, error: Exception) -> Exception:
    """``error`` as ``reaching`` raises it; the same object if there is nothing to add."""
    about_storage = isinstance(error, OSError) or _is_from_client(error)
    is_done = isinstance(error, Corrupt | Unreachable) or f" at {endpoint_of(fs)} " in str(error)
    if isinstance(fs, LocalFileSystem) or not about_storage or is_done:
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
            f"{where} cannot be had ({reason}): there is no such bucket there. Create it, or correct the "
            "store's URL, the endpoint URL (AWS_ENDPOINT_URL) or the region (AWS_DEFAULT_REGION).",
        )
    says_what_is_stored = FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError
    if isinstance(error, says_what_is_stored) or status == RANGE_TOO_FAR:
        return error
    if status is not None and status < 500 and status not in PASSING_STATUSES:
        return OSError(
            getattr(error, "errno", None) or errno.EIO,
            f"{where} was refused with HTTP status {status} ({reason}). Check the store's URL, the endpoint URL "
            "(AWS_ENDPOINT_URL) and the region (AWS_DEFAULT_REGION).",
        )
    # Of whole objects only, by the checksum stored with them.
    if _is_about(error, ("FlexibleChecksumError",)):
        return Corrupt(
            f"{where} came with other bytes than were stored ({reason}). Check the storage, or delete it."
        )
    if _is_about(error, SETTINGS) or isinstance(error, ValueError):
        return OSError(
            errno.EINVAL,
            f"{where} cannot be asked for ({reason}): the client's settings are not usable. Correct the AWS_* "
            "environment variables, the AWS configuration or the fsspec configuration.",
        )
    return Unreachable(
        f"{where} cannot be reached ({reason}), although it was tried several times. Check the network, the "
        "server and the endpoint URL, then start the same command again: nothing that was committed is lost."
    )


def endpoint_of(fs: AbstractFileSystem) -> str:
    """The server that ``fs`` talks to, without a user name or password: for messages."""
    protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
    client = getattr(fs, "_s3", None)
    url = client.meta.endpoint_url if client is not None else getattr(fs, "endpoint_url", None)
    if protocol == "s3":
        url = url or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if not url:
        return f"{protocol}://"
    parts = urlsplit(str(url))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error of a storage client; None if there was no answer."""
    return _answer(error)[0]


def _answer(error: BaseException) -> tuple[int | None, str | None]:
    """HTTP status and error code of the answer behind ``error``."""
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


def without_secrets(text: str) -> str:
    """``text`` without what stands in its URLs for nobody to see: passwords and signatures."""
    text = re.sub(r"//[^/\s@]+@", "//***@", text)
    return re.sub(r"(https?://[^\s?\"']+)\?[^\s\"']+", r"\1?***", text)


def _without_secrets(fs: AbstractFileSystem, text: str) -> str:
    for name in ("secret", "token", "key", "password"):
        if isinstance(value := getattr(fs, name, None), str) and value:
            text = text.replace(value, "***")
    return without_secrets(text)
