"""TCP proxy that makes a server on this machine as slow as a distant one: latency, and limits on its rate.

    python tests/benchmarks/throttled_proxy.py --server 127.0.0.1:8333 --latency 0.03 --per-connection 8e6 --total 200e6

Prints its port. Runs until its standard input ends.
"""

import argparse
import asyncio
import contextlib
import sys
import time

CHUNK = 64 << 10  # bytes forwarded at once


class Limit:
    """Maximum rate, in bytes per second."""

    def __init__(self, rate: float) -> None:
        self._rate, self._free_at = rate, 0.0

    def booked(self, size: int) -> float:
        """Book ``size`` bytes, and return the time at which they have passed, by ``time.monotonic``."""
        self._free_at = max(self._free_at, time.monotonic()) + size / self._rate
        return self._free_at


async def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--server", required=True, help="host:port")
    parser.add_argument("--latency", type=float, required=True, help="seconds that each request waits")
    parser.add_argument("--per-connection", type=float, required=True, help="bytes per second")
    parser.add_argument("--total", type=float, required=True, help="bytes per second of all connections")
    arguments = parser.parse_args()
    host, port = arguments.server.rsplit(":", 1)
    total = Limit(arguments.total)

    async def connected(client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        server_in, server_out = await asyncio.open_connection(host, int(port), limit=CHUNK)
        own, answered = Limit(arguments.per_connection), True

        async def forward(source: asyncio.StreamReader, target: asyncio.StreamWriter, requests: bool) -> None:
            nonlocal answered
            with contextlib.suppress(ConnectionError):
                while data := await source.read(CHUNK):
                    if requests and answered:  # the first bytes of a request
                        await asyncio.sleep(arguments.latency)
                    answered = not requests
                    passed = max(own.booked(len(data)), total.booked(len(data)))
                    await asyncio.sleep(max(0.0, passed - time.monotonic()))
                    target.write(data)
                    await target.drain()
            target.close()

        await asyncio.gather(
            forward(client_in, server_out, requests=True), forward(server_in, client_out, requests=False)
        )

    server = await asyncio.start_server(connected, "127.0.0.1", 0, limit=CHUNK)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)


if __name__ == "__main__":
    asyncio.run(main())
