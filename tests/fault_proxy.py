"""Proxy between an S3 client and a real server that injects faults into selected requests."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

# Headers of one connection, and "expect", which the proxy answers itself. Signatures do not cover them.
NOT_FORWARDED = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


@dataclass(frozen=True)
class Request:
    """A request of the client.

    Args:
        method: HTTP method, such as "GET".
        path: decoded path without the query: ``/bucket/key``.
        query: parameters of the query.
        headers: headers by lower-case name.
        body: body, decoded if it was sent in chunks.
        target: path and query as sent.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    target: str = field(repr=False)

    @property
    def signed(self) -> bool:
        """Return whether the request has an Authorization header."""
        return "authorization" in self.headers

    @property
    def writes(self) -> bool:
        """Return whether the request changes the storage."""
        return self.method in ("PUT", "POST", "DELETE")

    @property
    def conditional(self) -> bool:
        """Return whether the server must refuse the request if the object exists."""
        return "if-none-match" in self.headers


@dataclass(frozen=True)
class Answer:
    """A response of the server, without the headers of the connection."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange:
    """One request in progress, whose response is controlled by a fault."""

    def __init__(self, request: Request, handler: "_Handler", proxy: "FaultProxy") -> None:
        self.request, self._handler, self._proxy = request, handler, proxy

    def forward(self) -> Answer:
        """Send the request to the server; every call sends it again."""
        connection = HTTPConnection(*self._proxy.server, timeout=120)
        try:
            connection.putrequest(
                self.request.method, self.request.target, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.request.headers.items():
                if name not in NOT_FORWARDED:
                    connection.putheader(name, value)
            connection.putheader("Content-Length", str(len(self.request.body)))
            connection.endheaders(self.request.body)
            response = connection.getresponse()
            headers = [(name, value) for name, value in response.getheaders()]
            return Answer(response.status, headers, response.read())
        finally:
            connection.close()

    def send(self, answer: Answer, stop_after: int | None = None) -> None:
        """Send head and body to the client; with ``stop_after``, only so many bytes of the body."""
        self._handler.send_response_only(answer.status)
        is_head = self.request.method == "HEAD"
        for name, value in answer.headers:
            if name.lower() not in NOT_FORWARDED or is_head and name.lower() == "content-length":
                self._handler.send_header(name, value)
        if not is_head:
            self._handler.send_header("Content-Length", str(len(answer.body)))
        self._handler.end_headers()
        if not is_head:
            self._handler.wfile.write(answer.body[:stop_after])
            self._handler.wfile.flush()

    def send_rest(self, answer: Answer, start: int) -> None:
        """Send the part of the body that ``send`` with ``stop_after=start`` left out."""
        self._handler.wfile.write(answer.body[start:])

    def hang_up(self) -> None:
        """Close the connection to the client."""
        self._handler.close_connection = True

    def wait(self, seconds: float) -> None:
        """Wait for some time, or until the proxy is stopped."""
        self._proxy.stopped.wait(seconds)


Fault = Callable[[Exchange], None]


@dataclass
class _Rule:
    fault: Fault
    matches: Callable[[Request], bool]
    skip: int
    times: float  # number of remaining uses


class FaultProxy:
    """Proxy that forwards all requests to ``server``, except those that match a rule.

    Args:
        server: URL of the real server.

    Attributes:
        url: URL of the proxy, for AWS_ENDPOINT_URL.
        requests: all requests, in order of arrival.
        caught: requests with an injected fault.
        stopped: set when the proxy stops; ends all waiting.
    """

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        assert parts.hostname is not None, "the URL of a server has a host"
        assert parts.port is not None, "the URL of a test server has a port"
        self.server = (parts.hostname, parts.port)
        self.requests: list[Request] = []
        self.caught: list[Request] = []
        self.stopped = Event()
        self._rules: list[_Rule] = []
        self._lock = Lock()
        self._listener = _Listener(("127.0.0.1", 0), _Handler)
        self._listener.proxy = self
        self.url = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> Self:
        Thread(target=self._listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self._listener.shutdown()
        self._listener.server_close()

    def inject(
        self,
        fault: Fault,
        matches: Callable[[Request], bool] = lambda request: True,
        skip: int = 0,
        times: float = 1,
    ) -> None:
        """Add a rule that injects a fault. For every request, the first matching rule is used.

        Args:
            fault: fault to inject.
            matches: returns whether a request is affected.
            skip: number of matching requests to forward first.
            times: number of requests to affect after these; ``float("inf")`` for all.
        """
        with self._lock:
            self._rules.append(_Rule(fault, matches, skip, times))

    def heal(self) -> None:
        """Remove all rules."""
        with self._lock:
            self._rules.clear()

    def fault_for(self, request: Request) -> Fault | None:
        """Record ``request`` and return the fault to inject, or None."""
        with self._lock:
            self.requests.append(request)
            for rule in self._rules:
                if rule.times <= 0 or not rule.matches(request):
                    continue
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                self.caught.append(request)
                return rule.fault
        return None


class _Listener(ThreadingHTTPServer):
    proxy: FaultProxy
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), OSError):  # clients that give up are expected in these tests
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Listener

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        query = parse_qs(parts.query, keep_blank_values=True)
        request = Request(self.command, unquote(parts.path), query, headers, self._read_body(), self.path)
        proxy = self.server.proxy
        fault, exchange = proxy.fault_for(request), Exchange(request, self, proxy)
        if fault is None:
            exchange.send(exchange.forward())
        else:
            fault(exchange)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = bytearray()
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return bytes(body)

    def log_message(self, *_: object) -> None:
        pass
