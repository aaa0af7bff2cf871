"""Process of the embedded Prefect server, on a port that its parent process has reserved."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from layerwise.flows.orchestration.parent_process import wait_for_end_of_parent

if TYPE_CHECKING:
    import uvicorn

# SLURM and systemd send these to all processes of a job. The parent process needs the server until its own end.
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 5.0  # seconds from the end of the parent process until this process is killed


def main() -> None:
    """Serve until all processes that hold the other end of our standard input have ended."""
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Generator[None]:
            yield  # the signals stay ignored

    listening = socket.socket(fileno=int(sys.argv[1]))
    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on"
    )
    server = Server(config)
    threading.Thread(target=_end_with_parent, args=[server], name="parent process", daemon=True).start()
    server.run(sockets=[listening])


def _end_with_parent(server: "uvicorn.Server") -> None:
    wait_for_end_of_parent()
    server.should_exit = True
    time.sleep(GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
