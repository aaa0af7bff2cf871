"""Servers that are unreachable, refuse, fail or are no Prefect servers: one line within seconds."""

import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from layerwise.flows.orchestration.server_check import check_server, is_about_server, refuse_unusable_proxies


@pytest.fixture
def answering():
    """Start a server that gives the same answer to every request; return its address without a scheme."""
    servers = []

    def start(status: int, content: bytes, kind: str = "application/json") -> str:
        class Answer(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Answer))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def refusal_of(url: str, auth: str | None = None) -> str:
    began = time.monotonic()
    settings = temporary_settings({PREFECT_API_URL: url, PREFECT_API_AUTH_STRING: auth})
    with settings, pytest.raises(ConnectionError) as refused:
        check_server()
    assert time.monotonic() - began < 20
    (line,) = str(refused.value).splitlines()
    return line


@pytest.mark.parametrize(
    ("status", "content", "kind", "message"),
    [
        (503, b"<h1>later</h1>", "text/html", "answers with 503 Service Unavailable. Check its log"),
        (500, b"{}", "application/json", "answers with 500 Internal Server Error"),
        (
            401,
            b'{"exception_message": "Unauthorized"}',
            "application/json",
            "PREFECT_API_AUTH_STRING is not set",
        ),
        (403, b"<h1>no</h1>", "text/html", "(403 Forbidden), and PREFECT_API_AUTH_STRING is not set"),
        (
            404,
            b"<h1>what?</h1>",
            "text/html",
            "is not the API of a Prefect server (it answers with 404 Not Found)",
        ),
        (
            200,
            b"<h1>hello</h1>",
            "text/html",
            "is not the API of a Prefect server (it answers with text/html)",
        ),
        (200, b'{"a": 1}', "application/json", "is not the API of a Prefect server"),
        (200, b'"2.20.4"', "application/json", "has version 2.20.4, which is not compatible with Prefect 3."),
    ],
)
def test_a_wrong_answer_gives_one_line_with_the_url(answering, status, content, kind, message):
    place = answering(status, content, kind)
    line = refusal_of(f"http://user:SECRET@{place}/api")
    assert message in line
    assert f"{place}/api" in line
    assert "SECRET" not in line


def test_a_wrong_password_is_called_wrong_and_not_shown(answering):
    line = refusal_of(f"http://{answering(401, b'{}')}/api", auth="admin:SECRET")
    assert "PREFECT_API_AUTH_STRING is not the right one" in line
    assert "SECRET" not in line


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "http://127.0.0.1:1/api",
            "the Prefect server at http://127.0.0.1:1/api does not answer (ConnectError: ",
        ),
        ("127.0.0.1:4200/api", "is not a URL"),
    ],
)
def test_an_unreachable_url_gives_one_line(url, message):
    assert message in refusal_of(url)


def test_only_requests_to_prefect_are_about_its_server():
    url = "http://127.0.0.1:1/api"
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        of_server = client.api_healthcheck()
    with pytest.raises(httpx.ConnectError) as of_another:
        httpx.get(url)
    assert is_about_server(of_server)
    assert not is_about_server(of_another.value)


@pytest.mark.parametrize("proxy", ["socks5://user:SECRET@127.0.0.1:1", "nonsense://127.0.0.1:1"])
def test_an_unusable_proxy_is_named_by_its_variable(monkeypatch, proxy):
    monkeypatch.setenv("ALL_PROXY", proxy)
    try:
        httpx.Client().close()
    except (ImportError, ValueError):
        pass
    else:
        pytest.skip("the package socksio is installed")
    with pytest.raises(ConnectionError, match="the proxy set by ALL_PROXY cannot be used") as refused:
        refuse_unusable_proxies()
    assert "SECRET" not in str(refused.value)
