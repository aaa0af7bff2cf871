"""Credentials in URLs: find them, and remove them from what people read."""

import re

AZURE = ("abfs", "abfss", "wasb", "wasbs")  # their URLs contain container@account, which is not a secret
SECRET_IN_QUERY = re.compile(
    r"[?&][^=&]*(token|signature|sig|secret|password|credential|key)[^=&]*=", re.IGNORECASE
)


def holds_credentials(url: str) -> bool:
    """Return whether any link of a (possibly chained) URL has a user, a password, or a secret in its query."""
    return any(
        without_credentials(place := link.partition("?")[0]) != place or SECRET_IN_QUERY.search(link)
        for link in url.split("::")
    )


def without_credentials(url: str) -> str:
    """Remove user, password, query and fragment from every link of a (possibly chained) URL."""
    return "::".join(_without_credentials(link) for link in url.split("::"))


def _without_credentials(link: str) -> str:
    protocol, separator, rest = link.partition("://")
    if not separator:
        return link
    rest = rest.split("?")[0].split("#")[0]
    before, at, after = rest.rpartition("@")
    if protocol in AZURE and ":" not in before:
        return f"{protocol}://{rest}"
    # AWS secrets contain slashes, so a password may continue after the first slash: cut at the last "@".
    if at and (":" in before or "/" not in before):
        rest = after
    return f"{protocol}://{rest}"
