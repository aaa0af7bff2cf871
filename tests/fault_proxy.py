"""A proxy between an S3 client and a real server that makes chosen requests go wrong."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

# They belong to one connection, or are answered by the proxy itself ("expect"); no signature covers them.
NOT_FORWARDED = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


@dataclass(frozen=True)
class Request:
    """What the client asked for.

    Args:
        method: such as "GET".
        path: without the query, decoded: ``/bucket/key``.
        query: its parameters.
        headers: by name in small letters.
        body: decoded if it came in chunks.
        target: path and query as they were sent.
    """

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    target: str = field(repr=False)

    @property
    def signed(self) -> bool:
        """Whether it carried an Authorization header."""
        return "authorization" in self.headers

    @property
    def writes(self) -> bool:
        """Whether it would change what is stored."""
        return self.method in ("PUT", "POST", "DELETE")

    @property
    def conditional(self) -> bool:
        """Whether it is to be refused if the object exists."""
        return "if-none-match" in self.headers


@dataclass(frozen=True)
class Answer:
    """What the server said; ``headers`` without those of the connection."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes


class Exchange:
    """One request under way: a fault decides what becomes of it."""

    def __init__(self, request: Request, handler: "_Handler", proxy: "FaultProxy") -> None:
        self.request, self._handler, self._proxy = request, handler, proxy

    def forward(self) -> Answer:
        """Send the request to the server; every call sends it once more."""
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
        """Give the client the head and the body, or only its first ``stop_after`` bytes."""
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
        """Give the client what ``send`` with ``stop_after=start`` left out."""
        self._handler.wfile.write(answer.body[start:])

    def hang_up(self) -> None:
        """Close the connection to the client after what was sent so far."""
        self._handler.close_connection = True

    def wait(self, seconds: float) -> None:
        """Do nothing for some time, or until the proxy is stopped."""
        self._proxy.stopped.wait(seconds)


Fault = Callable[[Exchange], None]


@dataclass
class _Rule:
    fault: Fault
    matches: Callable[[Request], bool]
    skip: int
    times: float  # how often it is still to be used


class FaultProxy:
    """Forwards everything to ``server`` but what a rule catches.

    Args:
        server: URL of the real server.

    Attributes:
        url: of the proxy, for AWS_ENDPOINT_URL.
        requests: everything that was asked, in order of arrival.
        caught: the requests among them that met a fault.
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
        """Let requests go wrong from now on; the first rule that catches a request is the one used.

        Args:
            matches: which ones.
            skip: how many matching requests pass before.
            times: how many are caught after these; ``float("inf")`` for all.
        """
        with self._lock:
            self._rules.append(_Rule(fault, matches, skip, times))

    def heal(self) -> None:
        """Let everything pass from now on."""
        with self._lock:
            self._rules.clear()

    def fault_for(self, request: Request) -> Fault | None:
        """Record ``request``; the fault that it is to meet."""
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
        if not isinstance(sys.exception(), OSError):  # a client that gave up is what these tests are about
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
