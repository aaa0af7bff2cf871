"""Check the Prefect server before any work: its URL, its answer, its version and our access to it."""

import os

import httpx
from packaging.version import Version
from prefect import __version__ as prefect_version
from prefect.client.base import ServerType
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.settings import (
    PREFECT_API_AUTH_STRING,
    PREFECT_API_REQUEST_TIMEOUT,
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    temporary_settings,
)

from layerwise.storage.files.credentials import without_secrets

# By default, Prefect's client repeats a request for a minute, and waits a minute for each answer.
QUICKLY = {PREFECT_CLIENT_MAX_RETRIES: 1, PREFECT_API_REQUEST_TIMEOUT: 5.0}
VERSION_HEADER = "X-PREFECT-API-VERSION"  # in every request of Prefect's client
WHERE_SET = "PREFECT_API_URL (environment, Prefect profile or prefect.toml)"


def check_server() -> None:
    """Ask the server for its version, and wait a few seconds at most.

    Raises:
        ConnectionError: it does not answer, refuses us, is not a Prefect server, or has an incompatible version.
    """
    with temporary_settings(QUICKLY):
        try:
            with get_client(sync_client=True) as client:
                _check(client)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ConnectionError(server_problem(error)) from None  # a traceback would show the URL


def is_about_server(error: BaseException) -> bool:
    """Return whether ``error`` is about a request to Prefect's server, and not to the hub or a storage."""
    request = getattr(error, "_request", None) or getattr(error, "request", None)
    return isinstance(error, httpx.HTTPError) and request is not None and VERSION_HEADER in request.headers


def server_problem(error: Exception) -> str:
    """Describe a failed request to Prefect's server in one line: the URL, the problem, and what to do.

    Args:
        error: an ``httpx.HTTPError`` or ``httpx.InvalidURL``.
    """
    if isinstance(error, httpx.InvalidURL | httpx.UnsupportedProtocol):
        reason = without_secrets(str(error))
        return f"{WHERE_SET} is not a URL ({reason}). Set it to http(s)://HOST:PORT/api, or unset it."
    if isinstance(error, httpx.HTTPStatusError):
        return _refusal(error)
    reason = without_secrets(f"{type(error).__name__}: {error}".rstrip(": "))
    if not PREFECT_API_URL.value():
        return f"Prefect's embedded server no longer answers ({reason}). Start the same command again."
    return (
        f"the Prefect server at {_configured_url()} does not answer ({reason}). Start it, correct {WHERE_SET}, or "
        "unset it to use the embedded server."
    )


def refuse_unusable_proxies() -> None:
    """Refuse proxies that httpx, the HTTP client of Prefect, cannot use.

    Raises:
        ConnectionError: the proxy is a SOCKS proxy and its package is missing, or its URL is not valid.
    """
    try:
        httpx.Client().close()
    except (ImportError, ValueError, httpx.InvalidURL) as error:
        # Values are not shown: they may hold a password.
        names = sorted(
            name for name in os.environ if name.lower() in ("http_proxy", "https_proxy", "all_proxy")
        )
        advice = "pip install 'httpx[socks]'" if isinstance(error, ImportError) else "correct it"
        raise ConnectionError(
            f"the proxy set by {' or '.join(names)} cannot be used to reach Prefect's server "
            f"({type(error).__name__}; for SOCKS the package socksio is needed). Unset it, or {advice}."
        ) from None


def _check(client: SyncPrefectClient) -> None:
    url = _configured_url()
    if client.server_type == ServerType.CLOUD:  # it does not give its version, and supports every client
        if (error := client.api_healthcheck()) is not None:
            raise error
        return
    try:
        response = client.request("GET", "/admin/version")
        kind = response.headers.get("content-type", "an answer of unknown type").partition(";")[0]
        found = Version(response.json())
    except (ValueError, TypeError, httpx.HTTPStatusError) as error:
        if isinstance(error, httpx.HTTPStatusError):
            kind = _status(error.response)
            if error.response.status_code not in (404, 405):
                raise
        raise ConnectionError(
            f"{url} is not the API of a Prefect server (it answers with {kind}). Correct {WHERE_SET}: the URL of a "
            "server of your own ends with /api."
        ) from None
    if found.major != Version(prefect_version).major:
        raise ConnectionError(
            f"the Prefect server at {url} has version {found}, which is not compatible with Prefect {prefect_version} "
            f"here. Upgrade the server, or correct {WHERE_SET}."
        )


def _refusal(error: httpx.HTTPStatusError) -> str:
    response, url = error.response, _configured_url()
    what = _status(response)
    if response.status_code in (401, 403):
        is_set = "is not the right one" if PREFECT_API_AUTH_STRING.value() else "is not set"
        return (
            f"the Prefect server at {url} requires authentication ({what}), and PREFECT_API_AUTH_STRING "
            f"{is_set}. Set it to the server's PREFECT_SERVER_API_AUTH_STRING (on Prefect Cloud: PREFECT_API_KEY)."
        )
    if response.status_code >= 500 or response.status_code in (408, 429):
        return (
            f"the Prefect server at {url} answers with {what}. Check its log and the proxy in front of it, and try "
            f"again, or correct {WHERE_SET}."
        )
    return f"the Prefect server at {url} refuses: {without_secrets(' '.join(str(error).split()))}"


def _status(response: httpx.Response) -> str:
    return f"{response.status_code} {response.reason_phrase}".strip()


def _configured_url() -> str:
    """Return PREFECT_API_URL without credentials; it is not set for the embedded server."""
    url = PREFECT_API_URL.value()
    return without_secrets(url) if url else "this machine (embedded)"
