"""Prefect server that the next flow would use, found without starting one."""

from dataclasses import dataclass
from pathlib import Path

from layerwise.flows.orchestration.embedded_server import home_of_server, in_one_line
from layerwise.storage.files.credentials import without_secrets


@dataclass(frozen=True)
class ChosenServer:
    """A Prefect server.

    Attributes:
        url: API of the server that the user has configured, without credentials; None for the embedded server.
        home: folder of the embedded server's database; None with a configured server.
        home_is_ours: whether ``home`` is in our cache folder, and not chosen by the user.
        problem: reason why it cannot be used; "" if there is none. If Prefect refuses its settings, the server is
            not known: ``url`` and ``home`` are None.
    """

    url: str | None = None
    home: Path | None = None
    home_is_ours: bool = False
    problem: str = ""


def choose_server() -> ChosenServer:
    """Find the server that a flow would use. A configured one is asked for its version, for a few seconds at most."""
    url = None
    try:
        from prefect.settings import get_current_settings

        from layerwise.flows.orchestration.server_check import check_server, refuse_unusable_proxies

        settings = get_current_settings()
        if settings.api.url:
            url = without_secrets(settings.api.url)
        refuse_unusable_proxies()
        if url is not None:
            check_server()
            return ChosenServer(url)
        problem = ""
        if not settings.server.ephemeral.enabled:
            problem = (
                "no Prefect server is configured, and the active Prefect profile does not allow the embedded one. Set "
                "PREFECT_API_URL to a server, or PREFECT_SERVER_EPHEMERAL_ENABLED=true."
            )
        return ChosenServer(None, *home_of_server(settings), problem)
    except (ConnectionError, ValueError) as error:  # ValueError: settings that Prefect refuses
        return ChosenServer(url, problem=str(in_one_line(error)))
