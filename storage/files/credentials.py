"""Credentials in URLs: detected, and removed before a URL is shown or stored."""

import re

AZURE = ("abfs", "abfss", "wasb", "wasbs")  # their URLs contain container@account, which is not a secret
SECRET_IN_QUERY = re.compile(
    r"[?&][^=&]*(token|signature|sig|secret|password|credential|key)[^=&]*=", re.IGNORECASE
)


def without_credentials(url: str) -> str:
    """Return ``url`` without user, password, query and fragment, in every link of a chained URL."""
    return "::".join(_without_credentials(link) for link in url.split("::"))


def holds_credentials(url: str) -> bool:
    """Return whether a URL, or a link of a chained one, has a user, a password, or a secret in its query."""
    return any(
        without_credentials(place := link.partition("?")[0]) != place or SECRET_IN_QUERY.search(link)
        for link in url.split("::")
    )


def without_secrets(text: str) -> str:
    """Return ``text``, such as an error message, with the users, passwords and queries in its URLs replaced by ***."""
    text = re.sub(r"//[^/\s@]+@", "//***@", text)
    return re.sub(r"(https?://[^\s?\"']+)\?[^\s\"']+", r"\1?***", text)


def _without_credentials(link: str) -> str:
    protocol, separator, rest = link.partition("://")
    if not separator:
        return link
    rest = rest.split("?")[0].split("#")[0]
    before, at, after = rest.rpartition("@")
    if protocol in AZURE and ":" not in before:
        return f"{protocol}://{rest}"
    # AWS secrets contain slashes, so a password may extend beyond the first slash: cut at the last "@".
    if at and (":" in before or "/" not in before):
        rest = after
    return f"{protocol}://{rest}"
